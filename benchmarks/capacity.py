"""A context larger than what is given to memory: held by one store with a disk tier, decoded over.

    python -m benchmarks.capacity [--quick] [--tokens 1048576] [--beside 262144] [--arena-gib 4] [--cold]

Two contexts of the embedded model's shape, one after the other in stores of their own: one that the arena
holds as a whole, and one of which most pages are on disk. Their KV is synthetic at the engine's interface:
pages of a real text, read once, are repeated with other scales in every piece, so that each page has
bytes, checksums and a name of its own and keys look like a model's. The engine then opens the context as
any other (look-up, leases, every byte checked, summaries made) and decodes.

Printed: time per decode step and its ratio, hits of the bank, bytes read from the disk by this process,
bytes by tier beside what `longreach plan` predicts. --cold: the disk file is dropped from the system's cache
before the steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from longreach.cluster.plan import Rates, RowSize, plan_rows
from longreach.core.config import Config
from longreach.core.page_key import ROOT_KEY, PageKey, prompt_keys
from longreach.kvstore.page import Bytes, PageGeometry
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_geometry, recipe_for
from longreach.workers.prompt import Prompt, PromptBuilder

from .harness import (
    ROOT,
    Say,
    Session,
    config_of,
    console,
    load_model,
    open_session,
    parser,
    record,
    resident_bytes,
    result_path,
    warm_up,
    write_result,
)
from .model import moments
from .texts import build_text

TOKENS, BESIDE_TOKENS = 1 << 20, 1 << 18
QUICK_TOKENS, QUICK_BESIDE_TOKENS = 4096, 1024
TEXT_TOKENS, QUICK_TEXT_TOKENS = 4096, 512
STEPS, QUICK_STEPS = 64, 8
QUESTION_TOKENS = 64
SEED = 950
STORE_WAIT_S = 600.0
WANTED_RATIO, WANTED_ERROR = 2.0, 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """What a run is asked to hold, and in what."""

    name: str
    n_tokens: int
    arena_bytes: int
    disk_bytes: int


# --- the context ----------------------------------------------------------------------------------


def pages_of_text(
    config: Config, model: ModelAdapter, builder: PromptBuilder, n_tokens: int, say: Say
) -> Bytes:
    """Pages that the model makes of a real text, uint8 [n_pages, page_nbytes]."""
    prompt = builder.build(build_text(builder.count, SEED, n_tokens), "What is this text about?")
    with open_session(config, model, builder) as session:
        session.ask([prompt], 1, say)
        keys = keys_of(config, prompt)
        handles = session.client.acquire(keys, "text")
        pages = [session.client.page_bytes(h).copy() for h in handles if h is not None]
    if len(pages) < len(keys):
        raise RuntimeError(f"{len(keys) - len(pages)} of {len(keys)} pages did not come back")
    return np.stack(pages)


def keys_of(config: Config, prompt: Prompt) -> list[PageKey]:
    attention = config.attention
    question = attention.question_start(len(prompt.token_ids), prompt.n_context_tokens)
    recipe = recipe_for(config).fingerprint()
    block = attention.question_block
    return prompt_keys(prompt.token_ids, question, block, recipe, config.cache.page_tokens)


def scaled(page: Bytes, geometry: PageGeometry, factors: np.ndarray) -> Bytes:
    """A copy whose leaves are multiplied by one factor each: only the scales of its rows change.

    factors: float32 [n_leaves]. The KV format is one whose rows end with a float32 scale.
    """
    made = page.copy()
    rows = made.reshape(geometry.n_leaves, 2 * geometry.page_tokens, geometry.row_nbytes)
    scales = np.ascontiguousarray(rows[..., -4:]).view(np.float32)
    rows[..., -4:] = (scales * factors[:, None, None]).view(np.uint8)
    return made


def store_context(session: Session, prompt: Prompt, pages: Bytes, say: Say) -> float:
    """Every full page of the prompt into the store; seconds it took."""
    client, rng = session.client, np.random.default_rng(SEED)
    keys = keys_of(session.config, prompt)
    started_s = spoken_s = time.monotonic()
    parent, futures = ROOT_KEY, []
    for i, key in enumerate(keys):
        factors = rng.uniform(0.8, 1.25, client.geometry.n_leaves).astype(np.float32)
        page = scaled(pages[i % len(pages)], client.geometry, factors)
        futures.append(client.store(key, parent, page, f"writer-{i // 1024}"))
        parent = key
        if time.monotonic() - spoken_s > 10:
            spoken_s = time.monotonic()
            say(f"{i} of {len(keys)} pages stored, {spoken_s - started_s:.0f} s")
    for future in futures:
        future.result(STORE_WAIT_S)
    for i in range(0, len(keys), 1024):
        client.release(f"writer-{i // 1024}")
    return time.monotonic() - started_s


# --- one run --------------------------------------------------------------------------------------


def settings(base: Config, held: Held, disk_dir: Path) -> Config:
    tiers = {"count": 1, "replicas": 1, "capacity_bytes": held.arena_bytes}
    if held.disk_bytes:
        tiers |= {"disk_dir": str(disk_dir), "disk_bytes": held.disk_bytes}
    limit = max(held.n_tokens + 4096, base.model.max_context_tokens)
    return base.model_copy(
        update={
            "store": base.store.model_copy(update=tiers),
            "model": base.model.model_copy(update={"max_context_tokens": limit}),
        }
    )


def disk_reads() -> int:
    """Bytes that this process has had read from block devices."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def forget_cached(directory: Path) -> None:
    """The system drops what it caches of these files."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def predicted(config: Config, prompt: Prompt, n_steps: int) -> dict[str, int]:
    """What `longreach plan` says that the tiers will hold."""
    size = RowSize(
        "context",
        len(prompt.token_ids),
        prompt.n_context_tokens,
        n_steps,
        tuple(keys_of(config, prompt)),
    )
    plan = plan_rows([size], config, model_geometry(config), Rates(1.0, 1.0))
    if plan.refused:
        raise plan.refused[0][1]
    return {"arena": plan.arena_bytes, "disk": plan.disk_bytes}


def run(
    config: Config,
    held: Held,
    model: ModelAdapter,
    builder: PromptBuilder,
    pages: Bytes,
    n_steps: int,
    before_steps: Callable[[], None],
    say: Say,
) -> Row:
    rng = np.random.default_rng(SEED)
    n_text = held.n_tokens - QUESTION_TOKENS
    tokens = rng.integers(0, model.vocab_size, held.n_tokens).astype(np.uint32)
    prompt = Prompt(tokens, n_text)
    expected = predicted(config, prompt, n_steps)
    with open_session(config, model, builder) as session:
        say(f"{held.name}: {held.n_tokens:,} tokens")
        store_s = store_context(session, prompt, pages, say)
        found = session.store_stats()
        reads = _before_first_step(session.engine, before_steps)
        with moments(session.engine, "_decode") as seen:
            answer = session.ask([prompt], n_steps + 1, say, ignore_eos=True)[0]
        steps = sorted(b - a for a, b in itertools.pairwise(seen))
        later = {name: answer.stats[name] - answer.begun[name] for name in answer.stats}
        touched = later["bank_hits"] + later["bank_misses"]
        return {
            "name": held.name,
            "tokens": held.n_tokens,
            "arena_bytes_limit": held.arena_bytes,
            "disk_bytes_limit": held.disk_bytes,
            "store_s": round(store_s, 1),
            "open_s": round(answer.stats["ttft_s"], 2),
            "tokens_prefilled": int(answer.stats["tokens_prefilled"]),
            "step_ms": {
                "median": 1e3 * statistics.median(steps),
                "max": 1e3 * steps[-1],
                "n": len(steps),
            },
            "bank_hit_ratio": later["bank_hits"] / touched if touched else 1.0,
            "disk_read_bytes": disk_reads() - reads[0],
            "tiers": {
                tier: {"predicted": expected[tier], "held": int(found[f"{tier}_bytes"])}
                for tier in ("arena", "disk")
            },
            "memory": resident_bytes(),
        }


def _before_first_step(engine: Any, act: Callable[[], None]) -> list[int]:
    """Does it when the context is open and its summaries are made; then notes what was read until then."""
    decode, reads = engine._decode, []

    def prepared(rows: Any) -> None:
        if not reads:
            act()
            reads.append(disk_reads())
        decode(rows)

    engine._decode = prepared
    return reads


def verdict(rows: Sequence[Row]) -> Row:
    beside, large = rows
    errors = [
        abs(t["held"] - t["predicted"]) / max(t["predicted"], 1)
        for row in rows
        for t in row["tiers"].values()
        if t["predicted"] or t["held"]
    ]
    return {
        "step_ratio": large["step_ms"]["median"] / beside["step_ms"]["median"],
        "step_ratio_wanted": WANTED_RATIO,
        "worst_prediction_error": max(errors),
        "prediction_error_wanted": WANTED_ERROR,
    }


# --- the command line -----------------------------------------------------------------------------


def show(rows: Sequence[Row], end: Row) -> None:
    out = console()
    columns = (
        "context",
        "tokens",
        "ms a step",
        "largest",
        "bank hits",
        "read from disk",
        "opened in",
    )
    table = Table(*columns, title="Decode over a context by where its pages are")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['tokens']:,}",
            f"{row['step_ms']['median']:.1f}",
            f"{row['step_ms']['max']:.1f}",
            f"{row['bank_hit_ratio']:.3f}",
            f"{row['disk_read_bytes'] / 1e6:.0f} MB",
            f"{row['open_s']:.1f} s",
        )
    out.print(table)
    tiers = Table("context", "tier", "predicted", "held", title="Bytes by tier")
    for row in rows:
        for name, tier in row["tiers"].items():
            sizes = (f"{tier[k] / 2**30:.3f} GiB" for k in ("predicted", "held"))
            tiers.add_row(row["name"], name, *sizes)
    out.print(tiers)
    out.print(
        f"a step takes {end['step_ratio']:.2f} times as long (at most {WANTED_RATIO} wanted); "
        f"bytes differ from the plan by {end['worst_prediction_error']:.1%} at most"
    )


def main(argv: Sequence[str] | None = None) -> None:
    made: argparse.ArgumentParser = parser(__doc__)
    made.add_argument("--beside", type=int, help="tokens of the context that the arena holds")
    made.add_argument("--arena-gib", type=float, default=4.0)
    made.add_argument("--steps", type=int)
    made.add_argument("--disk-dir", type=Path, help="default: a directory in the checkout's out/")
    made.add_argument("--cold", action="store_true")
    arguments = made.parse_args(argv)
    quick = arguments.quick
    if not any("cache.kv_dtype" in s for s in arguments.set):
        arguments.set.append("cache.kv_dtype=int8")
    config = config_of(arguments, small=quick)
    if config.cache.kv_dtype not in ("int8", "int4"):
        made.error(f"cache.kv_dtype {config.cache.kv_dtype}: only int8 and int4 rows have a scale")
    result = record("benchmarks.capacity", config, sys.argv[1:] if argv is None else argv)
    model, builder = load_model(config)
    page_nbytes = model_geometry(config).page_nbytes
    n_steps = arguments.steps or (QUICK_STEPS if quick else STEPS)
    large = arguments.tokens or (QUICK_TOKENS if quick else TOKENS)
    beside = arguments.beside or (QUICK_BESIDE_TOKENS if quick else BESIDE_TOKENS)
    spare = n_steps // config.cache.page_tokens + 3
    n_beside, n_large = (n // config.cache.page_tokens + spare for n in (beside, large))
    arena_bytes = n_beside * page_nbytes if quick else int(arguments.arena_gib * 2**30)
    out = console()
    parent = arguments.disk_dir or ROOT / "out"
    parent.mkdir(parents=True, exist_ok=True)
    if not quick:
        warm_up(config_of(arguments, small=True), model, builder)
    n_text = QUICK_TEXT_TOKENS if quick else TEXT_TOKENS
    pages = pages_of_text(config, model, builder, n_text, out.print)
    contexts = (
        Held("in the arena", beside, max(arena_bytes, n_beside * page_nbytes), 0),
        Held("arena and disk", large, arena_bytes, n_large * page_nbytes),
    )
    rows = []
    for held in contexts:
        with tempfile.TemporaryDirectory(prefix="capacity-", dir=parent) as directory:
            disk_dir = Path(directory)
            cold = arguments.cold and held.disk_bytes > 0

            def before_steps(disk_dir: Path = disk_dir, cold: bool = cold) -> None:
                if cold:
                    forget_cached(disk_dir)

            own = settings(config, held, disk_dir)
            rows.append(run(own, held, model, builder, pages, n_steps, before_steps, out.print))
    end = verdict(rows)
    show(rows, end)
    path = result_path(arguments, "capacity")
    write_result(path, result | {"cold": arguments.cold, "rows": rows, "verdict": end})
    out.print(f"written to {path}")


if __name__ == "__main__":
    main()
