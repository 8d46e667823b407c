"""New keys and values into their pages, rounded to the stored format, once (DESIGN 6.5)."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import types

from .cpu_compile import compiled
from .cpu_ir import F32, intrinsic
from .cpu_memory import bytes_at, floats_at, shorts_at, words_at
from .cpu_pages import FLOAT8, INT8

_I16 = ir.IntType(16)


@intrinsic
def half_bits(typing: Any, x: Any) -> Any:
    """A float32 as float16, round to nearest even: its bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)

    return types.int16(types.float32), codegen


@intrinsic
def _float_bits(typing: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _as_float(typing: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


@compiled
def append(raw, kind, slots, offsets, k, v, most):
    """Write tokens; returns the first token that holds a number which is not finite once stored, or -1.

    raw: the bank's layer as signed integers of an element's size, [n_slots, 2, page_tokens, row]; kind:
    number in `cpu_pages.KINDS`; slots: int64 [Hkv, T]; offsets: int64 [T]; k, v: float32 [Hkv, T, D];
    most: the largest number the format holds.
    """
    n_heads, n_tokens, head_dim = k.shape
    wrong = -1
    for t in range(n_tokens - 1, -1, -1):
        for h in range(n_heads):
            for side in range(2):
                x = k[h, t] if side == 0 else v[h, t]
                row = raw[slots[h, t], side, offsets[t]]
                if not _store(row, kind, x, head_dim, most):
                    wrong = t
    return wrong


@compiled
def append_row(dst, kind, src, head_dim, most):
    """One key or value of float32 at src into a stored row at dst; False if it is not finite there."""
    x = carray(floats_at(src), (head_dim,))
    if kind == 0:
        return _store(carray(words_at(dst), (head_dim,)), kind, x, head_dim, most)
    if kind < 3:
        return _store(carray(shorts_at(dst), (head_dim,)), kind, x, head_dim, most)
    return _store(carray(bytes_at(dst), (head_dim + 4,)), kind, x, head_dim, most)


@compiled
def _store(row, kind, x, head_dim, most):
    good = True
    if kind == 0:
        for d in range(head_dim):
            row[d] = _float_bits(x[d])
            good &= abs(x[d]) <= most
    elif kind == 1:
        for d in range(head_dim):
            row[d] = half_bits(x[d])
            good &= abs(x[d]) <= most
    elif kind == 2:
        for d in range(head_dim):
            bits = np.uint32(_float_bits(x[d]))
            # a NaN stays one: the rounding could carry its mantissa away
            even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            row[d] = np.int16((bits + even) >> np.uint32(16)) if x[d] == x[d] else np.int16(0x7FC0)
            good &= abs(x[d]) <= most
    elif kind == FLOAT8:
        for d in range(head_dim):
            row[d] = _float8_bits(x[d], most)
            good &= abs(x[d]) <= most
    else:
        good = _store_whole(row, kind, x, head_dim, most)
    return good


@compiled
def _float8_bits(x, most):
    """A float32 as e4m3, round to nearest even; NaN for what is larger than `most`."""
    bits = np.uint32(_float_bits(x))
    sign, size = (bits >> np.uint32(24)) & np.uint32(0x80), abs(x)
    if not size <= most:
        code = np.uint32(0x7F)
    elif size < np.float32(2.0**-6):  # no normal number: multiples of 2 ** -9
        code = np.uint32(np.rint(size * np.float32(2.0**9)))
    else:
        even = np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))
        # exponents are counted from -7, not from -127
        code = (((bits & np.uint32(0x7FFFFFFF)) + even) >> np.uint32(20)) - np.uint32(120 << 3)
    return np.int8(code | sign)


@compiled
def _store_whole(row, kind, x, head_dim, most):
    """As `paged.pack` of int8 and int4: whole numbers, then the four bytes of the scale."""
    good = True
    top = np.float32(0.0)
    for d in range(head_dim):
        good &= abs(x[d]) <= most
        if abs(x[d]) > top:
            top = abs(x[d])
    limit = np.float32(127.0) if kind == INT8 else np.float32(7.0)
    scale = top / limit
    least = max(scale, np.float32(1.1754943508222875e-38))
    if kind == INT8:
        n_bytes = head_dim
        for d in range(head_dim):
            row[d] = np.int8(_whole(x[d], least, limit)) if good else np.int8(0)
    else:
        n_bytes = head_dim // 2
        for d in range(n_bytes):
            low = _whole(x[d], least, limit) + 8 if good else 8
            high = _whole(x[d + n_bytes], least, limit) + 8 if good else 8
            row[d] = np.int8(low | (high << 4))
    bits = _float_bits(scale if good else np.float32(np.nan))
    for i in range(4):
        row[n_bytes + i] = np.int8((bits >> (8 * i)) & 0xFF)
    return good


@compiled
def _whole(x, scale, limit):
    return int(min(max(np.rint(x / scale), -limit), limit))
