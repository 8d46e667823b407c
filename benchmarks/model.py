"""End to end by context length: ours beside Hugging Face dense attention and llama.cpp.

    python -m benchmarks.model [--quick] [--lengths 8192,32768] [--config A --config B] [--grow]

The same tokens for all, cut out of one text; every length is read and then 64 tokens are decoded.
Dense attention (float32) and llama.cpp (the embedded model's GGUF, float16 KV, with flash attention
and without: the faster counts) take time quadratic in the length: they are measured up to a limit,
and what lies beyond is extrapolated and marked with a tilde. Beyond the 8,192 tokens that the model
was trained for their answers mean nothing, only their times do.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longreach.core.config import Config, config_dict
from longreach.workers.dense import DenseModel
from longreach.workers.embedded import find_embedded_gguf
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_geometry
from longreach.workers.prompt import Prompt, PromptBuilder

from . import harness
from .harness import Answer, Say, Session, open_session, reset_peak, resident_bytes, write_result
from .llama_cpp import WAYS, LlamaCppError, environment_python, evaluate
from .model_report import (
    DENSE,
    LLAMA,
    OURS,
    Row,
    Systems,
    completed,
    parts_table,
    plot,
    pyplot,
    ratios,
    ratios_table,
    rows_table,
)
from .speed import rates, seconds_by_part, sparse_row
from .texts import build_text

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
QUICK_LENGTHS = (512, 1024)
DENSE_LIMIT, LLAMA_LIMIT = 8192, 16384
DECODE_STEPS, QUICK_DECODE_STEPS = 64, 16
PIECE_TOKENS = 10_000
"""The long text is joined from texts of this length: one seed fills no more than a few of them."""
FIRST_SEED = 700
QUESTION = "What is this text about?"
SPARE_PAGES = 16
"""Pages per length beside its context: question, answer, the last block that is computed again."""
MEMORY_KEPT_BYTES = 4 << 30
"""Left free beside arenas in memory: for the model, the device bank and the arrays of a prefill."""


@dataclass(frozen=True)
class Asked:
    """What every side is asked: prompts by their length, and the tokens decoded after each."""

    prompts: dict[int, Prompt]
    n_steps: int
    say: Say

    def at(self, lengths: Sequence[int]) -> Asked:
        return replace(self, prompts={n: self.prompts[n] for n in lengths})


def measurable(lengths: Sequence[int], limit: int) -> list[int]:
    """Where a side is measured: up to its limit, at more than was asked if it is extrapolated."""
    more = LENGTHS if max(lengths) > limit else ()
    return sorted({n for n in (*lengths, *more) if n <= limit})


def prompts_of(builder: PromptBuilder, lengths: Collection[int]) -> dict[int, Prompt]:
    """One text, cut so that prompt and question have each length: shorter ones are prefixes."""
    pieces: list[str] = []
    filled = 0
    while filled <= max(lengths):
        pieces.append(build_text(builder.count, FIRST_SEED + len(pieces), PIECE_TOKENS))
        filled += builder.count(pieces[-1])
    whole = builder.build("\n".join(pieces), QUESTION)
    head, tail = np.split(whole.token_ids, [whole.n_context_tokens])
    kept = {n: head[: n - len(tail)] for n in sorted(lengths)}
    return {n: Prompt(np.concatenate([part, tail]), len(part)) for n, part in kept.items()}


# --- the sides ------------------------------------------------------------------------------------


@contextlib.contextmanager
def moments(
    owner: object, method: str, counts: Callable[[Any], bool] = lambda _: True
) -> Iterator[list[float]]:
    """When the owner's method returned something that counts, in seconds, as long as this lasts."""
    inner = getattr(owner, method)
    seen: list[float] = []

    def outer(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        if counts(result):
            seen.append(time.monotonic())
        return result

    setattr(owner, method, outer)
    try:
        yield seen
    finally:
        delattr(owner, method)


def fresh_peak() -> dict[str, int]:
    """Resident memory, as a new peak begins."""
    gc.collect()
    reset_peak()
    return resident_bytes()


def measured(
    n_tokens: int, n_prefilled: int, prefill_s: float, step_s: Sequence[float], peak_bytes: int
) -> Row:
    """decode_ms is of single forwards of one token, as whoever waits for the tokens sees them. The first
    stands for itself: ours selects anew in all layers then, which later steps share among them."""
    ms = [seconds * 1e3 for seconds in step_s]
    later = ms[1:] or ms
    spread = {"first": ms[0], "median": statistics.median(later), "max": max(later)}
    spread |= {"mean": statistics.fmean(later), "max_over_median": max(later) / spread["median"]}
    return {
        "tokens": n_tokens,
        "extrapolated": False,
        **rates(n_prefilled, prefill_s, len(step_s), sum(step_s)),
        "ttft_s": round(prefill_s, 3),
        "decode_ms": {name: round(value, 3) for name, value in spread.items()},
        "peak_resident_bytes": peak_bytes,
    }


def ours_at(session: Session, prompt: Prompt, asked: Asked) -> Row:
    """A prompt in a session; a text of which the stores hold the beginning is only read on."""
    before = fresh_peak()
    with moments(session.engine, "step", lambda s: any(e.kind == "token" for e in s)) as seen:
        answer = session.ask([prompt], asked.n_steps + 1, asked.say, ignore_eos=True)[0]
    stats, memory = answer.stats, {"before": before, "after": resident_bytes()}
    step_s = [b - a for a, b in itertools.pairwise(seen)]
    n_prefilled, peak_bytes = int(stats["tokens_prefilled"]), memory["after"]["peak"]
    return {
        **measured(prompt.n_tokens, n_prefilled, stats["prefill_s"], step_s, peak_bytes),
        **sparse_row(answer),
        "steady": steady_row(answer),
        "tokens_reused": int(stats["tokens_reused"]),
        "token_ids": answer.token_ids,
        "ttft_s": round(stats["ttft_s"], 3),
        "memory": memory,
    }


def steady_row(answer: Answer) -> Row:
    """Time by part of the decode steps after the first."""
    last = answer.stats
    later = {name: last[name] - answer.begun[name] for name in last}
    seconds = seconds_by_part(later, later["decode_s"])
    return {"steps": int(later["tokens_decoded"]), "seconds": seconds, "s": later["decode_s"]}


def room(config: Config, n_tokens: int, scratch: str) -> tuple[Config, Row]:
    """The configuration with stores that hold n_tokens, and what they come to.

    All replicas where they fit beside the model, else one, else one on disk in `scratch`.
    """
    geometry, store = model_geometry(config), config.store
    n_bytes = -(-n_tokens // geometry.page_tokens) * geometry.page_nbytes
    choices = ((store.replicas, store.arena_dir), (1, store.arena_dir), (1, scratch))
    fitting = [choice for choice in choices if n_bytes * choice[0] <= free_bytes(choice[1])]
    if not fitting:
        raise SystemExit(f"no place for {n_bytes:,} bytes of pages, in memory or on disk")
    replicas, arena = fitting[0]
    told = {"replicas": replicas, "capacity_bytes": max(store.capacity_bytes, n_bytes)}
    limit = {"max_context_tokens": max(config.model.max_context_tokens, n_tokens)}
    model = config.model.model_copy(update=limit)
    store = store.model_copy(update={**told, "arena_dir": arena})
    where = "a temporary directory on disk" if arena == scratch else "as configured"
    return config.model_copy(update={"model": model, "store": store}), {**told, "arena": where}


def free_bytes(directory: str) -> int:
    """What an arena may take; one in memory leaves MEMORY_KEPT_BYTES for everything else."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if not Path(directory).is_relative_to("/dev/shm"):
        return free
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return min(free, (kib << 10) - MEMORY_KEPT_BYTES)


def ours(
    config: Config, model: ModelAdapter, builder: PromptBuilder, asked: Asked, grow: bool
) -> Iterator[Row]:
    """A session for each length, or one for all, in which each text goes on where one ended."""
    for together in [list(asked.prompts)] if grow else [[n] for n in asked.prompts]:
        spare = len(together) * (SPARE_PAGES * config.cache.page_tokens + asked.n_steps)
        with tempfile.TemporaryDirectory() as scratch:
            roomy, told = room(config, max(together) + spare, scratch)
            with open_session(roomy, model, builder) as session:
                for n in together:
                    asked.say(f"{n:,} tokens")
                    yield {**ours_at(session, asked.prompts[n], asked), "store": told}


def dense(config: Config, asked: Asked) -> Iterator[Row]:
    model = DenseModel(config.model)
    model.answer([*asked.prompts.values()][:1], [8], ignore_eos=True)
    for n, prompt in asked.prompts.items():
        asked.say(f"{n:,} tokens")
        before = fresh_peak()
        with moments(model, "_forward") as seen:
            answer = model.answer([prompt], [asked.n_steps + 1], ignore_eos=True)[0]
        memory = {"before": before, "after": resident_bytes()}
        # the first two forwards are the context and the question
        step_s = [b - a for a, b in itertools.pairwise(seen[1:])]
        peak_bytes = memory["after"]["peak"]
        row = measured(n, answer.n_prefilled, answer.prefill_s, step_s, peak_bytes)
        yield {**row, "token_ids": answer.token_ids, "memory": memory}


def llama(gguf: Path, flash: bool, n_threads: int, asked: Asked) -> Iterator[Row]:
    fixed = {"gguf": str(gguf), "flash": flash, "n_threads": n_threads, "n_steps": asked.n_steps}
    for n, prompt in asked.prompts.items():
        got = evaluate({**fixed, "tokens": prompt.token_ids.tolist()}, asked.say)
        row = measured(n, n, got["prefill_s"], got["step_s"], got["peak_bytes"])
        yield {**row, "token_ids": got["token_ids"], "build": got["build"]}


# --- the command line -----------------------------------------------------------------------------


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[harness.parser(None)],
        conflict_handler="resolve",
    )
    made.add_argument("--config", action="append", help="may be repeated: rows for each")
    made.add_argument("--lengths", help="tokens of prompt, separated by commas")
    made.add_argument("--steps", type=int, help="tokens decoded after each prompt")
    made.add_argument("--grow", action="store_true", help="each text goes on where one ended")
    made.add_argument("--dense-limit", type=int, default=DENSE_LIMIT, metavar="TOKENS")
    made.add_argument("--llama-limit", type=int, default=LLAMA_LIMIT, metavar="TOKENS")
    made.add_argument("--skip-llama", action="store_true", help="without llama.cpp")
    made.add_argument("--no-plot", action="store_true")
    found = made.parse_args(argv)
    found.config = found.config or [str(harness.ROOT / "configs" / "dev.yaml")]
    given = found.lengths or found.tokens
    known = QUICK_LENGTHS if found.quick else LENGTHS
    found.lengths = sorted({int(n) for n in str(given).split(",")}) if given else known
    found.steps = found.steps or (QUICK_DECODE_STEPS if found.quick else DECODE_STEPS)
    return found


def configs_of(arguments: argparse.Namespace, *, small: bool) -> dict[str, Config]:
    """The configurations of ours by the names of their rows."""
    each = [argparse.Namespace(config=path, set=arguments.set) for path in arguments.config]
    return {f"{OURS} {Path(a.config).stem}": harness.config_of(a, small=small) for a in each}


def llama_gguf(config: Config, arguments: argparse.Namespace, say: Say) -> Path | None:
    """The GGUF that llama.cpp is asked with; None if it is not asked.

    Raises SystemExit, with what to do, where llama.cpp is missing from a run that is not quick.
    """
    name = config.model.name
    if arguments.skip_llama or not (name == "embedded" or name.endswith(".gguf")):
        say("without llama.cpp")
        return None
    try:
        environment_python()
    except LlamaCppError as error:
        if not arguments.quick:
            raise SystemExit(str(error)) from error
        say(str(error))
        return None
    return find_embedded_gguf() if name == "embedded" else Path(name)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    out = harness.console()
    if not arguments.no_plot:
        pyplot()
    configs = configs_of(arguments, small=arguments.quick)
    first = next(iter(configs.values()))
    gguf = llama_gguf(first, arguments, out.print)
    result = harness.record("benchmarks.model", first, sys.argv[1:] if argv is None else argv)
    path = harness.result_path(arguments, "model")
    model, builder = harness.load_model(first)
    if not arguments.quick:
        for small in configs_of(arguments, small=True).values():
            harness.warm_up(small, model, builder)
        out.print("warmed up")
    lengths, n_threads = arguments.lengths, result["machine"]["threads"]
    limits = (arguments.dense_limit, arguments.llama_limit)
    for_dense, for_llama = (measurable(lengths, limit) for limit in limits)
    prompts = prompts_of(builder, {*lengths, *for_dense, *for_llama})
    asked = Asked(prompts, arguments.steps, lambda s: out.print(f"  {s}"))
    sides: dict[str, Iterator[Row]] = {
        name: ours(config, model, builder, asked.at(lengths), arguments.grow)
        for name, config in configs.items()
    }
    if not arguments.skip_dense:
        sides[DENSE] = dense(first, asked.at(for_dense))
    if gguf is not None:
        short = asked.at(for_llama)
        sides |= {name: llama(gguf, flash, n_threads, short) for name, flash in WAYS.items()}
    rows: Systems = {}
    result["configs"] = {name: config_dict(config) for name, config in configs.items()}
    result["weights"] = {OURS: "float32", DENSE: "float32", LLAMA: gguf and gguf.name}
    result |= {"grown": arguments.grow, "complete": False, "measured": rows}
    for name, made in sides.items():
        out.print(name)
        try:
            for row in made:
                rows.setdefault(name, []).append(row)
                write_result(path, result)
        except LlamaCppError as error:
            # what the others took hours to measure is not thrown away
            out.print(str(error))
    systems = completed(rows, lengths, grown=arguments.grow)
    compared = ratios(systems)
    write_result(path, result | {"complete": True, "systems": systems, "ratios": compared})
    for name in configs:
        out.print(name, parts_table(rows[name]))
    out.print(rows_table(systems))
    out.print(ratios_table(compared))
    if not arguments.no_plot:
        plot(systems, path.with_suffix(".png"))
    out.print(f"load when it began: {result['machine']['load_1min']}; written to {path}")


if __name__ == "__main__":
    main()
