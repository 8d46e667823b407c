"""What a query block may select: candidates, stage transitions, positions, top-k.

Source: InfiniteHiP section 4 and `reference/infinitehip.md` sections 3.3, 3.5 and 4. Everything
here is a function of position and of the stage's input, never of the batch or of the context's end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.stage import QUERY_BLOCK, HeadReduce, LayerPolicy, Stage
from .rope import Rope


@dataclass
class Selection:
    """What one query block selected, and the input of every stage (the mask cache, paper Alg 4).

    Hsel = 1 for head_reduce "all", Hkv for "kv-group". Lists are ascending and unique per head;
    shorter ones are padded with -1 at the end.
    """

    inputs: tuple[Tensor | None, ...]
    """inputs[i]: int64 [Hsel, n_i], chunk starts entering stage i; None for stage 0."""
    blocks: Tensor
    """int64 [Hsel, n]: block starts in tokens."""
    counts: Tensor
    """int64 [Hsel]: blocks that are not padding."""


def overlap_window(policy: LayerPolicy) -> int:
    """w' of the authors: while selecting the window is one first chunk shorter, so that candidates
    overlap it and no token is lost between refreshes; attention masks the overlap."""
    return max(0, policy.window - policy.stages[0].chunk)


def candidate_end(q_start: int, policy: LayerPolicy) -> int:
    """End (exclusive) of the candidate tokens [sink, end) of the query block at q_start."""
    return max(policy.sink, q_start - overlap_window(policy))


def first_chunks(q_start: int, policy: LayerPolicy) -> Tensor:
    """int64 [n]: all chunk starts of the first stage's grid, which begins after the sinks."""
    return torch.arange(policy.sink, candidate_end(q_start, policy), policy.stages[0].chunk)


def split_chunks(starts: Tensor, chunk: int, child: int, end: int) -> Tensor:
    """Children (of `child` tokens) of kept chunks; those at or beyond `end` are dropped.

    starts: int64 [Hsel, n] ascending, padded with -1. Returns int64 [Hsel, n * chunk / child],
    ascending, padded with -1, cut to the longest list.
    """
    children = starts[..., None] + torch.arange(0, chunk, child)
    gone = (starts[..., None] < 0) | (children >= end)
    # order is kept: only padding and the cut last chunk lose children, both at the end
    flat = children.masked_fill(gone, -1).flatten(-2)
    longest = int((flat >= 0).sum(-1).max()) if flat.numel() else 0
    return flat[:, :longest].contiguous()


