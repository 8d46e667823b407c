"""Attention kernels per layer, decode and prefill, from 32K to 3M tokens, beside dense attention.

    python -m benchmarks.attention [--quick] [--geometry llama-8b] [--policy 3k --policy summaries]

Keys, values and queries are random; every timed step has other pages than the step before. Dense
attention in the same run: our own kernel over every key, and torch's SDPA with the heads of a KV
group folded into the query axis. KV that exceeds --max-gib is folded: several logical pages share a
physical one. Times are of one layer; compare them within one run only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreach.core.config import load_config
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import ops
from longreach.kernels.ops import PagedKV
from longreach.workers.threads import use_threads

from . import plots
from .attention_parts import (
    DENSE,
    GEOMETRIES,
    PAGE_TOKENS,
    Arena,
    Attention,
    Geometry,
    Row,
    Step,
    amortised_bytes,
    amortised_us,
    attend_dense,
    attended_keys,
    counted_bytes,
    formula_bytes,
    is_folded,
    laps,
    make_steps,
    make_views,
    ready_summaries,
    repeated,
    summary_us,
    unrefreshed,
)
from .harness import ROOT, Say, console, record, result_path, write_result

PRESETS = {
    "3k": "infinitehip-3k",
    "5k": "infinitehip-5k",
    "fast": "infinitehip-3k-fast",
    "flash": "infinitehip-3k-flash",
}
POLICIES = ("3k", "5k", "flash", "summaries")
SUMMARIES = LayerPolicy(
    stages=(
        Stage(scorer="mean", chunk=256, keep=32768, refresh=16),
        Stage(scorer="bounds", chunk=8, keep=2048, refresh=4),
    )
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FAR_BYTES = 128 << 20
"""What the steps of a rotation touch together: several times a large last-level cache."""
SDPA_PREFILL_TOKENS = 128 << 10


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    contexts: str
    budget_s: float
    """Of one measurement, after `least` steps."""
    least: int
    n_views: int
    """Page tables, which stand for layers: the sinks of a step are not those of the step before."""
    pool_bytes: int
    """Least memory that the pages of a short context are spread over."""
    rate_tokens: int
    """Keys per step where rates are measured."""


FULL = Scale("32K,64K,128K,256K,512K,1M,3M", 10.0, 8, 16, 512 << 20, 16 << 10)
QUICK = Scale("4K,8K", 0.1, 3, 4, 32 << 20, 1 << 10)


def tokens_of(text: str) -> int:
    """`32K`, `1M` or a plain number; K and M are binary."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1].upper(), 1)
    return int(text[:-1] if unit > 1 else text) * unit


def policy_of(name: str) -> LayerPolicy:
    """`summaries`, or how a preset treats the layers that are not special."""
    if name == "summaries":
        return SUMMARIES
    path = ROOT / "configs" / f"{PRESETS.get(name, name)}.yaml"
    policies = load_config([str(path)], []).attention.policies
    return next(policy for policy in policies if policy.layers in ("rest", "all"))


def measure_sparse(
    geometry: Geometry, steps: Sequence[Step], policy: LayerPolicy, summaries: Any, scale: Scale
) -> Row:
    """Selections by the first stage that is recomputed (prefill recomputes all), then the parts of a
    step with a known mask; each of them over steps whose pages differ."""
    attention = Attention(geometry, policy, summaries)
    decode = steps[0].q.shape[1] == 1
    least = scale.least if decode else 2
    every = [(step,) for step in steps]
    selections, seconds = laps(attention.select, every, scale.budget_s, least)
    known = list(zip(steps, selections, strict=False))
    times = {"select_0": seconds}
    for level in range(1, len(policy.stages) if decode else 0):
        at = [(*pair, level) for pair in known]
        times[f"select_{level}"] = laps(attention.select, at, scale.budget_s)[1]
    rounds = 3 if decode else 1
    found = [took for _ in range(rounds) for took in laps(attention.parts, known)[0]]
    times |= {part: [took[part] for took in found] for part in found[0]}
    if hasattr(ops, "attend_block"):
        times["step"] = repeated(attention.whole, known, rounds)
    step, selection = known[0]
    segments = attention.plan(step, selection)
    return {
        "parts": {part: summary_us(seconds) for part, seconds in times.items()},
        "segments": len(segments),
        "selections": len(selections),
        "distinct_selections": len({s.blocks.numpy().tobytes() for s in selections}),
        "counted": counted_bytes(policy, geometry, step, selection, segments, summaries),
    }


