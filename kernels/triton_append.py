"""New keys and values into their pages on the device, with the bits of `append.append_torch`.

Rounding to bfloat16 and float8 is done on the bits, so that every machine, and the interpreter, rounds
half to even.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .gpu_pages import KIND, DevicePages
from .paged import MOST_OF
from .triton_attend_common import rows_of

CHUNK_TOKENS = 16
"""Tokens of a program of a prefill chunk."""
LEAST_SCALE: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
"""Smallest normal float32."""


@triton.jit
def bfloat16_bits(x):
    """int16, half to even. A NaN stays one: the rounding could carry its mantissa away."""
    bits = x.to(tl.int32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, even, 0x7FC0).to(tl.int16)


@triton.jit
def float8_bits(x):
    """e4m3 as int8, half to even; what is larger than its largest number becomes that one, as in torch."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # 3 of 23 bits of mantissa stay, and the bias falls from 127 to 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the code counts steps of 2^-9, which are those of float32 at 2^14
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(size < 448.0, code, 0x7E)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.int8)


@triton.jit
def whole(x, scale, MOST: tl.constexpr):
    """x / scale [N, BLOCK_HALF] as whole numbers in [-MOST, MOST], int32; NaN gives 0."""
    ratio = tl.div_rn(x, tl.maximum(scale, LEAST_SCALE)[:, None])
    # a float32 of 2^23 and more has no fraction: the sum rounds half to even
    near = (ratio + 12582912.0) - 12582912.0
    near = tl.minimum(tl.maximum(near, -MOST), MOST)
    return tl.where(ratio == ratio, near, 0.0).to(tl.int32)


@triton.jit
def row_scale(first, second, MOST: tl.constexpr):
    """float32 [N]: the largest number of a row is MOST of it; NaN if there is one in the row."""
    strange = tl.maximum((first != first).to(tl.int32), (second != second).to(tl.int32))
    first = tl.where(first == first, tl.abs(first), 0.0)
    second = tl.where(second == second, tl.abs(second), 0.0)
    top = tl.max(tl.maximum(first, second), 1)
    return tl.where(tl.max(strange, 1) > 0, float("nan"), tl.div_rn(top, MOST))


@triton.jit
def store_rows(row, live, column, first, second, HALF: tl.constexpr, KIND: tl.constexpr):
    """Stores keys or values, the inverse of `load_halves`. row: int64 [N], byte addresses; first, second:
    float32 [N, BLOCK_HALF], zeros from column HALF on."""
    mask = live[:, None] & (column < HALF)[None, :]
    if KIND == 5:
        scale = row_scale(first, second, 7.0)
        byte = (whole(first, scale, 7.0) + 8) | ((whole(second, scale, 7.0) + 8) << 4)
        at = row.to(tl.pointer_type(tl.uint8))
        tl.store(at[:, None] + column[None, :], byte.to(tl.uint8), mask=mask)
        tl.store((row + HALF).to(tl.pointer_type(tl.float32)), scale, mask=live)
    elif KIND == 3:
        scale = row_scale(first, second, 127.0)
        at = row.to(tl.pointer_type(tl.int8))[:, None] + column[None, :]
        tl.store(at, whole(first, scale, 127.0).to(tl.int8), mask=mask)
        tl.store(at + HALF, whole(second, scale, 127.0).to(tl.int8), mask=mask)
        tl.store((row + 2 * HALF).to(tl.pointer_type(tl.float32)), scale, mask=live)
    else:
        if KIND == 0:
            at = row.to(tl.pointer_type(tl.float32))
        elif KIND == 1:
            at = row.to(tl.pointer_type(tl.float16))
            first, second = first.to(tl.float16), second.to(tl.float16)
        elif KIND == 2:
            at = row.to(tl.pointer_type(tl.int16))
            first, second = bfloat16_bits(first), bfloat16_bits(second)
        else:
            at = row.to(tl.pointer_type(tl.int8))
            first, second = float8_bits(first), float8_bits(second)
        at = tl.multiple_of(at, 16)[:, None] + column[None, :]
        tl.store(at, first, mask=mask)
        tl.store(at + HALF, second, mask=mask)


@triton.jit
def append_rows(
    x, at, item, row, live, most, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, KIND: tl.constexpr
):
    """Stores rows of x at element offsets int64 [N], item apart; returns how many numbers of them are not
    finite once stored. Of the numbers given, since formats with a scale hide which one it was."""
    column = tl.arange(0, BLOCK_HALF)
    mask = live[:, None] & (column < HALF)[None, :]
    source = x + at[:, None] + (column * item)[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF * item, mask=mask, other=0.0).to(tl.float32)
    store_rows(row, live, column, first, second, HALF, KIND)
    fine = (tl.abs(first) <= most) & (tl.abs(second) <= most)
    return tl.sum(tl.sum(tl.where(fine, 0, 1), 1), 0)


