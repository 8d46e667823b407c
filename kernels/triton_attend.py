"""Decode attention on the device: one query per row over sinks, selected blocks and window, or all keys.

Source: InfiniteHiP section 4 and 6 (`reference/infinitehip.md` 3.6, 4, 6), flash-decoding's split of the
keys. One launch: program (split, KV head, row), the last one of a row and KV head to arrive merges.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import LayerPolicy
from .gpu_pages import KIND, DeviceAngles, DeviceMask, DevicePages, DeviceScratch
from .triton_attend_common import (
    TILE,
    TILE_KEYS,
    add_values,
    base_of,
    keys_of,
    load_turned,
    part_sizes,
    rows_of,
    weigh,
    window_tiles,
)
from .triton_common import LN_2, NO_SCORE, load_halves

MOST_SPLITS = 32
"""8 KV heads of 32 splits are 256 programs, about two on each of an H100's 132 multiprocessors. 3328 keys
are 53 tiles (4 sink, 32 selected, 17 window): 27 splits of two."""
MERGE_FLOATS = 8192
"""Most numbers of a half that a merge holds at once: 64 registers a thread for 4 warps."""


def splits_of(policy: LayerPolicy) -> tuple[int, int]:
    """Splits and tiles of each, a function of the policy alone. A dense policy has no fixed tiles (0): its
    tiles up to the position are shared out by the position."""
    if policy.dense:
        return MOST_SPLITS, 0
    n_tiles = -(-policy.sink // TILE_KEYS) + -(-policy.stages[-1].keep // TILE_KEYS)
    n_tiles += window_tiles(policy.window)
    tiles = -(-n_tiles // MOST_SPLITS)
    return -(-n_tiles // tiles), tiles


@triton.jit
def merge_splits(
    partial, top, out, lse, b, kv_head, n_kv_heads, out_row, out_head, GROUP: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, N_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Merges the splits of a row and KV head by log-sum-exp, HEADS query heads at a time. All splits are
    in one sum of a fixed order. Reads past L1, which may hold what was there before."""
    column = tl.arange(0, BLOCK_HALF)
    split = tl.arange(0, BLOCK_SPLITS)
    row = b.to(tl.int64) * n_kv_heads + kv_head
    for head in tl.static_range(0, GROUP, HEADS):
        g = head + tl.arange(0, HEADS)
        there = (split < N_SPLITS)[:, None] & (g < GROUP)[None, :]
        at = (row * N_SPLITS + split)[:, None] * GROUP + g[None, :]
        best = tl.load(top + 2 * at, mask=there, other=NO_SCORE, cache_modifier=".cg")
        total = tl.load(top + 2 * at + 1, mask=there, other=0.0, cache_modifier=".cg")
        # a split that saw nothing has a total of 0 and wrote no sums
        saw = total != 0.0
        most = tl.max(best, 0)
        weight = tl.where(saw, tl.exp2(best - most[None, :]), 0.0)
        sums = tl.sum(total * weight, 0)
        mask = (there & saw)[:, :, None] & (column < HALF)[None, None, :]
        item = partial + at[:, :, None] * (2 * HALF) + column[None, None, :]
        first = tl.load(item, mask=mask, other=0.0, cache_modifier=".cg")
        second = tl.load(item + HALF, mask=mask, other=0.0, cache_modifier=".cg")
        divisor = tl.where(sums == 0.0, 1.0, sums)
        first = tl.sum(first * weight[:, :, None], 0) / divisor[:, None]
        second = tl.sum(second * weight[:, :, None], 0) / divisor[:, None]
        query_head = kv_head * GROUP + g
        to = out + b.to(tl.int64) * out_row + query_head[:, None] * out_head + column[None, :]
        live = (g < GROUP)[:, None] & (column < HALF)[None, :]
        tl.store(to, first.to(out.dtype.element_ty), mask=live)
        tl.store(to + HALF, second.to(out.dtype.element_ty), mask=live)
        if lse is not None:
            value = tl.where(sums == 0.0, float("-inf"), (most + tl.log2(divisor)) * LN_2)
            tl.store(lse + row * GROUP + g, value, mask=g < GROUP)


