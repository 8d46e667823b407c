"""Prefill attention on the device: blocks of queries over sinks, selected blocks and window, or all keys.

Source: InfiniteHiP section 4 and 6 (`reference/infinitehip.md` 3.6, 4, 6). A program takes one query block
and several query heads of a KV head as the rows of one tile, so that keys are read and turned once.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import LayerPolicy
from .gpu_pages import KIND, DeviceAngles, DeviceMask, DevicePages
from .triton_attend_common import (
    TILE,
    add_values,
    base_of,
    keys_of,
    load_turned,
    part_sizes,
    rows_of,
    weigh,
)
from .triton_common import LN_2, NO_SCORE, load_halves, rotate, turn_of

QUERY_BLOCKS = (16, 32, 64)
MOST_ROWS = 128
"""Rows of a program: heads times queries."""


@triton.jit(do_not_specialize=["row"])
def prefill_kernel(
    q, starts, address, pages, row, blocks, n_blocks, out, lse, fine_cos, fine_sin, coarse_cos,
    coarse_sin, to_log2, q_row, q_head, out_row, out_head, n_heads, n_page_ids, most_pages,
    block_row, block_list,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, KIND: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    ROW_BYTES: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    KEEP: tl.constexpr, LISTS: tl.constexpr, STREAMING: tl.constexpr, DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (query block, HEADS query heads of a KV head): row of the tile = head * QUERIES + query."""
    # dense blocks are longer the later they come: those first
    m = tl.num_programs(0) - 1 - tl.program_id(0)
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // parts
    r = tl.arange(0, HEADS * QUERIES)
    head = tl.program_id(1) % parts * HEADS + r // QUERIES
    column = tl.arange(0, BLOCK_HALF)
    first = tl.load(starts + m)
    last = tl.load(starts + m + 1) - 1
    if last < first:
        return
    position = first + r % QUERIES
    asked = (position <= last) & (head < GROUP)
    mask = asked[:, None] & (column < HALF)[None, :]
    token_row = (position - tl.load(starts)).to(tl.int64)
    query_head = kv_head * GROUP + head
    at = q + (token_row * q_row + query_head * q_head)[:, None] + column[None, :]
    q1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    q2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    page_ids = pages + row.to(tl.int64) * most_pages
    base = 0
    if DENSE:
        n_tiles = last // TILE + 1
    else:
        which = m.to(tl.int64) * LISTS + (kv_head if LISTS > 1 else 0)
        n_chosen = tl.load(n_blocks + which)
        chosen = blocks + m.to(tl.int64) * block_row + (kv_head if LISTS > 1 else 0) * block_list
        if STREAMING:
            base = base_of(first, n_chosen, SINK, WINDOW, BLOCK)
        # keys from here on are inside every query's window
        n_old = tl.maximum(0, last - WINDOW + 1)
        n_sink = (tl.minimum(SINK, n_old) + TILE - 1) // TILE
        n_selected = tl.where(n_old > SINK, (n_chosen * BLOCK + TILE - 1) // TILE, 0)
        n_tiles = n_sink + n_selected
        if WINDOW > 0:
            n_tiles += last // TILE - tl.maximum(0, first - WINDOW + 1) // TILE + 1
    cos, sin = turn_of(
        position - base, asked, column, HALF, fine_cos, fine_sin, coarse_cos, coarse_sin
    )
    q1, q2 = rotate(q1, q2, cos, sin)
    best = tl.full([HEADS * QUERIES], NO_SCORE, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    out1 = tl.zeros([HEADS * QUERIES, BLOCK_HALF], tl.float32)
    out2 = tl.zeros([HEADS * QUERIES, BLOCK_HALF], tl.float32)
    for tile in range(0, n_tiles):
        if DENSE:
            token = tile * TILE + tl.arange(0, TILE)
            at_position, live = token, token <= last
            seen = token[None, :] <= position[:, None]
        else:
            token, at_position, live, in_window = keys_of(
                tile, n_sink, n_selected, first, last, base, chosen, n_chosen, SINK, WINDOW, BLOCK,
                STREAMING,
            )  # fmt: skip
            old = token[None, :] <= position[:, None] - WINDOW
            near = (token[None, :] <= position[:, None]) & (old == 0)
            seen = live[None, :] & tl.where(in_window, near, old)
        key = rows_of(address, page_ids, kv_head, n_page_ids, token, live, PAGE_TOKENS, ROW_BYTES)
        k1, k2 = load_turned(
            key, at_position - base, live, column, HALF, KIND, fine_cos, fine_sin, coarse_cos,
            coarse_sin,
        )  # fmt: skip
        weight, fade, best, total = weigh(q1, q2, k1, k2, seen, to_log2, best, total, PRECISION)
        # not before: registers hold either keys and angles or values
        v1, v2 = load_halves(key + PAGE_TOKENS * ROW_BYTES, live, column, HALF, KIND)
        out1, out2 = add_values(weight, fade, v1, v2, out1, out2, PRECISION)
    divisor = tl.where(total == 0.0, 1.0, total)
    to = out + (token_row * out_row + query_head * out_head)[:, None] + column[None, :]
    tl.store(to, (out1 / divisor[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (out2 / divisor[:, None]).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        value = tl.where(total == 0.0, float("-inf"), (best + tl.log2(divisor)) * LN_2)
        tl.store(lse + token_row * n_heads + query_head, value, mask=asked)


def attend_prefill(
    q: Tensor,
    starts: Tensor,
    pages: DevicePages,
    row: int,
    mask: DeviceMask | None,
    policy: LayerPolicy,
    angles: DeviceAngles,
    scale: float,
    out: Tensor,
    query_block: int = 64,
    precision: str = "tf32x3",
    lse: Tensor | None = None,
) -> None:
    """Attention of the queries of one row (sections 3.6 and 4), whose keys are stored, into out.

    q, out: [T, H, D] unrotated, the last dimension contiguous; starts: int32 [M + 1], first absolute position
    of each block of at most query_block (16, 32 or 64) queries, then the end; mask: what every block
    selected (M instead of rows), None for a dense policy; lse: float32 [T, H] contiguous, base e. A query
    that sees nothing gives zeros and -inf. Raises ValueError for another query_block, or a mask that does
    not fit the policy.
    """
    if query_block not in QUERY_BLOCKS:
        raise ValueError(f"query_block ({query_block}) must be one of {QUERY_BLOCKS}")
    n_heads, head_dim = q.shape[1:]
    half = head_dim // 2
    block_half = max(16, triton.next_power_of_2(half))
    group = n_heads // pages.n_kv_heads
    # the tile of queries and the sums of a program grow with the head
    most_rows = MOST_ROWS * 64 // max(64, block_half)
    heads = min(triton.next_power_of_2(group), most_rows // query_block)
    parts = -(-group // heads)
    prefill_kernel[(starts.shape[0] - 1, pages.n_kv_heads * parts)](
        q,
        starts,
        pages.address,
        pages.pages,
        row,
        None if mask is None else mask.blocks,
        None if mask is None else mask.n_blocks,
        out,
        lse,
        *angles.tables,
        scale * angles.attention_scaling**2 * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        n_heads,
        pages.address.shape[1],
        pages.pages.shape[1],
        0 if mask is None else mask.blocks.stride(0),
        0 if mask is None else mask.blocks.stride(1),
        GROUP=group,
        HEADS=heads,
        QUERIES=query_block,
        HALF=half,
        BLOCK_HALF=block_half,
        KIND=KIND[pages.kv_dtype],
        PAGE_TOKENS=pages.page_tokens,
        ROW_BYTES=pages.row_bytes,
        **part_sizes(policy, mask),
        PRECISION=precision,
        num_warps=4 if heads * query_block == 16 and block_half <= 64 else 8,
        # two tiles in flight would not fit into shared memory
        num_stages=1,
    )
