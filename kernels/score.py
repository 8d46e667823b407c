"""Scores of chunks, on pages, in plain torch: what numba replaces where it is present.

Source: InfiniteHiP Alg 2 and 3, `reference/infinitehip.md` section 3.4. Scores are raw dot
products; the softmax scale does not change an order and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .paged import PagedKV, gather_tokens
from .rope import Rope
from .selection import (
    StagePositions,
    candidate_end,
    rotate_queries,
    stage_positions,
)
from .summaries import Summaries, chunk_summaries, table_of

try:
    from . import cpu_search, cpu_summaries
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_search = None  # type: ignore[assignment]
    cpu_summaries = None  # type: ignore[assignment]

PIECE_ELEMENTS = 1 << 22
"""Elements of one temporary of the bounds scorer; longer chunk lists are scored in pieces."""


def score_chunks(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    starts: Tensor,
    stage: Stage,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
    summaries: Summaries | None = None,
) -> Tensor:
    """Score of every chunk for every KV head: the best of its query heads and queries.

    q: [H, Tq, D] unrotated; starts: int64 [Hsel, C], padded with -1. Returns float32 [Hkv, C]
    (padding has any value): raw dot products for `reduce: max`, shares of a softmax over the chunks
    for `softmax`; scale is the softmax scale, which the former leave out.
    """
    positions = stage_positions(policy, starts, stage.chunk, q_start, q.shape[1])
    end = candidate_end(q_start, policy)
    n_kv_heads = view.n_kv_heads
    if stage.scorer == "search":
        scores = None
        if cpu_search is not None:
            scores = cpu_search.search_scores(q, view, starts, stage, positions, rope, end)
        if scores is None:
            queries = rotate_queries(q, positions, rope, stage.query_stride)
            scores = _search(queries, view, starts, stage, positions, rope, end)
        rows = scores.view(n_kv_heads, -1, scores.shape[1])
        return _reduce(rows, starts, policy, scale)
    if cpu_summaries is not None:
        scores = cpu_summaries.summary_scores(
            q, view, starts, stage, policy, positions, rope, end, scale, summaries
        )
        if scores is not None:
            return scores
    queries = rotate_queries(q, positions, rope, stage.query_stride)
    rows = _summary(queries, view, starts, stage, positions, rope, end)
    return _reduce(rows, starts, policy, scale)


def _reduce(rows: Tensor, starts: Tensor, policy: LayerPolicy, scale: float) -> Tensor:
    """rows [Hkv, n, C], one per query head or query -> [Hkv, C]."""
    if policy.reduce == "softmax":
        padding = starts.expand(len(rows), -1)[:, None] < 0
        rows = (rows * scale).masked_fill(padding, -torch.inf).softmax(dim=-1)
    return rows.amax(dim=1)


def _search(
    queries: Tensor,
    view: PagedKV,
    starts: Tensor,
    stage: Stage,
    positions: StagePositions,
    rope: Rope,
    end: int,
) -> Tensor:
    """Binary search for each chunk's best token, one descent per query head and chunk."""
    n_heads = queries.shape[0]

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(n_heads // x.shape[0], dim=0)

    first = per_query_head(starts)
    base = per_query_head(positions.key_base)

    def probe(token: Tensor, side: int) -> Tensor:
        keys = gather_tokens(view, token.reshape(view.n_kv_heads, -1)).view(*token.shape, -1)
        position = torch.full_like(base, side) if positions.per_side else base
        if positions.per_token:
            position = position + (token - first)
        return (queries @ rope.rotate(keys, position).mT).amax(dim=1)

    left = first
    right = (first + stage.chunk).clamp(max=end)
    best = torch.full(first.shape, -torch.inf)
    single = right - left <= 1
    for _ in range((stage.chunk - 1).bit_length()):
        open_ = right - left > 1
        middle = (left + right) // 2
        paper = stage.variant == "paper"
        left_score = probe(left if paper else (left + middle) // 2, 0)
        right_score = probe(middle if paper else (middle + right) // 2, 1)
        best = torch.where(open_, torch.maximum(best, torch.maximum(left_score, right_score)), best)
        go_left = left_score > right_score
        left, right = (
            torch.where(open_ & ~go_left, middle, left),
            torch.where(open_ & go_left, middle, right),
        )
    if stage.variant == "paper":
        return probe(left, 1)
    return torch.where(single, probe(left, 1), best) if bool(single.any()) else best


def _summary(
    queries: Tensor,
    view: PagedKV,
    starts: Tensor,
    stage: Stage,
    positions: StagePositions,
    rope: Rope,
    end: int,
) -> Tensor:
    """Scores by summaries, which stand at one position (the chunk's middle token), made from the keys:
    [Hkv, G * Tp, C]."""
    n_kv_heads = view.n_kv_heads
    summaries = chunk_summaries(table_of(stage), view, starts.expand(n_kv_heads, -1), end)
    position = torch.ones_like(starts) if positions.per_side else positions.key_base
    if positions.per_token:
        position = position + (end - starts).clamp(max=stage.chunk) // 2
    position = position.expand(n_kv_heads, -1)
    rows = queries.reshape(n_kv_heads, -1, queries.shape[-1])  # [Hkv, G * Tp, D]
    # bounds hold for unrotated keys only, so the query is turned back by the key's position
    n_piece = max(1, PIECE_ELEMENTS // (queries.numel() or 1))
    scores = []
    for i in range(0, starts.shape[1], n_piece):
        piece = slice(i, i + n_piece)
        turned = rope.rotate(rows[:, :, None], -position[:, None, piece])  # [Hkv, G * Tp, C, D]
        high = summaries[:, None, piece, 0]
        low = summaries[:, None, piece, -1]
        scores.append(torch.maximum(turned * low, turned * high).sum(dim=-1))
    return torch.cat(scores, dim=-1)
