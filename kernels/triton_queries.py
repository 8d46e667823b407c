"""Queries as the scorers of a stage read them: turned by distances and averaged, once for all chunks."""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .gpu_pages import DeviceAngles, DeviceScratch
from .triton_common import rotate, turn_of
from .triton_lists import CHUNK_INDEXED, FIXED, STYLES, StageLists, half_block, open_list


def turn_queries(
    q: Tensor,
    lists: StageLists,
    stage: Stage,
    policy: LayerPolicy,
    angles: DeviceAngles,
    scratch: DeviceScratch,
    *,
    rotate: bool = True,
) -> Tensor:
    """Queries as the scorers read them: float32 [R, H, sides, Tp, D], in scratch.

    q: [R, H, Tq, D] unrotated, last axis contiguous. Rotated by their distance from the row's first query
    (relative: by that from all keys, 2 sides for the search), scaled by attention_scaling for query and key,
    then averages of query_stride neighbours, Tp = ceil(Tq / query_stride). Rows that are not due are left.
    """
    n_rows, n_heads, n_queries, head_dim = q.shape
    if q.stride(3) != 1:
        raise ValueError("the last axis of q must be contiguous")
    relative = policy.select_rope == "relative"
    sides = 2 if relative and stage.scorer == "search" else 1
    stride = stage.query_stride
    n_pooled = -(-n_queries // stride)
    out = scratch.take("select.queries", (n_rows, n_heads, sides, n_pooled, head_dim))
    block = n_pooled if n_pooled == 1 else triton.next_power_of_2(n_pooled)
    _turn_kernel[(n_rows, n_heads)](
        q, out, lists.q_start, lists.q_start if lists.n_queries is None else lists.n_queries,
        lists.fresh, lists.n_starts, lists.offset, *angles.tables, angles.attention_scaling**2,
        q.stride(0), q.stride(1), q.stride(2), LEAST=lists.least, STYLE=STYLES[policy.select_rope],
        N_HEADS=n_heads, TQ=n_queries, TP=n_pooled, STRIDE=stride, SIDES=sides, HALF=head_dim // 2,
        BLOCK_HALF=half_block(head_dim), BLOCK_T=block * stride, HAS_COUNT=lists.n_queries is not None,
        ROTATE=rotate, num_warps=4 if block * stride > 4 else 1, **lists.constants,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["offset"])
def _turn_kernel(
    q, out, q_start, n_queries, fresh, n_starts, offset, fine_cos, fine_sin, coarse_cos, coarse_sin,
    factor, stride_row, stride_head, stride_query, LEAST: tl.constexpr, STYLE: tl.constexpr,
    N_HEADS: tl.constexpr, TQ: tl.constexpr, TP: tl.constexpr, STRIDE: tl.constexpr,
    SIDES: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_COUNT: tl.constexpr, ROTATE: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr,
    OVERLAP: tl.constexpr, CHUNK: tl.constexpr, REFRESH: tl.constexpr, LISTS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Program (row, query head)."""
    row, head = tl.program_id(0), tl.program_id(1)
    position, _end, n = open_list(
        row, head * LISTS // N_HEADS, q_start, fresh, n_starts, offset, FIRST, SINK, OVERLAP, CHUNK,
        REFRESH, LISTS, MOST
    )  # fmt: skip
    if n <= LEAST:
        return
    token, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_HALF)
    n_live = TQ
    if HAS_COUNT:
        n_live = tl.load(n_queries + row)
    live = token < n_live
    at = q + row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    at = at + token.to(tl.int64)[:, None] * stride_query + column[None, :]
    mask = live[:, None] & (column < HALF)[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    for side in tl.static_range(SIDES):
        turned, other = first, second
        if ROTATE:
            if STYLE == FIXED:
                # keys stand at 1, or at 0 in the left half of a chunk that is searched
                distance = tl.zeros_like(token) + (OVERLAP + SIDES - 1 - side)
            elif STYLE == CHUNK_INDEXED:
                last = n + OVERLAP
                distance = tl.minimum(position + token, last) - tl.minimum(position, last)
            else:
                distance = token
            cos, sin = turn_of(
                distance, live, column, HALF, fine_cos, fine_sin, coarse_cos, coarse_sin
            )
            turned, other = rotate(first, second, cos, sin)
            turned, other = turned * factor, other * factor
        if STRIDE > 1:
            shape: tl.constexpr = [BLOCK_T // STRIDE, STRIDE, BLOCK_HALF]
            turned = tl.sum(tl.reshape(turned, shape), axis=1)
            other = tl.sum(tl.reshape(other, shape), axis=1)
        group = tl.arange(0, BLOCK_T // STRIDE)
        size = tl.minimum(tl.maximum(n_live - group * STRIDE, 1), STRIDE).to(tl.float32)
        to = ((row.to(tl.int64) * N_HEADS + head) * SIDES + side) * TP + group
        to = out + (to * (2 * HALF))[:, None] + column[None, :]
        keep = (group < TP)[:, None] & (column < HALF)[None, :]
        tl.store(to, turned / size[:, None], mask=keep)
        tl.store(to + HALF, other / size[:, None], mask=keep)
