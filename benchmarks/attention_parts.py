"""What `benchmarks.attention` measures with: KV of one layer in a bounded arena, steps that never meet
the pages of the step before, the kernels' calls, and the bytes of a step, by formula and as counted."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy
from longreach.kernels import ops
from longreach.kernels.ops import PagedKV, Rope, Segments, Selection
from longreach.kernels.summaries import table_of
from longreach.workers.memory import huge_zeros

PAGE_TOKENS = 64
DENSE = LayerPolicy(attend_rope="none", sink=0, window=0)
PASS_SEGMENTS = 256
TILE_BYTES = 64 << 20

Made = TypeVar("Made")
Row = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Heads of one layer of a model."""

    name: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def rope(self) -> Rope:
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        return Rope(1 / self.rope_theta**exponents)

    def row_bytes(self, item_bytes: int) -> int:
        """Bytes of one key, all KV heads."""
        return self.n_kv_heads * self.head_dim * item_bytes


GEOMETRIES = {
    "smollm2": Geometry("SmolLM2-135M", 9, 3, 64, 100_000),
    "llama-8b": Geometry("Llama-3.1-8B", 32, 8, 128, 500_000),
}


# --- memory ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _tile(dtype: torch.dtype, n_bytes: int) -> Tensor:
    made = torch.empty(n_bytes // dtype.itemsize, dtype=dtype)
    for piece in made.split(1 << 20):
        piece.copy_(torch.randn(len(piece)))
    return made


class Arena:
    """Memory for one layer's K and V, used again for every context and system."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes // 1024 * 1024
        self._flat = huge_zeros((self.n_bytes,), torch.uint8)
        self._filled: tuple[torch.dtype | None, int] = (None, 0)

    def filled(self, dtype: torch.dtype, n_bytes: int) -> Tensor:
        """At least the first n_bytes (as far as there are as many), flat: normal values, repeated
        after 64 MiB at another offset each time, because drawing 12 GB takes minutes."""
        n_bytes = min(self.n_bytes, -(-n_bytes // 1024) * 1024)
        if self._filled[0] != dtype or self._filled[1] < n_bytes:
            tile = _tile(dtype, min(TILE_BYTES, self.n_bytes))
            pieces = self._flat[:n_bytes].view(dtype).split(len(tile))
            for i, piece in enumerate(pieces):
                shift = i * 7919 * PAGE_TOKENS % len(tile)
                head = min(len(piece), len(tile) - shift)
                piece[:head] = tile[shift : shift + head]
                piece[head:] = tile[: len(piece) - head]
            self._filled = (dtype, n_bytes)
        return self._flat[:n_bytes].view(dtype)


@dataclass(frozen=True)
class Step:
    """One query, or one block of queries, of one layer."""

    q: Tensor
    q_start: int
    view: PagedKV


def make_views(
    geometry: Geometry, flat: Tensor, n_tokens: int, n_views: int, *, in_order: bool = False
) -> list[PagedKV]:
    """Page tables over one memory, each with an order of its own; the heads of a page lie together.

    in_order: logical pages are adjacent, each view begins elsewhere. Where the memory has fewer
    pages than the context, the table goes through it again in another order (`is_folded`).
    """
    per_leaf = 2 * PAGE_TOKENS * geometry.head_dim
    n_physical = len(flat) // (per_leaf * geometry.n_kv_heads)
    n_leaves = n_physical * geometry.n_kv_heads
    memory = flat[: n_leaves * per_leaf].view(n_leaves, 2, PAGE_TOKENS, geometry.head_dim)
    n_pages = -(-n_tokens // PAGE_TOKENS)
    views = []
    for i in range(n_views):
        if in_order:
            pages = (torch.arange(n_pages) + i * n_pages) % n_physical
        else:
            n_rounds = -(-n_pages // n_physical)
            pages = torch.cat([torch.randperm(n_physical) for _ in range(n_rounds)])[:n_pages]
        row = pages * geometry.n_kv_heads + torch.arange(geometry.n_kv_heads)[:, None]
        views.append(PagedKV((memory,), torch.zeros_like(row), row, PAGE_TOKENS, n_tokens))
    return views


def is_folded(view: PagedKV) -> bool:
    """Whether several logical pages share a physical one."""
    return bool(view.row.numel() > view.memories[0].shape[0])


def make_steps(
    geometry: Geometry, views: Sequence[PagedKV], n_queries: int, n_steps: int
) -> list[Step]:
    """Steps at the end of the context: other views in turn, then other positions."""
    back = 64 if n_queries > 1 else 65
    return [
        Step(
            torch.randn(geometry.n_heads, n_queries, geometry.head_dim),
            views[0].n_tokens - n_queries - i // len(views) * back,
            views[i % len(views)],
        )
        for i in range(n_steps)
    ]


# --- the kernels' calls ----------------------------------------------------------------------------


class Attention:
    """The kernels' calls for one geometry and policy. summaries: see `ready_summaries`."""

    def __init__(self, geometry: Geometry, policy: LayerPolicy, summaries: Any = None) -> None:
        self.policy = policy
        self._rope, self._scale = geometry.rope(), geometry.scale
        self._ready = {} if summaries is None else {"summaries": summaries}

    def select(self, step: Step, previous: Selection | None = None, level: int = 0) -> Selection:
        at = (step.q, step.q_start, step.view, self.policy, self._rope)
        return ops.select_blocks(*at, previous, level, **self._ready)

    def plan(self, step: Step, selection: Selection | None) -> Segments:
        return ops.plan_attend(step.q_start, step.q.shape[1], selection, self.policy, PAGE_TOKENS)

    def attend(self, step: Step, segments: Segments) -> tuple[Tensor, Tensor]:
        at = (step.q, step.q_start, step.view, segments, self.policy, self._rope, self._scale)
        return ops.attend_segments(*at)

    def whole(self, step: Step, selection: Selection) -> Any:
        """Everything after the selection in one call, with the tail if the policy has one."""
        at = (step.q, step.q_start, step.view, selection, self.policy, self._rope, self._scale)
        return ops.attend_block(*at, **self._ready)  # type: ignore[attr-defined]

    def parts(self, step: Step, selection: Selection) -> dict[str, float]:
        """Seconds of each part of a step whose mask is known, in turn."""
        at = [time.perf_counter()]
        segments = self.plan(step, selection)
        at.append(time.perf_counter())
        o, lse = self.attend(step, segments)
        at.append(time.perf_counter())
        ops.merge_partials(o, lse)
        at.append(time.perf_counter())
        plan, attend, merge = (b - a for a, b in itertools.pairwise(at))
        return {"plan": plan, "attend": attend, "merge": merge, "step": plan + attend + merge}


def ready_summaries(view: PagedKV, policy: LayerPolicy) -> tuple[Any, Row]:
    """Summaries that a policy's stages and tail read, and what making them took; None where it reads
    none. One set serves all views: the numbers are of other pages, sizes and reads are the same."""
    if not policy.tail and all(stage.scorer == "search" for stage in policy.stages):
        return None, {}
    started_s = time.perf_counter()
    summaries = ops.summarise_pages(view, policy)
    n_bytes = sum(table.nbytes for table in summaries.tables.values())
    took_s = round(time.perf_counter() - started_s, 3)
    return summaries, {"summaries_s": took_s, "summaries_bytes": n_bytes}


def attend_dense(dense: Attention, step: Step) -> Tensor:
    """Our kernel over every key: passes of bounded memory, merged."""
    segments = dense.plan(step, None)
    parts = []
    for first in range(0, len(segments), PASS_SEGMENTS):
        part = segments[first : first + PASS_SEGMENTS]
        parts.append(ops.merge_partials(*dense.attend(step, part)))
    o, lse = (torch.stack(found) for found in zip(*parts, strict=True))
    return ops.merge_partials(o, lse)[0]


# --- time -----------------------------------------------------------------------------------------


def summary_us(seconds: Sequence[float]) -> dict[str, float]:
    """Best and median, in microseconds."""
    return {
        "best_us": round(min(seconds) * 1e6, 1),
        "median_us": round(statistics.median(seconds) * 1e6, 1),
        "n": len(seconds),
    }


def laps(
    call: Callable[..., Made],
    items: Sequence[tuple[Any, ...]],
    budget_s: float = math.inf,
    least: int = 3,
) -> tuple[list[Made], list[float]]:
    """Results and seconds of call(*item), each item once; the last comes first, untimed.

    Stops after `least` items when budget_s is spent.
    """
    call(*items[-1])
    made, seconds = [], []
    for i, item in enumerate(items):
        if i >= least and sum(seconds) > budget_s:
            break
        started_s = time.perf_counter()
        made.append(call(*item))
        seconds.append(time.perf_counter() - started_s)
    return made, seconds


def repeated(call: Callable[..., Any], items: Sequence[tuple[Any, ...]], n: int) -> list[float]:
    """Seconds of n rounds of `laps`; results are dropped at once, so that their memory is reused."""

    def drop(*item: Any) -> None:
        call(*item)

    return [s for _ in range(n) for s in laps(drop, items)[1]]


def refresh_weights(intervals: Sequence[int]) -> list[float]:
    """Shares of decode steps by the first stage that is recomputed; the last is of cached steps."""
    shares = [1 / n for n in intervals]
    return [share - before for before, share in zip([0.0, *shares], [*shares, 1.0], strict=True)]


def amortised_us(parts: dict[str, dict[str, float]], policy: LayerPolicy, which: str) -> float:
    """Microseconds of a decode step on average: selections by their share, attention always.

    parts: `select_0` ... by first stage recomputed, and `step`. which: `best_us` or `median_us`.
    """
    weights = refresh_weights([stage.refresh for stage in policy.stages])
    selecting = sum(
        weight * parts[f"select_{i}"][which] for i, weight in enumerate(weights[:-1]) if weight
    )
    return round(selecting + parts["step"][which], 1)


# --- bytes ----------------------------------------------------------------------------------------


def formula_bytes(
    policy: LayerPolicy, geometry: Geometry, n_tokens: int, item_bytes: int, *, most: bool = False
) -> Row:
    """Bytes that a decoded token moves in a layer: of each stage when it is recomputed, of attention.

    Sums over KV heads. A search reads 1 + log2(chunk) keys of a chunk if the heads of a group agree;
    most: 1 + group * log2(chunk), if none do. Summaries have the dtype of keys.
    """
    row = geometry.row_bytes(item_bytes)
    stages, entering = [], n_tokens
    for stage in policy.stages:
        vectors = {"bounds": 2.0, "mean": 1.0}.get(stage.scorer)
        if vectors is None:
            vectors = 1 + (geometry.group if most else 1) * math.log2(stage.chunk)
        stages.append(round(entering / stage.chunk * vectors * row))
        entering = stage.keep
    always = 0 if policy.dense else policy.sink + policy.window
    return {"stages": stages, "attend": 2 * (entering + always) * row}


def counted_bytes(
    policy: LayerPolicy,
    geometry: Geometry,
    step: Step,
    selection: Selection,
    segments: Segments,
    summaries: Any = None,
) -> Row:
    """As `formula_bytes`, of what one step touched: chunks that entered each stage, keys that heads
    probe if they disagree (`probed_keys`), entries of the summaries, keys of the segments."""
    key_bytes = geometry.head_dim * step.view.kv_dtype.itemsize
    stages = []
    for i, stage in enumerate(policy.stages):
        entering = selection.inputs[i] if i else None
        if entering is None:
            per_head = -(-(ops.candidate_end(step.q_start, policy) - policy.sink) // stage.chunk)
            n_chunks = per_head * geometry.n_kv_heads
        else:
            per_head = entering.shape[1]
            n_chunks = int((entering >= 0).sum()) * geometry.n_kv_heads // len(entering)
        of_chunk: float = stage.chunk * key_bytes
        if per_head <= stage.keep // stage.chunk:
            of_chunk = 0  # nothing is scored where everything is kept
        elif stage.scorer == "search":
            of_chunk = key_bytes * probed_keys(
                stage.chunk, geometry.group, stage.variant == "paper"
            )
        elif summaries is not None:
            table = summaries.tables[table_of(stage)]
            of_chunk = table[0, 0, 0].nbytes
        stages.append(round(n_chunks * of_chunk))
    n_keys = attended_keys(policy, geometry, step, segments)
    return {"stages": stages, "attend": n_keys * 2 * key_bytes}


def amortised_bytes(moved: Row, policy: LayerPolicy) -> int:
    """Bytes of a decode step on average: a stage's whenever it is recomputed, attention's always."""
    shares = zip(moved["stages"], policy.stages, strict=True)
    return round(moved["attend"] + sum(n_bytes / stage.refresh for n_bytes, stage in shares))


def attended_keys(policy: LayerPolicy, geometry: Geometry, step: Step, segments: Segments) -> int:
    """Keys of runs that any query of the step sees, summed over KV heads."""
    end = step.q_start + step.q.shape[1]
    total = 0
    for segment in segments:
        windowed = segment.kind == "window" and not policy.dense
        first = step.q_start - policy.window + 1 if windowed else 0
        ends = np.minimum(segment.runs + segment.block_tokens, end)
        keys = np.maximum(0, ends - np.maximum(segment.runs, first))[segment.runs >= 0]
        total += int(keys.sum()) * geometry.n_kv_heads // len(segment.runs)
    return total


@functools.cache
def probed_keys(chunk: int, group: int, paper: bool, n_trials: int = 400) -> float:
    """Distinct keys of a chunk that the searches of a group read on average, if every search goes
    either way at random, as it does on random keys."""
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(n_trials):
        seen = set()
        for _ in range(group):
            left, right = 0, chunk
            while right - left > 1:
                middle = (left + right) // 2
                probes = (left, middle) if paper else ((left + middle) // 2, (middle + right) // 2)
                seen.update(probes)
                left, right = (left, middle) if rng.random() < 0.5 else (middle, right)
            if paper:
                seen.add(left)
        total += len(seen)
    return total / n_trials


def unrefreshed(policy: LayerPolicy) -> LayerPolicy:
    """The same selection whatever its intervals: policies that differ in them are measured once."""
    stages = tuple(stage.model_copy(update={"refresh": 1}) for stage in policy.stages)
    return policy.model_copy(update={"stages": stages, "layers": "all"})
