"""Selection on the device: the chain of stages of `select.select_blocks` for all rows at once.

The same kernels are launched in every step, with the same grids: each finds out from positions on the
device whether its stage is due, so a captured graph serves every step. Nothing synchronises or allocates
once the scratch is there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.stage import QUERY_BLOCK, LayerPolicy
from .gpu_pages import DeviceAngles, DeviceMask, DevicePages, DeviceScratch
from .summaries import TableName, table_of
from .triton_lists import StageLists, check_reach
from .triton_queries import turn_queries
from .triton_score import summary_scores
from .triton_search import search_scores
from .triton_select import keep_best, reduce_scores


def select_device(
    q: Tensor,
    q_start: Tensor,
    n_queries: Tensor | None,
    pages: DevicePages,
    mask: DeviceMask,
    tables: Mapping[TableName, Tensor],
    policy: LayerPolicy,
    angles: DeviceAngles,
    scale: float,
    scratch: DeviceScratch,
    *,
    fresh: Tensor,
    offset: int,
    most_tokens: int,
    page_row: Tensor | None = None,
    n_ready: Tensor | None = None,
    query_block: int = QUERY_BLOCK,
    precision: str = "tf32",
) -> None:
    """Recompute the stages that are due, of every row, into mask.

    q: [R, H, Tq, D] unrotated; a row is a decoded row (Tq = 1) or a block of up to 64 queries. q_start:
    int64 [R], -1 = an empty place, whose lists stay as they are; n_queries: int32 [R] queries of each row,
    None = Tq. fresh: int32 [R], 1 = all stages are due (in prefill always). offset: of the layer's refreshes.
    tables: `summaries.tables_of(policy)` with a slot per page id; a stage without its table reads keys.
    scale: the softmax scale. most_tokens: longest context of any row, a constant: grids depend on it.
    page_row: int32 [R], the row of pages.pages of each row, None = the same. n_ready: int32 [R] leading pages
    with summaries, None = all that the first query's token fills, so they are made before. query_block:
    queries of a whole block.
    precision: of products of matrices, "ieee" or "tf32" (which rounds queries, and keys that are not 16-bit).
    Raises ValueError for a dense policy, or if angles or tables do not fit.
    """
    if policy.dense:
        raise ValueError("a dense policy selects nothing")
    check_reach(angles, most_tokens)
    last = len(policy.stages) - 1
    for i, whole in enumerate(policy.stages):
        stage = whole.for_block(query_block)
        lists = StageLists.of(policy, i, mask, q_start, n_queries, fresh, offset, most_tokens)
        queries = turn_queries(q, lists, stage, policy, angles, scratch)
        if stage.scorer == "search":
            scores, ends = search_scores(
                queries, lists, stage, policy, pages, angles, scale, scratch,
                page_row=page_row, precision=precision,
            )  # fmt: skip
        else:
            scores, ends = summary_scores(
                queries, lists, stage, policy, pages, tables.get(table_of(stage)), angles, scale,
                scratch, page_row=page_row, n_ready=n_ready, precision=precision,
            )  # fmt: skip
        reduced = reduce_scores(scores, ends, lists, scale, scratch)
        if i < last:
            child, kept, n_kept = policy.stages[i + 1].chunk, mask.inputs[i], mask.n_inputs[i]
        else:
            child, kept, n_kept = stage.chunk, mask.blocks, mask.n_blocks
        shares = 1.0 if policy.reduce == "softmax" else scale
        keep_best(reduced, lists, stage, child, kept, n_kept, shares)
