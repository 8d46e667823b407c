"""Elements of stored keys and values as floats, eight at a time: what every format's bits mean."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .by_channel import GROUP
from .cpu_ir import F32, I32, Emit

LANES = 8
WIDE = ir.VectorType(F32, LANES)
_INTS = ir.VectorType(I32, LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
KINDS = ("float32", "float16", "bfloat16", "int8", "float8", "int4", "int4c")
FOUR_BITS = ("int4", "int4c")
SCALED = ("int8", "int4")
"""Kinds whose rows end with the bytes of a float32 scale."""


def load_stored(e: Emit, kind: str, row: Any, at: Any, half: Any) -> Any:
    """Eight stored elements from number `at` on as floats, without the scale of their row, which has
    2 * half elements. Of int4c a value's."""
    if kind == "float32":
        return e.b.load(e.pointer(row, at, WIDE), align=4)
    if kind == "int8":
        return e.b.sitofp(e.b.sext(_load_bytes(e, row, at), _INTS), WIDE)
    if kind == "float8":
        return _float8(e, _load_bytes(e, row, at))
    if kind in FOUR_BITS:
        above = e.b.icmp_signed(">=", at, half)
        raw = _load_bytes(e, row, e.b.select(above, e.b.sub(at, half), at))
        value = _four_bits(e, raw, e.b.select(above, _ints(4), _ints(0)), 8)
        if kind == "int4":
            return value
        group = e.b.udiv(at, e.index(GROUP))
        scale = e.b.load(e.pointer(e.b.add(row, half), group, ir.HalfType(), 2), align=1)
        return e.b.fmul(value, e.splat(e.b.fpext(scale, F32), WIDE))
    raw = e.b.load(e.pointer(row, at, ir.VectorType(ir.IntType(16), LANES), 2), align=2)
    if kind == "float16":
        return e.b.fpext(e.b.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), WIDE)
    return e.b.bitcast(e.b.shl(e.b.zext(raw, _INTS), _ints(16)), WIDE)


def load_pairs(e: Emit, kind: str, row: Any, at: Any, half: Any) -> tuple[Any, Any]:
    """`load_stored` of elements from `at` on and of those that RoPE pairs them with, half a row later;
    at < half. Of int4c a key's codes, 0 to 15, for `in_channels`."""
    if kind in FOUR_BITS:
        raw, zero = _load_bytes(e, row, at), 8 if kind == "int4" else 0
        return _four_bits(e, raw, _ints(0), zero), _four_bits(e, raw, _ints(4), zero)
    above = e.b.add(at, half)
    return load_stored(e, kind, row, at, half), load_stored(e, kind, row, above, half)


def load_channels(e: Emit, table: Any, at: Any, half: Any) -> tuple[Any, Any]:
    """Scales and offsets of eight channels from `at` on, of what ends a block of int4c keys."""
    halves = ir.VectorType(ir.HalfType(), LANES)
    offsets = e.b.add(at, e.b.mul(half, e.index(2)))
    scale, offset = (
        e.b.fpext(e.b.load(e.pointer(table, x, halves, 2), align=1), WIDE) for x in (at, offsets)
    )
    return scale, offset


def in_channels(e: Emit, codes: Any, channels: tuple[Any, Any]) -> Any:
    """Eight codes of an int4c key as floats."""
    scale, offset = channels
    return e.fma(codes, scale, offset)


def items_per_byte(kind: str) -> int:
    """Elements of a scaled row that share a byte."""
    return 2 if kind == "int4" else 1


def _load_bytes(e: Emit, row: Any, at: Any) -> Any:
    return e.b.load(e.pointer(row, at, _BYTES, 1), align=1)


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _four_bits(e: Emit, raw: Any, shift: Any, zero: int) -> Any:
    """The low or (shift 4) high halves of bytes, which hold 0 to 15; `zero` stands for 0."""
    whole = e.b.and_(e.b.lshr(e.b.zext(raw, _INTS), shift), _ints(15))
    return e.b.sitofp(e.b.sub(whole, _ints(zero)), WIDE)


def _float8(e: Emit, raw: Any) -> Any:
    """e4m3: the bits of a float16 that is smaller by 2 ** 8, below its normal numbers too."""
    shorts = ir.VectorType(ir.IntType(16), LANES)
    bits = e.b.shl(e.b.sext(raw, shorts), ir.Constant(shorts, [7] * LANES))
    bits = e.b.and_(bits, ir.Constant(shorts, [0xBF80] * LANES))
    value = e.b.fpext(e.b.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), WIDE)
    value = e.b.fmul(value, e.const(256.0, WIDE))
    nan = ir.Constant(_BYTES, [0x7F] * LANES)
    is_nan = e.b.icmp_signed("==", e.b.and_(raw, nan), nan)
    return e.b.select(is_nan, e.const(float("nan"), WIDE), value)
