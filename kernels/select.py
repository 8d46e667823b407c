"""Select key blocks for one query block: the chain of stages, coarse to fine (DESIGN 1.3)."""

from __future__ import annotations

from torch import Tensor

from ..core.errors import InternalError
from ..core.stage import QUERY_BLOCK, LayerPolicy
from .paged import PagedKV
from .rope import Rope
from .score import score_chunks
from .selection import (
    Selection,
    candidate_end,
    chunk_shares,
    first_chunks,
    keeps_all,
    reduce_heads,
    split_chunks,
    top_chunks,
)
from .summaries import Summaries

try:
    from . import cpu_top
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_top = None  # type: ignore[assignment]


def select_blocks(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    policy: LayerPolicy,
    rope: Rope,
    previous: Selection | None = None,
    level: int = 0,
    coarse: Tensor | None = None,
    summaries: Summaries | None = None,
    scale: float | None = None,
    query_block: int = QUERY_BLOCK,
) -> Selection:
    """Blocks that the queries at [q_start, q_start + Tq) attend to, besides sinks and window.

    q: [H, Tq <= 64, D] unrotated: one absolute 64-query block, or one decode query.
    level: first stage to recompute, from previous.inputs[level]; level 0 starts from all chunks,
    level == len(stages) returns previous.
    coarse: int64 [Hsel, n] or [n], ascending chunk starts that leave stage 0, if it was scored
    elsewhere (the retriever; bookmarks always are). summaries: ready summaries for bounds and mean
    stages, which are made from the keys without. scale: the softmax scale, 1 / sqrt(D) by default
    (reduce, top_p). query_block: queries of a whole block here; fewer than 64 are averaged in smaller
    groups.
    Raises InternalError on a dense policy, a missing previous, or pages that are absent.
    """
    n_stages = len(policy.stages)
    _check(q, q_start, view, policy, previous, level, coarse)
    if previous is not None and level == n_stages:
        return previous
    n_sel = 1 if policy.head_reduce == "all" else view.n_kv_heads
    inputs: list[Tensor | None] = [None] * n_stages
    if level == 0 or previous is None:
        starts = first_chunks(q_start, policy).expand(n_sel, -1)
    else:
        inputs[: level + 1] = previous.inputs[: level + 1]
        known = inputs[level]
        assert known is not None  # stage 0 alone has no stored input
        starts = known
    end = candidate_end(q_start, policy)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for i in range(level, n_stages):
        stage = policy.stages[i].for_block(query_block)
        if i == 0 and coarse is not None:
            starts = coarse.expand(n_sel, -1)
        elif not keeps_all(starts, stage) or (stage.top_p is not None and starts.shape[1]):
            scores = score_chunks(q, q_start, view, starts, stage, policy, rope, scale, summaries)
            n_keep = stage.keep // stage.chunk
            if cpu_top is not None and stage.top_p is None:
                starts = cpu_top.top_chunks(starts, scores, n_keep)
            else:
                reduced = reduce_heads(scores, policy.head_reduce)
                shares = None
                if stage.top_p is not None:
                    shares = chunk_shares(starts, reduced, policy, scale)
                starts = top_chunks(starts, reduced, n_keep, shares, stage.top_p or 1.0)
        if i + 1 < n_stages:
            starts = split_chunks(starts, stage.chunk, policy.stages[i + 1].chunk, end)
            inputs[i + 1] = starts
    return Selection(tuple(inputs), starts.contiguous(), (starts >= 0).sum(dim=-1))


def _check(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    policy: LayerPolicy,
    previous: Selection | None,
    level: int,
    coarse: Tensor | None,
) -> None:
    n_queries = q.shape[1]
    if policy.dense:
        raise InternalError("select_blocks on a dense policy: it attends to every key")
    if policy.by_bookmark and level == 0 and coarse is None:
        raise InternalError("pages are chosen by bookmarks: give the chosen ones as `coarse`")
    if not 1 <= n_queries <= QUERY_BLOCK:
        raise InternalError(f"{n_queries} queries in a block; 1 to {QUERY_BLOCK} are allowed")
    if q_start + n_queries > view.n_tokens:
        raise InternalError(
            f"queries [{q_start}, {q_start + n_queries}) but only {view.n_tokens} tokens are "
            "appended; append K and V before selecting"
        )
    if not 0 <= level <= len(policy.stages) or (level and previous is None):
        raise InternalError(f"stage level {level} of {len(policy.stages)} needs a cached selection")
