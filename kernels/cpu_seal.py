"""Full blocks of keys and values into their pages in int4c: `by_channel.pack_keys` and `pack_values`."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from .by_channel import BLOCK_TOKENS, GROUP, LEAST_SCALE, row_nbytes
from .cpu_append import half_bits
from .cpu_compile import compiled
from .cpu_ir import F32, intrinsic

_LEAST = np.float32(LEAST_SCALE)
_row_nbytes = compiled(row_nbytes)


@intrinsic
def _half_value(typing: Any, bits: Any) -> Any:
    """The float16 of these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), F32)

    return types.float32(types.int16), codegen


@compiled
def seal(raw, slots, blocks, k, v):
    """raw: int8 [n_slots, 2, page_tokens * row_nbytes]; slots: int64 [Hkv, n]; blocks: int64 [n], number of
    a block in its page; k, v: float32 [Hkv, n * 64, D], finite in float16."""
    n_heads, _, head_dim = k.shape
    row_bytes = _row_nbytes(head_dim)
    for i in range(len(blocks)):
        first = i * BLOCK_TOKENS
        at = blocks[i] * BLOCK_TOKENS * row_bytes
        for h in range(n_heads):
            leaf = raw[slots[h, i]]
            _seal_keys(
                leaf[0, at : at + BLOCK_TOKENS * row_bytes], k[h, first : first + BLOCK_TOKENS]
            )
            for t in range(BLOCK_TOKENS):
                row = leaf[1, at + t * row_bytes : at + (t + 1) * row_bytes]
                _seal_value(row, v[h, first + t])


@compiled
def _seal_keys(out, k):
    half = k.shape[1] // 2
    table = BLOCK_TOKENS * half
    for d in range(half):
        low, scale = _channel(out, table, k, d)
        low_above, scale_above = _channel(out, table, k, d + half)
        for t in range(BLOCK_TOKENS):
            code = _code(k[t, d] - low, scale)
            out[t * half + d] = np.int8(
                code | (_code(k[t, d + half] - low_above, scale_above) << 4)
            )


@compiled
def _channel(out, table, k, d):
    """Offset and scale of channel d, which are stored."""
    low = high = k[0, d]
    for t in range(1, BLOCK_TOKENS):
        low, high = min(low, k[t, d]), max(high, k[t, d])
    low = _put_half(out, table + 2 * (k.shape[1] + d), low)
    return low, _put_half(out, table + 2 * d, max((high - low) / np.float32(15.0), _LEAST))


@compiled
def _code(x, scale):
    return int(min(max(np.rint(x / scale), np.float32(0.0)), np.float32(15.0)))


@compiled
def _seal_value(out, v):
    half = len(v) // 2
    for d in range(half):
        out[d] = 0
    for group in range(len(v) // GROUP):
        top = np.float32(0.0)
        for d in range(group * GROUP, (group + 1) * GROUP):
            top = max(top, abs(v[d]))
        scale = _put_half(out, half + 2 * group, max(top / np.float32(7.0), _LEAST))
        for d in range(group * GROUP, (group + 1) * GROUP):
            code = int(min(max(np.rint(v[d] / scale), np.float32(-7.0)), np.float32(7.0))) + 8
            if d < half:
                out[d] = np.int8(out[d] | code)
            else:
                out[d - half] = np.int8(out[d - half] | (code << 4))


@compiled
def _put_half(out, at, x):
    """Stores a float32 as float16, and returns it as it is then."""
    bits = half_bits(x)
    out[at], out[at + 1] = np.int8(bits & 0xFF), np.int8((bits >> 8) & 0xFF)
    return _half_value(bits)