def decode_row(row: Row, policy: LayerPolicy, geometry: Geometry, item_bytes: int) -> Row:
    """What follows from the parts: a step on average and at its dearest, bytes beside formulas."""
    parts, moved = row["parts"], row["counted"]
    made: Row = {"amortised": {}, "with_full_refresh": {}}
    for which in ("best_us", "median_us"):
        made["amortised"][which] = amortised_us(parts, policy, which)
        whole = parts["select_0"][which] + parts["step"][which]
        made["with_full_refresh"][which] = round(whole, 1)
    made["counted"] = moved | {"amortised": amortised_bytes(moved, policy)}
    for which in ("least", "most"):
        formula = formula_bytes(policy, geometry, row["tokens"], item_bytes, most=which == "most")
        formula["amortised"] = amortised_bytes(formula, policy)
        made[f"formula_{which}"] = formula
        made[f"counted_of_formula_{which}"] = round(
            made["counted"]["amortised"] / formula["amortised"], 3
        )
    made["attend_gb_per_s"] = round(moved["attend"] / parts["attend"]["median_us"] / 1e3, 2)
    return made


def prefill_row(row: Row) -> Row:
    block_us = row["parts"]["select_0"]["median_us"] + row["parts"]["step"]["median_us"]
    return {"block_us": round(block_us, 1), "tokens_per_s": round(64e6 / block_us, 1)}