def top_chunks(
    starts: Tensor,
    scores: Tensor,
    n_keep: int,
    shares: np.ndarray | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """The n_keep best chunks in ascending order; equal scores go to the lower index.

    starts: int64 [n lists, n] padded with -1; scores: [n lists, n]. With shares (like scores, summing
    to 1) a list ends with the chunk that brings their sum to top_p. Returns int64 [n lists, <= n_keep],
    padded with -1.
    """
    n_keep = min(n_keep, starts.shape[1])
    lists = starts.numpy()
    # NaN counts as best: attention then shows it, and the engine refuses the row
    ranks = np.where(lists < 0, -np.inf, np.nan_to_num(scores.numpy(), nan=np.inf, neginf=-np.inf))
    if shares is not None:
        return _fewest(lists, ranks, n_keep, shares, top_p)
    least = np.partition(ranks, -n_keep, axis=1)[:, -n_keep, None]
    above, equal = ranks > least, ranks == least
    room = n_keep - above.sum(axis=1, keepdims=True)
    kept = above | (equal & (equal.cumsum(axis=1) <= room))
    return torch.from_numpy(lists[kept].reshape(len(lists), n_keep))


def _fewest(
    lists: np.ndarray, ranks: np.ndarray, n_keep: int, shares: np.ndarray, top_p: float
) -> Tensor:
    order = np.argsort(-ranks, axis=1, kind="stable")[:, :n_keep]
    reached = np.take_along_axis(shares, order, axis=1).cumsum(axis=1, dtype=np.float64)
    counts = np.minimum((reached < top_p).sum(axis=1) + 1, n_keep)
    kept = np.full((len(lists), int(counts.max(initial=1))), -1, dtype=np.int64)
    for i, count in enumerate(counts):
        found = np.sort(lists[i, order[i, :count]])
        found = found[found >= 0]
        kept[i, : len(found)] = found
    return torch.from_numpy(kept)


def chunk_shares(starts: Tensor, scores: Tensor, policy: LayerPolicy, scale: float) -> np.ndarray:
    """Estimated share of each chunk in the attention over all chunks of its list: [n lists, n].

    From reduced scores: a softmax of raw ones, or the shares themselves made to sum to 1.
    """
    dead = starts < 0
    if policy.reduce == "softmax":
        shares = scores.masked_fill(dead, 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(
            min=torch.finfo(torch.float32).tiny
        )
    else:
        shares = (scores * scale).masked_fill(dead, -torch.inf).softmax(dim=-1)
    return shares.numpy()


def keeps_all(starts: Tensor, stage: Stage) -> bool:
    """Whether everything that enters the stage leaves it (no scoring needed: exact)."""
    return starts.shape[-1] <= stage.keep // stage.chunk


def reduce_heads(scores: Tensor, head_reduce: HeadReduce) -> Tensor:
    """The best of the KV heads that share a mask: [Hkv, n] -> [1, n] or [Hkv, n] (paper 4, Eq 3)."""
    return scores.amax(dim=0, keepdim=True) if head_reduce == "all" else scores


def pool_queries(q: Tensor, stride: int) -> Tensor:
    """Means of neighbouring queries, after RoPE: [..., Tq, D] -> [..., ceil(Tq / stride), D]."""
    if stride == 1:
        return q
    return torch.stack([group.mean(dim=-2) for group in q.split(stride, dim=-2)], dim=-2)


@dataclass(frozen=True)
class StagePositions:
    """Positions of queries and keys while one stage is scored (reference section 4)."""

    query: Tensor
    """int64 [Hsel, Tq]"""
    key_base: Tensor
    """int64 [Hsel, C]: position of the chunk's first token, or of the whole chunk."""
    per_token: bool
    """Keys advance by one inside a chunk; else a chunk has one position."""
    per_side: bool
    """Relative style: left half 0, right half 1, whatever the chunk."""


def stage_positions(
    policy: LayerPolicy, starts: Tensor, chunk: int, q_start: int, n_queries: int
) -> StagePositions:
    """Positions of one stage.

    starts: int64 [Hsel, C] chunk starts entering the stage, padded with -1.

    - chunk-indexed: a key has its chunk's index, the query min(own, chunks + w'), with the live
      chunk count of this query block.
    - relative: left 0, right 1, the query w' + 1.
    - streaming: entering tokens are renumbered consecutively so that the last one stands where the
      candidate region ends; the query keeps its own position.
    - clamped: true distances, at most select_span; a chunk has one position, its middle (that of its
      block of 64 tokens if it is smaller). Counted from the clamp, because only distances matter.
    - none: true positions.
    """
    style = policy.select_rope
    n_heads, n_chunks = starts.shape
    overlap = overlap_window(policy)
    if style == "relative":
        query = torch.full((n_heads, n_queries), overlap + 1)
        return StagePositions(
            query, torch.zeros(1, 1, dtype=torch.int64).expand_as(starts), False, True
        )
    own = torch.arange(q_start, q_start + n_queries).expand(n_heads, -1)
    live = (starts >= 0).sum(dim=-1, keepdim=True)
    index = torch.arange(n_chunks).expand(n_heads, -1)
    if style == "chunk-indexed":
        return StagePositions(torch.minimum(own, live + overlap), index, False, False)
    if style == "streaming":
        end = candidate_end(q_start, policy)
        size = (end - starts).clamp(max=chunk).masked_fill(starts < 0, 0)
        n_live_tokens = size.sum(dim=-1, keepdim=True)
        # all chunks but the last are whole, so the rank of a chunk's first token is index * chunk
        return StagePositions(own, end - n_live_tokens + index * chunk, True, False)
    if style == "clamped":
        first = max(0, q_start - policy.select_span)
        middle = starts + chunk // 2
        if chunk < QUERY_BLOCK:
            middle = torch.div(starts, QUERY_BLOCK, rounding_mode="floor") * QUERY_BLOCK
            middle = middle + QUERY_BLOCK // 2
        return StagePositions(
            own - first, middle.clamp(min=first, max=max(first, q_start)) - first, False, False
        )
    return StagePositions(own, starts, True, False)


def rotate_queries(q: Tensor, positions: StagePositions, rope: Rope, stride: int) -> Tensor:
    """Rotated and pooled queries: q [H, Tq, D] -> [H, ceil(Tq / stride), D]."""
    per_head = positions.query.repeat_interleave(q.shape[0] // positions.query.shape[0], dim=0)
    return pool_queries(rope.rotate(q.float(), per_head), stride)
