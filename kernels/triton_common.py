"""What the Triton kernels share: reading stored keys and values, angles, ordered numbers."""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

FINE: tl.constexpr = tl.constexpr(4096)
"""Distances of the fine table, as `rope.FINE`."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NO_SCORE: tl.constexpr = tl.constexpr(-1.0e30)
"""Of masked logits: far below any other, and no NaN comes of it as of two infinities."""


@triton.jit
def load_halves(row, live, column, half: tl.constexpr, kind: tl.constexpr):
    """Stored keys or values as the two halves of a head that RoPE pairs.

    row: int64 [N], byte addresses; live: bool [N], others give zeros; column: [BLOCK_HALF] from 0 on,
    those from half on give zeros. Returns two float32 [N, BLOCK_HALF].
    """
    mask = live[:, None] & (column < half)[None, :]
    if kind == 5:  # two 4-bit numbers in a byte, low one in the first half; then the row's scale
        # half a head and a float32 scale: rows are whole words, which a thread loads at once
        at = tl.multiple_of(row.to(tl.pointer_type(tl.uint8)), 4)
        byte = tl.load(at[:, None] + column[None, :], mask=mask, other=136)  # two zeros
        scale = tl.load((row + half).to(tl.pointer_type(tl.float32)), mask=live, other=0.0)
        low = (byte & 15).to(tl.float32) - 8.0
        high = (byte >> 4).to(tl.float32) - 8.0
        return low * scale[:, None], high * scale[:, None]
    elif kind == 3:
        at = tl.multiple_of(row.to(tl.pointer_type(tl.int8)), 4)
        first = tl.load(at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
        second = tl.load(at[:, None] + (column + half)[None, :], mask=mask, other=0).to(tl.float32)
        scale = tl.load((row + 2 * half).to(tl.pointer_type(tl.float32)), mask=live, other=0.0)
        return first * scale[:, None], second * scale[:, None]
    else:
        if kind == 0:
            at = row.to(tl.pointer_type(tl.float32))
        elif kind == 1:
            at = row.to(tl.pointer_type(tl.float16))
        elif kind == 2:
            at = row.to(tl.pointer_type(tl.bfloat16))
        else:
            at = row.to(tl.pointer_type(tl.float8e4nv))
        # rows of these formats are whole vectors: wide loads
        at = tl.multiple_of(at, 16)
        first = tl.load(at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at[:, None] + (column + half)[None, :], mask=mask, other=0.0)
        return first, second.to(tl.float32)


@triton.jit
def turn_of(distance, live, column, half: tl.constexpr, fine_cos, fine_sin, coarse_cos, coarse_sin):
    """cos and sin [N, BLOCK_HALF] of signed distances [N]; where not live, of no use but finite."""
    far = tl.where(live, tl.abs(distance), 0)
    fine = (far % FINE).to(tl.int32)
    coarse = (far // FINE).to(tl.int32)
    mask = (column < half)[None, :]
    at_fine = fine[:, None] * half + column[None, :]
    at_coarse = coarse[:, None] * half + column[None, :]
    cos_f = tl.load(fine_cos + at_fine, mask=mask, other=0.0)
    sin_f = tl.load(fine_sin + at_fine, mask=mask, other=0.0)
    cos_c = tl.load(coarse_cos + at_coarse, mask=mask, other=0.0)
    sin_c = tl.load(coarse_sin + at_coarse, mask=mask, other=0.0)
    cos = cos_f * cos_c - sin_f * sin_c
    sin = sin_f * cos_c + cos_f * sin_c
    return cos, tl.where((distance < 0)[:, None], -sin, sin)


@triton.jit
def rotate(first, second, cos, sin):
    """Halves of keys or queries, turned forward by the angles."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def ordered(score):
    """int32 that order as the float32 scores do. NaN counts as best, both zeros are equal."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit
def is_due(position, fresh, offset, refresh: tl.constexpr):
    """Whether a stage is recomputed at this position (DESIGN 6.3): `scheduler.refresh_level` keyed by
    one stage, since each interval divides those before. A row in its first step (fresh) has all due;
    an empty place of the batch (position -1) has none."""
    return (position >= 0) & ((fresh != 0) | ((position + offset) % refresh == 0))


def warps_of(n_items: int) -> int:
    """Warps for a tile of so many numbers: 32 a thread, at least 1 and at most 8 warps."""
    return int(max(1, min(8, triton.next_power_of_2(max(1, n_items // 1024)))))
