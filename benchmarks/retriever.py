"""The retriever as a service: queries per second by pages, what decode waits for it, and kill -9 in decode.

    python -m benchmarks.retriever [--quick] [--config configs/longreach.yaml] [--tokens 4000]

It runs in a process of its own, behind the transport. Queries: one layer's table of made-up keys with the
model's sizes, contexts of so many pages each, a client thread for each. Decode: rows that ask different
questions of one document, in lockstep; steps in which all of them decode, with the retriever in the
worker, remote, and remote and asked ahead of time, also with its answers so many milliseconds late. Kill: the
process is ended by SIGKILL in decode and another one started; a row that fails for it is submitted again with
the tokens that it has, as the gateway does.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longreach.core.config import Config, load_config
from longreach.kvstore.transport import Channel, connect
from longreach.workers.engine import Engine
from longreach.workers.model_source import (
    load_model_config,
    model_dir,
    model_geometry,
    policies_of,
)
from longreach.workers.prompt import Prompt
from longreach.workers.row import RowRequest, RowState
from longreach.workers.sampling import Sampling

from .harness import (
    ROOT,
    Say,
    Session,
    console,
    load_model,
    open_session,
    parser,
    record,
    result_path,
    write_result,
)
from .retriever_process import RetrieverProcess
from .retriever_report import draw, tables
from .texts import build_text

PAGES, QUICK_PAGES = (1_000, 10_000, 100_000, 1_000_000), (500, 2_000)
CONTEXTS = (1, 8)
MOST_PAGES = 1_000_000
"""Of all contexts together: 768 MB of one layer's keys."""
ADDED_PAGES = 8_192
N_ROWS = 8
DELAY_S = 0.02
TIMEOUT_S = 300.0
KILLED_AFTER = 20
"""Tokens of the first row."""
REMOTE = ("retriever.remote=true",)
AHEAD = (*REMOTE, "retriever.asynchronous=true")
MODES: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("in the worker", (), None),
    ("remote", REMOTE, 0.0),
    ("asked ahead", AHEAD, 0.0),
    ("remote, late", REMOTE, DELAY_S),
    ("asked ahead, late", AHEAD, DELAY_S),
)
QUESTIONS = (
    "What is this text about?",
    "Who is named first?",
    "Which places are named?",
    "What happens in the morning?",
    "What was repaired?",
    "Why did they wait?",
    "What is said of the weather?",
    "How does it end?",
)
# a document that fits a short run is pruned as a long one is
SMALLER = tuple(
    f"attention.policies.{i}.{name}"
    for i in range(2)
    for name in ("window=512", "stages.0.keep=1024", "stages.1.keep=512")
)

Row = dict[str, Any]


# --- queries --------------------------------------------------------------------------------------


def queries(config: Config, n_pages: int, n_contexts: int, seconds: float) -> Row:
    """Contexts of n_pages each are asked by a thread each for so long."""
    geometry = model_geometry(config)
    policies = policies_of(config, geometry.n_layers)
    layer = next(i for i, policy in enumerate(policies) if policy.by_bookmark)
    key_shape = (geometry.n_kv_heads, 1, 1, geometry.head_dim)
    n_heads = int(load_model_config(model_dir(config.model)).num_attention_heads)
    with RetrieverProcess(config) as process:
        channel = connect(process.address)
        for i in range(n_contexts):
            _fill(channel, f"context-{i}", layer, n_pages, key_shape)
        times_s: list[list[float]] = [[] for _ in range(n_contexts)]
        ready = threading.Barrier(n_contexts + 1)

        def ask(i: int) -> None:
            mine = connect(process.address)
            q = np.random.default_rng(i).standard_normal((n_heads, geometry.head_dim), np.float32)
            header = {"context_id": f"context-{i}", "layer": layer, "q_start": n_pages * 128}
            header |= {"weights": [0.5, 0.1], "q_shape": list(q.shape)}
            mine.call("choose", header, [q.tobytes()], timeout_s=TIMEOUT_S)  # loads its kernel
            ready.wait()
            end_s = time.perf_counter() + seconds
            while len(times_s[i]) < 3 or time.perf_counter() < end_s:
                started_s = time.perf_counter()
                mine.call("choose", header, [q.tobytes()], timeout_s=TIMEOUT_S)
                times_s[i].append(time.perf_counter() - started_s)
            mine.close()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(n_contexts)]
        for thread in threads:
            thread.start()
        ready.wait()
        started_s = time.perf_counter()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - started_s
        n_bytes = channel.call("stats", {}, timeout_s=TIMEOUT_S).header["bytes"]
        channel.close()
    found = [t for mine in times_s for t in mine]
    return {
        "pages": n_pages,
        "contexts": n_contexts,
        "queries": len(found),
        "queries_per_s": round(len(found) / elapsed_s, 2),
        "median_ms": round(statistics.median(found) * 1e3, 3),
        "p95_ms": round(float(np.quantile(found, 0.95)) * 1e3, 3),
        "table_bytes": n_bytes,
    }