def measure_sdpa(
    geometry: Geometry, flat: Tensor, n_tokens: int, n_queries: int, scale: Scale
) -> Row:
    """torch's SDPA over contiguous keys and values, other ones each time. Where fewer tokens fit, its
    time is scaled: it is linear in them."""
    per_token = geometry.row_bytes(1) * 2
    n_measured = min(n_tokens, len(flat) // per_token)
    n_regions = min(scale.least, len(flat) // (n_measured * per_token))
    shape = (2, 1, geometry.n_kv_heads, n_measured, geometry.head_dim)
    regions = [part.view(shape) for part in flat.split(n_measured * per_token)[:n_regions]]
    q = torch.randn(1, geometry.n_kv_heads, geometry.group * n_queries, geometry.head_dim)
    q = q.to(flat.dtype)

    def attend(kv: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, kv[0], kv[1])

    items = [(kv,) for kv in regions] * -(-scale.least // n_regions)
    times = laps(attend, items, scale.budget_s, 2)[1]
    grown = n_tokens / n_measured
    return {**summary_us([s * grown for s in times]), "tokens_measured": n_measured}


def measure_rates(geometry: Geometry, flat: Tensor, scale: Scale, n_threads: int) -> Iterator[Row]:
    """GB/s of attention alone, rotation at load included: every block of adjacent pages, and some blocks
    of 8 tokens all over shuffled pages; then of torch's sum over as many bytes, which shows what the
    machine's memory gives. Leaves n_threads as it was."""
    n_tokens, n_steps = scale.rate_tokens, scale.least
    for order, chunk, length in (("in order", 64, n_tokens), ("random", 8, 8 * n_tokens)):
        stages = (Stage(chunk=chunk, keep=n_tokens),)
        policy = LayerPolicy(stages=stages, sink=0, window=64)
        attention = Attention(geometry, policy)
        views = make_views(geometry, flat, length, n_steps, in_order=order == "in order")
        steps = make_steps(geometry, views, 1, n_steps)
        planned = [(step, attention.plan(step, attention.select(step))) for step in steps]
        n_bytes = attended_keys(policy, geometry, *planned[0])
        n_bytes *= 2 * geometry.head_dim * flat.dtype.itemsize
        yield from _rates(order, attention.attend, planned, n_bytes, n_threads)
    floats = flat.view(torch.float32)
    pieces = [(piece,) for piece in floats.split(n_bytes // 4)[: scale.least]]
    yield from _rates("plain read", torch.sum, pieces, n_bytes, n_threads)


def _rates(
    order: str, call: Callable[..., Any], items: Sequence[Any], n_bytes: int, n_threads: int
) -> Iterator[Row]:
    """A row by one thread and one by all; each call reads n_bytes."""
    for n in sorted({1, n_threads}):
        use_threads(n)
        times = repeated(call, items, 3)
        use_threads(n_threads)
        took = summary_us(times)
        rate = {of: round(n_bytes / took[f"{of}_us"] / 1e3, 2) for of in ("best", "median")}
        yield {"order": order, "threads": n, "bytes": n_bytes, **took, "gb_per_s": rate}


class Bench:
    """One run. What is measured is written before the next measurement starts."""

    def __init__(self, arguments: argparse.Namespace, result: Row, path: Path, say: Say) -> None:
        self._arguments = arguments
        self._dtype = DTYPES[arguments.dtype]
        self._policies = {name: policy_of(name) for name in arguments.policy}
        self._result, self._path, self._say = result, path, say
        self._scale = QUICK if arguments.quick else FULL
        for kind in ("decode", "prefill", "dense", "rates"):
            result[kind] = []

    def run(self, geometry: Geometry, contexts: Sequence[int]) -> None:
        most = max(contexts) * 2 * geometry.row_bytes(self._dtype.itemsize)
        arena = Arena(min(int(self._arguments.max_gib * 2**30), max(most, self._scale.pool_bytes)))
        for n_tokens in contexts:
            self._say(f"{geometry.name}, {n_tokens:,} tokens")
            self._context(geometry, arena, n_tokens)
        if geometry.group == 4:
            flat = arena.filled(self._dtype, self._scale.pool_bytes)
            for row in measure_rates(geometry, flat, self._scale, self._result["threads"]):
                self._keep("rates", geometry, row)

    def _keep(self, kind: str, geometry: Geometry, row: Row) -> None:
        self._result[kind].append({"geometry": geometry.name, **row})
        write_result(self._path, self._result)

    def _keep_dense(self, geometry: Geometry, dtype: torch.dtype, at: Row, timed: Row) -> None:
        n_bytes = 2 * at["tokens"] * geometry.row_bytes(dtype.itemsize)
        rate = {"gb_per_s": round(n_bytes / timed["median_us"] / 1e3, 2)}
        self._keep("dense", geometry, {**at, **timed, **rate})

    def _context(self, geometry: Geometry, arena: Arena, n_tokens: int) -> None:
        n_bytes = n_tokens * 2 * geometry.row_bytes(self._dtype.itemsize)
        flat = arena.filled(self._dtype, max(self._scale.pool_bytes, n_bytes))
        views = make_views(geometry, flat, n_tokens, self._scale.n_views)
        at = {"tokens": n_tokens, "folded": is_folded(views[0])}
        if not self._arguments.skip_dense:
            dense = Attention(geometry, DENSE)
            steps = make_steps(geometry, views, 1, self._scale.least)
            items = [(dense, step) for step in steps]
            times = laps(attend_dense, items, self._scale.budget_s, 2)[1]
            self._keep_dense(
                geometry, self._dtype, {**at, "system": "own dense"}, summary_us(times)
            )
        self._sparse(geometry, views, at)
        for dtype in () if self._arguments.skip_dense else (torch.bfloat16, torch.float32):
            n_bytes = n_tokens * 2 * geometry.row_bytes(dtype.itemsize)
            flat = arena.filled(dtype, max(self._scale.pool_bytes, n_bytes))
            row = {"tokens": n_tokens, "system": f"SDPA {str(dtype).removeprefix('torch.')}"}
            for n_queries in (1, 64):
                if n_queries == 1 or (dtype == torch.float32 and n_tokens <= SDPA_PREFILL_TOKENS):
                    timed = measure_sdpa(geometry, flat, n_tokens, n_queries, self._scale)
                    self._keep_dense(geometry, dtype, {**row, "n_queries": n_queries}, timed)

    def _sparse(self, geometry: Geometry, views: Sequence[PagedKV], at: Row) -> None:
        measured: dict[LayerPolicy, dict[str, Row]] = {}
        for name, policy in self._policies.items():
            # presets that differ in their intervals alone share one measurement
            shape = unrefreshed(policy)
            if shape not in measured:
                measured[shape] = self._measure(geometry, views, shape)
            for kind, found in measured[shape].items():
                row = {**at, "policy": name, **found}
                if kind == "decode":
                    row |= decode_row(row, policy, geometry, self._dtype.itemsize)
                else:
                    row |= prefill_row(row)
                self._keep(kind, geometry, row)

    def _measure(
        self, geometry: Geometry, views: Sequence[PagedKV], policy: LayerPolicy
    ) -> dict[str, Row]:
        moved = formula_bytes(policy, geometry, views[0].n_tokens, self._dtype.itemsize)
        summaries, made = ready_summaries(views[0], policy)
        found = {}
        for kind, n_queries in (("decode", 1), ("prefill", 64)):
            n_steps = self._scale.least
            if kind == "decode" and not self._arguments.quick:
                n_steps = max(2 * n_steps, FAR_BYTES // moved["attend"])
            steps = make_steps(geometry, views, n_queries, n_steps)
            found[kind] = made | measure_sparse(geometry, steps, policy, summaries, self._scale)
        return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help=f"a trial: {QUICK.contexts} tokens")
    made.add_argument("--contexts", help=f"like 32K,1M; default: {FULL.contexts}")
    made.add_argument("--geometry", action="append", choices=GEOMETRIES, help="default: all")
    made.add_argument(
        "--policy", action="append", help=f"or a preset's name; default: {', '.join(POLICIES)}"
    )
    made.add_argument("--dtype", choices=DTYPES, default="float16", help="of keys and values")
    made.add_argument("--threads", type=int, default=0, help="0: all cores")
    made.add_argument("--max-gib", type=float, default=14.0, help="memory of keys and values")
    made.add_argument("--skip-dense", action="store_true", help="without dense attention")
    made.add_argument("--out", type=Path, help="default: benchmarks/results; quick runs: out/")
    arguments = made.parse_args(argv)
    arguments.contexts = arguments.contexts or (QUICK if arguments.quick else FULL).contexts
    arguments.geometry = arguments.geometry or list(GEOMETRIES)
    arguments.policy = arguments.policy or list(POLICIES)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    out = console()
    n_threads = arguments.threads or len(os.sched_getaffinity(0))
    config = load_config([], [f"model.n_threads={n_threads}"])
    result = record("benchmarks.attention", config, sys.argv[1:] if argv is None else argv)
    del result["config"]  # an engine's; here the policies are all there is
    result |= {
        "threads": use_threads(n_threads),
        "dtype": arguments.dtype,
        "page_tokens": PAGE_TOKENS,
        "policies": {name: policy_of(name).model_dump() for name in arguments.policy},
        "complete": False,
    }
    path = result_path(arguments, "attention")
    bench = Bench(arguments, result, path, lambda s: out.print(f"  {s}"))
    torch.manual_seed(0)
    for name in arguments.geometry:
        bench.run(GEOMETRIES[name], [tokens_of(text) for text in arguments.contexts.split(",")])
    result |= {"complete": True, "checks": plots.checks(result)}
    write_result(path, result)
    for table in plots.tables(result):
        out.print(table)
    png = plots.draw(result, path.with_suffix(".png"))
    out.print(f"written to {path}" + (f" and {png.name}" if png else "; no plot: no matplotlib"))


if __name__ == "__main__":
    main()
