"""What the benchmarks share: an engine over real stores in this process, and a record of where
and how a number was measured."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from longreach.core.config import Config, config_dict, load_config
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import serve
from longreach.workers.engine import Engine
from longreach.workers.executors import make_executor
from longreach.workers.memory import keep_for_good
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_dir, model_geometry, policies_of, recipe_for
from longreach.workers.prompt import Prompt, PromptBuilder
from longreach.workers.row import RowRequest
from longreach.workers.sampling import Sampling
from longreach.workers.threads import use_threads

from .texts import build_text
from .transport import commit, machine

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "numpy", "numba")
MEASURED = ("core", "kernels", "kvstore", "workers", "configs", "benchmarks/*.py")
"""Paths that shape the numbers: changes there mark the commit as dirty."""
FLUSH_TIMEOUT_S = 60.0
PROGRESS_EVERY_S = 10.0
WARM_UP_TOKENS = 1000

_serial = itertools.count()

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """How a row ended. `prefill` are its counters when the first token came, `begun` when the second did
    (of a row with one token, when that came), `stats` at the end."""

    text: str
    token_ids: list[int]
    prefill: dict[str, float]
    begun: dict[str, float]
    stats: dict[str, float]


class Session:
    """One engine, as a decode worker has it, driven by the calling thread."""

    def __init__(
        self,
        config: Config,
        model: ModelAdapter,
        prompts: PromptBuilder,
        client: PageClient,
        stores: Sequence[StoreService],
        retrievers: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.client = client
        self.stores = stores
        self._model = model
        geometry = model_geometry(config)
        policies = policies_of(config, geometry.n_layers)
        recipe = recipe_for(config).fingerprint()
        executor = make_executor(
            config, model, geometry, policies, recipe, client, retrievers or {}
        )
        self.engine = Engine(config, model, executor, recipe, prompts.tokenizer)

    def ask(
        self, prompts: Sequence[Prompt], max_tokens: int, say: Say, *, ignore_eos: bool = False
    ) -> list[Answer]:
        """Greedy answers of rows submitted together; what they wrote is in the stores on return.

        ignore_eos: decode max_tokens whatever the model says. Raises the error of a row that fails.
        """
        ends = self._model.eos_token_ids
        self._model.eos_token_ids = frozenset() if ignore_eos else ends
        try:
            return self._run(prompts, max_tokens, say)
        finally:
            self._model.eos_token_ids = ends
            if not self.engine.flow.flush(FLUSH_TIMEOUT_S):
                raise TimeoutError(f"pages were not stored within {FLUSH_TIMEOUT_S:.0f} s")

    def store_stats(self) -> Counter[str]:
        """Numbers of all stores together."""
        total: Counter[str] = Counter()
        for store in self.stores:
            total.update({k: v for k, v in store.stats().items() if isinstance(v, int | float)})
        return total

    def _run(self, prompts: Sequence[Prompt], max_tokens: int, say: Say) -> list[Answer]:
        names = [f"row-{next(_serial)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            sampling = Sampling(max_tokens=max_tokens)
            request = RowRequest(name, prompt.token_ids, prompt.n_context_tokens, sampling)
            self.engine.submit(request)
        started_s = spoken_s = time.monotonic()
        prefill: dict[str, dict[str, float]] = {}
        begun: dict[str, dict[str, float]] = {}
        done: dict[str, Answer] = {}
        while self.engine.n_rows:
            for event in self.engine.step():
                if event.error is not None:
                    raise event.error
                if event.kind == "token" and event.payload["index"] == 0:
                    prefill[event.row_id] = self._counters(event.row_id)
                if event.kind == "token" and event.payload["index"] == 1:
                    begun[event.row_id] = self._counters(event.row_id)
                if event.kind == "done":
                    payload = event.payload
                    last = payload["stats"]
                    first = prefill[event.row_id] or last
                    second = begun.get(event.row_id) or first
                    texts = payload["text"], payload["token_ids"]
                    done[event.row_id] = Answer(*texts, first, second, last)
            if time.monotonic() - spoken_s > PROGRESS_EVERY_S:
                spoken_s = time.monotonic()
                say(self._progress(spoken_s - started_s))
            if not self.engine.can_progress:
                time.sleep(0.002)
        return [done[name] for name in names]

    def _counters(self, row_id: str) -> dict[str, float]:
        """Counters of a running row; empty if it ended in this very step."""
        for row in self.engine.rows:
            if row.row_id == row_id:
                return dict(row.stats.to_dict())
        return {}

    def _progress(self, elapsed_s: float) -> str:
        rows = self.engine.rows
        n_prefilled = sum(row.stats.tokens_prefilled for row in rows)
        total = max((row.n_prompt for row in rows), default=0)
        n_decoded = sum(len(row.tokens) for row in rows)
        return f"{n_prefilled} of {total} tokens read, {n_decoded} answered, {elapsed_s:.0f} s"


@contextlib.contextmanager
def open_session(config: Config, model: ModelAdapter, prompts: PromptBuilder) -> Iterator[Session]:
    """An engine whose pages go to stores of this process; arenas are gone afterwards."""
    geometry = model_geometry(config)
    gc.collect()  # the session before this one is garbage in cycles, with its arenas
    with contextlib.ExitStack() as stack:
        addresses = {}
        stores = []
        for i in range(config.store.count):
            store = config.store
            name = f"store-{i}"
            service = StoreService(
                name, "bench", store.arena_dir, geometry, store.capacity_bytes, config=store
            )
            stores.append(service)
            stack.callback(service.close)
            server = serve(service, f"mem://bench-{next(_serial)}-{name}")
            stack.callback(server.stop)
            addresses[name] = server.address
        client = PageClient(
            addresses,
            geometry,
            recipe_for(config).fingerprint(),
            replicas=config.store.replicas,
            lease_s=config.store.lease_s,
            timeout_s=config.store.timeout_s,
            node_id="bench",
            owner="bench",
        )
        stack.callback(client.close)
        yield Session(config, model, prompts, client, stores)


def load_model(config: Config) -> tuple[ModelAdapter, PromptBuilder]:
    use_threads(config.model.n_threads)
    loaded = ModelAdapter(model_dir(config.model)), PromptBuilder(config)
    keep_for_good()  # as a decode worker does
    return loaded


def scaled_down(config: Config) -> list[str]:
    """`--set` assignments that shrink a preset so that 1,000 tokens are pruned as 12,000 are."""
    sets = []
    for i, policy in enumerate(config.attention.policies):
        path = f"attention.policies.{i}"
        sets += [f"{path}.sink={policy.sink // 4}", f"{path}.window={policy.window // 8}"]
        for j, stage in enumerate(policy.stages):
            sets.append(f"{path}.stages.{j}.chunk={max(8, stage.chunk // 4)}")
            sets.append(f"{path}.stages.{j}.keep={stage.keep // 16}")
    return sets


def warm_up(small: Config, model: ModelAdapter, prompts: PromptBuilder) -> None:
    """Compile and load every kernel before anything is timed. small: see `scaled_down`."""
    text = build_text(prompts.count, 999, WARM_UP_TOKENS)
    with open_session(small, model, prompts) as session:
        session.ask([prompts.build(text, "What is this text about?")], 16, lambda _: None)


# --- the command line and the record --------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", default=str(ROOT / "configs" / "dev.yaml"))
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument(
        "--quick", action="store_true", help="a trial: short texts, preset scaled down"
    )
    made.add_argument("--skip-dense", action="store_true", help="without Hugging Face dense")
    made.add_argument("--tokens", type=int, help="length of the texts")
    made.add_argument("--out", type=Path, help="default: benchmarks/results; quick runs: out/")
    return made


def config_of(arguments: argparse.Namespace, *, small: bool) -> Config:
    config = load_config([arguments.config], arguments.set)
    if small:
        config = load_config([arguments.config], [*arguments.set, *scaled_down(config)])
    return config


def result_path(arguments: argparse.Namespace, name: str) -> Path:
    """Quick runs never overwrite what a real run measured."""
    if arguments.out is not None:
        return Path(arguments.out)
    if arguments.quick:
        return ROOT / "out" / f"{name}-quick.json"
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def record(module: str, config: Config, argv: Sequence[str]) -> dict[str, Any]:
    """Commit, machine and command of this run. Call it first: it notes the load at the start."""
    import torch

    return {
        "commit": commit(MEASURED),
        "machine": {
            **machine(),
            "cores_allowed": len(os.sched_getaffinity(0)),
            "memory_gib": round(
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
            ),
            "threads": config.model.n_threads or len(os.sched_getaffinity(0)),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "command": ["python", "-m", module, *argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": _without_folders(config_dict(config)),
    }


def _without_folders(tree: dict[str, Any]) -> dict[str, Any]:
    """Of files that a run made for itself, the names: where they lay says nothing to a reader."""
    for section, field in (("model", "name"), ("gateway", "state_dir"), ("store", "disk_dir")):
        if tree[section][field] is not None:
            tree[section][field] = Path(tree[section][field]).name
    return tree


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file at once, so that a run cut short leaves its last complete record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


@contextlib.contextmanager
def no_log() -> Iterator[None]:
    """Without the parts' log, which has a line per fault where faults are meant. Also a decorator."""
    logger = logging.getLogger("longreach")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def pyplot() -> Any | None:
    """matplotlib's, drawing into files; None where it is not installed."""
    try:
        from matplotlib import pyplot as made
    except ModuleNotFoundError:
        return None
    made.switch_backend("Agg")
    return made


def console() -> Console:
    """A terminal as it is; a file or a pipe gets room for the tables."""
    made = Console(highlight=False, markup=False)
    return made if made.is_terminal else Console(width=130, highlight=False, markup=False)


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process: all of it, its own, and what is mapped from the arenas."""
    names = {"VmRSS": "all", "VmHWM": "peak", "RssAnon": "own", "RssShmem": "arenas"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        field, _, value = line.partition(":")
        if field in names:
            found[names[field]] = int(value.split()[0]) << 10
    return found


def reset_peak() -> None:
    """Begin a new peak; without the right to, the peak of the whole process stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