def _fill(
    channel: Channel, name: str, layer: int, n_pages: int, key_shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    channel.call("open", {"context_id": name, "keys": []}, timeout_s=TIMEOUT_S)
    for first in range(0, n_pages, ADDED_PAGES):
        n_added = min(ADDED_PAGES, n_pages - first)
        part = rng.standard_normal((n_added, *key_shape), dtype=np.float32)
        header = {"context_id": name, "layer": layer, "first_page": first}
        header |= {"last_page": first + len(part), "shape": list(part.shape)}
        channel.call("add", header, [part.tobytes()], timeout_s=TIMEOUT_S)


# --- decode ---------------------------------------------------------------------------------------


@dataclass
class Decoded:
    """Rows that decoded together."""

    tokens: list[list[int]]
    step_ms: list[float]
    """Of steps in which every row decoded."""
    n_submitted_again: int = 0
    former: dict[str, list[int]] = field(default_factory=dict)


def decode(
    engine: Engine,
    prompts: Sequence[Prompt],
    n_new: int,
    name: str,
    after_token: Callable[[int], None] = lambda _: None,
    recover: Callable[[], None] | None = None,
) -> Decoded:
    """after_token: called with the first row's count. recover: called before rows that failed are submitted
    again; without it an error is raised."""
    names = [f"{name}-{i}" for i in range(len(prompts))]
    done: dict[str, list[int]] = {}
    found = Decoded([], [])

    def submit(i: int, attempt: int = 0) -> None:
        sampling, forced = Sampling(max_tokens=n_new), tuple(found.former.get(names[i], ()))
        prompt = prompts[i]
        row_id = f"{names[i]}#{attempt}"
        engine.submit(
            RowRequest(row_id, prompt.token_ids, prompt.n_context_tokens, sampling, forced)
        )

    for i in range(len(prompts)):
        submit(i)
    while engine.n_rows:
        together = len(engine.rows) == len(prompts) and all(
            row.state is RowState.DECODE for row in engine.rows
        )
        started_s = time.perf_counter()
        events = engine.step()
        if together:
            found.step_ms.append((time.perf_counter() - started_s) * 1e3)
        failed = []
        for event in events:
            row, attempt = event.row_id.split("#")
            if event.kind == "token":
                found.former.setdefault(row, []).append(event.payload["token_id"])
                if row == names[0]:
                    after_token(len(found.former[row]))
            if event.kind == "done":
                done[row] = event.payload["token_ids"]
            if event.error is not None:
                if recover is None:
                    raise event.error
                failed.append((names.index(row), int(attempt) + 1))
        if failed and recover is not None:
            recover()
            for again in failed:
                submit(*again)
            found.n_submitted_again += len(failed)
        if not engine.can_progress:
            time.sleep(0.002)
    found.tokens = [done[row] for row in names]
    return found


def step_times(decoded: Decoded) -> Row:
    steps = decoded.step_ms
    return {
        "steps": len(steps),
        "median_ms": round(statistics.median(steps), 2),
        "p95_ms": round(float(np.quantile(steps, 0.95)), 2),
        "max_ms": round(max(steps), 2),
        "step_ms": [round(step, 2) for step in steps],
    }


class Worker:
    """Engines of one worker after another over the same stores, which hold the document."""

    def __init__(self, arguments: Any, session: Session, model: Any, prompts: Any) -> None:
        self._arguments = arguments
        self._session = session
        self._model = model
        self.prompts = prompts

    def config(self, sets: Sequence[str]) -> Config:
        return load_config([self._arguments.config], [*self._arguments.set, *SMALLER, *sets])

    def engine(self, sets: Sequence[str], address: str | None) -> Engine:
        retrievers = {} if address is None else {"retriever-0": address}
        first = self._session
        config = self.config(sets)
        return Session(
            config, self._model, self.prompts, first.client, first.stores, retrievers
        ).engine


def latencies(worker: Worker, prompts: Sequence[Prompt], n_new: int, say: Say) -> list[Row]:
    """A row for each way to retrieve. Raises AssertionError if tokens differ where they must not."""
    rows, tokens = [], {}
    for mode, sets, delay_s in MODES:
        say(f"decode, {mode}")
        if delay_s is None:
            decoded = decode(worker.engine(sets, None), prompts, n_new, mode)
        else:
            with RetrieverProcess(worker.config(sets), delay_s) as process:
                decoded = decode(worker.engine(sets, process.address), prompts, n_new, mode)
        tokens[mode] = decoded.tokens
        rows.append({"mode": mode, "delay_ms": 1e3 * (delay_s or 0.0), **step_times(decoded)})
    assert tokens["in the worker"] == tokens["remote"] == tokens["remote, late"]
    assert tokens["asked ahead"] == tokens["asked ahead, late"]
    return rows


def killed(worker: Worker, prompts: Sequence[Prompt], n_new: int, say: Say) -> list[Row]:
    """With and without asking ahead, beside rows that nothing disturbed."""
    rows = []
    for mode, sets in (("remote", REMOTE), ("asked ahead", AHEAD)):
        say(f"kill -9, {mode}")
        with RetrieverProcess(worker.config(sets)) as process:
            engine = worker.engine(sets, process.address)
            quiet = decode(engine, prompts, n_new, f"quiet {mode}")
        at = min(KILLED_AFTER, n_new // 2)
        struck = decode_and_kill(worker, sets, prompts, n_new, at)
        row = {"mode": mode, "rows": len(prompts), "killed_after_tokens": at}
        row |= {"submitted_again": struck.n_submitted_again}
        rows.append(row | {"tokens_unchanged": struck.tokens == quiet.tokens})
    return rows


def decode_and_kill(
    worker: Worker, sets: Sequence[str], prompts: Sequence[Prompt], n_new: int, at: int
) -> Decoded:
    """The retriever gets SIGKILL when the first row has so many tokens; another one is started when rows fail
    for it."""
    config = worker.config(sets)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(RetrieverProcess(config))
        engine = worker.engine(sets, first.address)

        def strike(n_tokens: int) -> None:
            if n_tokens == at:
                first.kill()

        def recover() -> None:
            second = stack.enter_context(RetrieverProcess(config))
            engine.update_retrievers({"retriever-0": second.address})

        return decode(engine, prompts, n_new, f"struck {len(sets)}", strike, recover)


def main(argv: Sequence[str]) -> int:
    made = parser(__doc__)
    made.set_defaults(config=str(ROOT / "configs" / "longreach.yaml"))
    made.add_argument("--seconds", type=float, default=10.0, help="of queries, per line")
    made.add_argument("--new", type=int, help="tokens of each answer")
    arguments = made.parse_args(argv)
    out = console()
    config = load_config([arguments.config], [*arguments.set, *SMALLER])
    result = record("benchmarks.retriever", config, argv)
    pages = QUICK_PAGES if arguments.quick else PAGES
    n_new = arguments.new or (24 if arguments.quick else 64)
    remote = load_config([arguments.config], [*arguments.set, *REMOTE])
    result["queries"] = []
    for n_pages in pages:
        for n_contexts in CONTEXTS:
            if n_pages * n_contexts <= MOST_PAGES:
                out.print(f"{n_contexts} contexts of {n_pages:,} pages")
                seconds = 0.5 if arguments.quick else arguments.seconds
                result["queries"].append(queries(remote, n_pages, n_contexts, seconds))
    path = result_path(arguments, "retriever")
    write_result(path, result)
    model, prompts = load_model(config)
    model.eos_token_ids = frozenset()
    text = build_text(prompts.count, 5, arguments.tokens or (2000 if arguments.quick else 4000))
    asked = [prompts.build(text, question) for question in QUESTIONS[:N_ROWS]]
    with open_session(config, model, prompts) as session:
        worker = Worker(arguments, session, model, prompts)
        out.print("the document is read")
        session.ask(asked[:1], 2, out.print)
        result["decode"] = latencies(worker, asked, n_new, out.print)
        write_result(path, result)
        result["killed"] = killed(worker, asked, n_new, out.print)
    write_result(path, result)
    for table in tables(result):
        out.print(table)
    picture = draw(result, path.with_suffix(".png"))
    out.print(f"written: {path}" + (f", {picture}" if picture else ""))
    return 0 if all(row["tokens_unchanged"] for row in result["killed"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