@triton.jit
def decode_kernel(
    q, position, address, pages, blocks, n_blocks, partial, top, arrived, out, lse,
    fine_cos, fine_sin, coarse_cos, coarse_sin, to_log2, q_row, q_head, out_row, out_head,
    n_page_ids, most_pages, block_row, block_list,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    KIND: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr, SINK: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr, LISTS: tl.constexpr,
    STREAMING: tl.constexpr, DENSE: tl.constexpr, N_SPLITS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_SPLITS: tl.constexpr, MERGE_HEADS: tl.constexpr,
    MERGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head, row): its run of tiles -> sums, largest logit and total of the G heads.

    q, out: [B, H, D]; partial: [B, Hkv, N_SPLITS, G, D]; top: [B, Hkv, N_SPLITS, G, 2]; arrived: [B * Hkv].
    """
    split, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_kv_heads = tl.num_programs(1)
    row = b.to(tl.int64) * n_kv_heads + kv_head
    r = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_HALF)
    mask = (r < GROUP)[:, None] & (column < HALF)[None, :]
    p = tl.load(position + b).to(tl.int32)
    if p < 0:  # an empty place
        if split == 0:
            to = out + b.to(tl.int64) * out_row + (kv_head * GROUP + r)[:, None] * out_head
            none = tl.zeros([ROWS, BLOCK_HALF], tl.float32).to(out.dtype.element_ty)
            tl.store(to + column[None, :], none, mask=mask)
            tl.store(to + HALF + column[None, :], none, mask=mask)
            if lse is not None:
                gone = tl.full([ROWS], float("-inf"), tl.float32)
                tl.store(lse + row * GROUP + r, gone, mask=r < GROUP)
        return
    at = q + b.to(tl.int64) * q_row + (kv_head * GROUP + r)[:, None] * q_head + column[None, :]
    q1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    q2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    page_ids = pages + b.to(tl.int64) * most_pages
    if DENSE:
        n_tiles = p // TILE + 1
        per_split = (n_tiles + N_SPLITS - 1) // N_SPLITS
        start = split * per_split
        n_mine = tl.minimum(per_split, n_tiles - start)
    else:
        start = split * TILES
        n_mine = TILES
        N_SINK: tl.constexpr = (SINK + TILE - 1) // TILE
        N_SELECTED: tl.constexpr = (KEEP + TILE - 1) // TILE
        which = b.to(tl.int64) * LISTS + (kv_head if LISTS > 1 else 0)
        n_chosen = tl.load(n_blocks + which)
        chosen = blocks + b.to(tl.int64) * block_row + (kv_head if LISTS > 1 else 0) * block_list
        base = base_of(p, n_chosen, SINK, WINDOW, BLOCK)
    best = tl.full([ROWS], NO_SCORE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out1 = tl.zeros([ROWS, BLOCK_HALF], tl.float32)
    out2 = tl.zeros([ROWS, BLOCK_HALF], tl.float32)
    for i in range(0, n_mine):
        if DENSE:
            token = (start + i) * TILE + tl.arange(0, TILE)
            at_position, live = token, token <= p
        else:
            token, at_position, live, _ = keys_of(
                start + i, N_SINK, N_SELECTED, p, p, base, chosen, n_chosen, SINK, WINDOW, BLOCK,
                STREAMING,
            )  # fmt: skip
        key = rows_of(address, page_ids, kv_head, n_page_ids, token, live, PAGE_TOKENS, ROW_BYTES)
        v1, v2 = load_halves(key + PAGE_TOKENS * ROW_BYTES, live, column, HALF, KIND)
        k1, k2 = load_turned(
            key, at_position - p, live, column, HALF, KIND, fine_cos, fine_sin, coarse_cos,
            coarse_sin,
        )  # fmt: skip
        weight, fade, best, total = weigh(
            q1, q2, k1, k2, live[None, :], to_log2, best, total, PRECISION
        )
        out1, out2 = add_values(weight, fade, v1, v2, out1, out2, PRECISION)
    to = (row * N_SPLITS + split) * GROUP + r
    tl.store(top + 2 * to, best, mask=r < GROUP)
    tl.store(top + 2 * to + 1, total, mask=r < GROUP)
    item = partial + to[:, None] * (2 * HALF) + column[None, :]
    saw = mask & (total != 0.0)[:, None]
    tl.store(item, out1, mask=saw)
    tl.store(item + HALF, out2, mask=saw)
    if MERGE:
        # all threads have stored before one of them counts the program in
        tl.debug_barrier()
        before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
        if before == N_SPLITS - 1:
            tl.store(arrived + row, 0)
            merge_splits(
                partial, top, out, lse, b, kv_head, n_kv_heads, out_row, out_head, GROUP, HALF,
                BLOCK_HALF, N_SPLITS, BLOCK_SPLITS, MERGE_HEADS,
            )  # fmt: skip


@triton.jit
def merge_kernel(
    position, partial, top, out, lse, out_row, out_head, GROUP: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, N_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    MERGE_HEADS: tl.constexpr,
):  # fmt: skip
    """Program (KV head, row): the merge as a launch of its own."""
    kv_head, b = tl.program_id(0), tl.program_id(1)
    if tl.load(position + b) >= 0:
        merge_splits(
            partial, top, out, lse, b, kv_head, tl.num_programs(0), out_row, out_head, GROUP, HALF,
            BLOCK_HALF, N_SPLITS, BLOCK_SPLITS, MERGE_HEADS,
        )  # fmt: skip


def attend_decode(
    q: Tensor,
    position: Tensor,
    pages: DevicePages,
    mask: DeviceMask | None,
    policy: LayerPolicy,
    angles: DeviceAngles,
    scale: float,
    out: Tensor,
    scratch: DeviceScratch,
    precision: str = "tf32x3",
    merge: Literal["launch", "second"] = "launch",
    lse: Tensor | None = None,
) -> None:
    """Attention of one token per row, whose key is stored (sections 3.6 and 4), into out.

    q, out: [B, H, D] unrotated, the last dimension contiguous; position: int64 [B], -1 for an empty place,
    which gets zeros; mask: what every row selected, None for a dense policy; lse: float32 [B, H] contiguous,
    base e. A row that sees nothing gives zeros and -inf. merge: in the same launch by the last program of
    a row and KV head, or by a second kernel, with equal bits. Neither waits for the device nor allocates
    once scratch is as large as it needs to be. Raises ValueError for a mask that does not fit the policy.
    """
    n_rows, n_heads, head_dim = q.shape
    n_kv_heads, half = pages.n_kv_heads, head_dim // 2
    group = n_heads // n_kv_heads
    n_splits, tiles = splits_of(policy)
    block_half = max(16, triton.next_power_of_2(half))
    block_splits = triton.next_power_of_2(n_splits)
    # keys, values, cos and sin of a tile are 6 x 64 x BLOCK_HALF numbers: 192 registers a thread for 64
    warps = 8 if block_half > 64 else 4
    most_heads = max(1, warps // 4 * MERGE_FLOATS // (block_splits * block_half))
    merge_heads = min(most_heads, triton.next_power_of_2(group))
    partial = scratch.take("attend_partial", (n_rows, n_kv_heads, n_splits, group, head_dim))
    top = scratch.take("attend_top", (n_rows, n_kv_heads, n_splits, group, 2))
    arrived = scratch.take("attend_arrived", (n_rows * n_kv_heads,), torch.int32)
    decode_kernel[(n_splits, n_kv_heads, n_rows)](
        q,
        position,
        pages.address,
        pages.pages,
        None if mask is None else mask.blocks,
        None if mask is None else mask.n_blocks,
        partial,
        top,
        arrived,
        out,
        lse,
        *angles.tables,
        scale * angles.attention_scaling**2 * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        pages.address.shape[1],
        pages.pages.shape[1],
        0 if mask is None else mask.blocks.stride(0),
        0 if mask is None else mask.blocks.stride(1),
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HALF=half,
        BLOCK_HALF=block_half,
        KIND=KIND[pages.kv_dtype],
        PAGE_TOKENS=pages.page_tokens,
        ROW_BYTES=pages.row_bytes,
        **part_sizes(policy, mask),
        N_SPLITS=n_splits,
        TILES=tiles,
        BLOCK_SPLITS=block_splits,
        MERGE_HEADS=merge_heads,
        MERGE=merge == "launch",
        PRECISION=precision,
        num_warps=warps,
        # loads go to registers; two tiles in flight would take shared memory from the second program
        num_stages=1,
    )
    if merge == "second":
        # as many warps, so that its sums have the same order
        merge_kernel[(n_kv_heads, n_rows)](
            position,
            partial,
            top,
            out,
            lse,
            out.stride(0),
            out.stride(1),
            GROUP=group,
            HALF=half,
            BLOCK_HALF=block_half,
            N_SPLITS=n_splits,
            BLOCK_SPLITS=block_splits,
            MERGE_HEADS=merge_heads,
            num_warps=warps,
        )