@triton.jit
def append_kernel(
    position, n_existing, k, v, bad, address, pages, most, k_row, k_head, k_item, v_row, v_head,
    v_item, n_page_ids, most_pages, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    KIND: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr,
):  # fmt: skip
    """Program (KV head, row): one key and one value."""
    kv_head, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = tl.load(position + b)
    if (p >= 0) & (p >= tl.load(n_existing + b)):
        token = p.to(tl.int32) + tl.arange(0, 1)
        live = token >= 0
        row = rows_of(
            address,
            pages + b * most_pages,
            kv_head,
            n_page_ids,
            token,
            live,
            PAGE_TOKENS,
            ROW_BYTES,
        )
        none = tl.arange(0, 1).to(tl.int64)
        k_at, v_at = none + b * k_row + kv_head * k_head, none + b * v_row + kv_head * v_head
        wrong = append_rows(k, k_at, k_item, row, live, most, HALF, BLOCK_HALF, KIND)
        row += PAGE_TOKENS * ROW_BYTES
        wrong += append_rows(v, v_at, v_item, row, live, most, HALF, BLOCK_HALF, KIND)
        if wrong > 0:
            tl.store(bad + b, 1)


@triton.jit(do_not_specialize=["row", "start", "n_tokens"])
def append_chunk_kernel(
    k, v, bad, address, pages, row, start, n_tokens, most, k_head, k_token, k_item, v_head, v_token,
    v_item, n_page_ids, most_pages, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    KIND: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (run of TOKENS tokens, KV head)."""
    kv_head, b = tl.program_id(1).to(tl.int64), row.to(tl.int64)
    lane = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = lane < n_tokens
    at = rows_of(
        address, pages + b * most_pages, kv_head, n_page_ids, start + lane, live, PAGE_TOKENS,
        ROW_BYTES,
    )  # fmt: skip
    k_at = lane.to(tl.int64) * k_token + kv_head * k_head
    v_at = lane.to(tl.int64) * v_token + kv_head * v_head
    wrong = append_rows(k, k_at, k_item, at, live, most, HALF, BLOCK_HALF, KIND)
    at += PAGE_TOKENS * ROW_BYTES
    wrong += append_rows(v, v_at, v_item, at, live, most, HALF, BLOCK_HALF, KIND)
    if wrong > 0:
        tl.store(bad + b, 1)


def append_device(
    pages: DevicePages, position: Tensor, k: Tensor, v: Tensor, n_existing: Tensor, bad: Tensor
) -> None:
    """Stores the key and value of one token per row in its page, rounded as `paged.pack` does.

    position, n_existing: int64 [B]; k, v: [B, Hkv, D] float32 or 16 bit, any strides; bad: int32 [B]. A row
    whose position is before n_existing (stored KV is never overwritten) or -1 stores nothing. bad[b] is
    set to 1, and never cleared, if a number of the row is not finite once stored.
    """
    append_kernel[(pages.n_kv_heads, position.shape[0])](
        position,
        n_existing,
        k,
        v,
        bad,
        pages.address,
        pages.pages,
        MOST_OF[pages.kv_dtype],
        *k.stride(),
        *v.stride(),
        pages.address.shape[1],
        pages.pages.shape[1],
        **_sizes(pages),
        num_warps=1,
    )


def append_chunk_device(
    pages: DevicePages, row: int, start: int, k: Tensor, v: Tensor, bad: Tensor
) -> None:
    """`append_device` for the tokens from start on of one row: k, v [Hkv, T, D]; bad: int32 [B], of which
    bad[row] is set. All of them are stored."""
    n_tokens = k.shape[1]
    append_chunk_kernel[(-(-n_tokens // CHUNK_TOKENS), pages.n_kv_heads)](
        k,
        v,
        bad,
        pages.address,
        pages.pages,
        row,
        start,
        n_tokens,
        MOST_OF[pages.kv_dtype],
        *k.stride(),
        *v.stride(),
        pages.address.shape[1],
        pages.pages.shape[1],
        **_sizes(pages),
        TOKENS=CHUNK_TOKENS,
        num_warps=4,
    )


def _sizes(pages: DevicePages) -> dict[str, int]:
    half = pages.head_dim // 2
    return {
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(half),
        "KIND": KIND[pages.kv_dtype],
        "PAGE_TOKENS": pages.page_tokens,
        "ROW_BYTES": pages.row_bytes,
    }
