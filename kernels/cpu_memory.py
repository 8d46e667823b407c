"""Memory operations of the numba kernels at integer addresses: rows, conversion, RoPE, prefetch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from .cpu_formats import (
    KINDS,
    SCALED,
    WIDE,
    in_channels,
    items_per_byte,
    load_channels,
    load_pairs,
    load_stored,
)
from .cpu_ir import LANES, Emit, intrinsic


def _void(n_args: int) -> Any:
    return types.void(*(types.int64,) * n_args)


def _load(kind: str, rotated: bool) -> Any:
    """One stored row as float32 at dst, rotated or not. n: elements (or pairs), multiple of 8."""
    wide = WIDE

    def scaler(e: Emit, src: Any, half: Any) -> Callable[[Any], Any]:
        """Multiplies by the scale of a row of 2 * half elements, if it has one."""
        if kind not in SCALED:
            return lambda x: x
        n_bytes = e.b.mul(half, e.index(2 // items_per_byte(kind)))
        scale = e.b.load(e.pointer(e.b.add(src, n_bytes), e.index(0)), align=1)
        scales = e.splat(scale, wide)
        return lambda x: e.b.fmul(x, scales)

    def copy(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, n = args
        e = Emit(builder)
        half = builder.udiv(n, e.index(2))
        scaled = scaler(e, src, half)
        with cgutils.for_range(builder, builder.udiv(n, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            e.store(scaled(load_stored(e, kind, src, at, half)), dst, at, wide)
        return context.get_dummy_value()

    def rotate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, n, cos, sin = args
        e = Emit(builder)
        scaled = scaler(e, src, n)
        with cgutils.for_range(builder, builder.udiv(n, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            above = builder.add(at, n)
            first, second = (scaled(x) for x in load_pairs(e, kind, src, at, n))
            c = builder.load(e.pointer(cos, at, wide), align=4)
            s = builder.load(e.pointer(sin, at, wide), align=4)
            minus = builder.fneg(builder.fmul(second, s))
            e.store(e.fma(first, c, minus), dst, at, wide)
            e.store(e.fma(second, c, builder.fmul(first, s)), dst, above, wide)
        return context.get_dummy_value()

    if rotated:

        def load_rotated(typing: Any, dst: Any, src: Any, n: Any, cos: Any, sin: Any) -> Any:
            return _void(5), rotate

        return intrinsic(load_rotated)

    def load(typing: Any, dst: Any, src: Any, n: Any) -> Any:
        return _void(3), copy

    return intrinsic(load)


(load_float32, load_float16, load_bfloat16, load_int8, load_float8, load_int4, load_value) = (
    _load(kind, False) for kind in KINDS
)
(rotate_float32, rotate_float16, rotate_bfloat16, rotate_int8, rotate_float8, rotate_int4) = (
    _load(kind, True) for kind in KINDS[:-1]
)
"""load_value: a value of int4c; its keys need what ends their block, see below."""


@intrinsic
def load_key(typing: Any, dst: Any, src: Any, half: Any, table: Any) -> Any:
    """One int4c key of 2 * half elements as float32; table: what ends its block."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, half, table = args
        e = Emit(builder)
        with cgutils.for_range(builder, builder.udiv(half, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            for codes, where in zip(
                load_pairs(e, "int4c", src, at, half), (at, builder.add(at, half)), strict=True
            ):
                channels = load_channels(e, table, where, half)
                e.store(in_channels(e, codes, channels), dst, where, WIDE)
        return context.get_dummy_value()

    return _void(4), codegen


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for one cache line, for the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emit(builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def peek(typing: Any, address: Any, index: Any) -> Any:
    """int64 number `index` after an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        return builder.load(e.pointer(args[0], args[1], ir.IntType(64), 8))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def zero_float32(typing: Any, dst: Any, n: Any) -> Any:
    """n zeros at an address; n is a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        with cgutils.for_range(builder, builder.udiv(args[1], e.index(LANES))) as loop:
            e.store(e.const(0.0), args[0], builder.mul(loop.index, e.index(LANES)))
        return context.get_dummy_value()

    return _void(2), codegen


@intrinsic
def peek_float(typing: Any, address: Any) -> Any:
    """The float32 at an address of any alignment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        return builder.load(e.pointer(args[0], e.index(0)), align=1)

    return types.float32(types.int64), codegen


@intrinsic
def join_angles(
    typing: Any, dst: Any, n: Any, cos: Any, sin: Any, other_cos: Any, other_sin: Any
) -> Any:
    """cos and sin (n floats each, one after the other) of the sums of two rows of angles."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, n, *rows = args
        e = Emit(builder)
        with cgutils.for_range(builder, builder.udiv(n, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            c, s, c2, s2 = (builder.load(e.pointer(row, at, WIDE), align=4) for row in rows)
            minus = builder.fneg(builder.fmul(s, s2))
            e.store(e.fma(c, c2, minus), dst, at, WIDE)
            e.store(e.fma(s, c2, builder.fmul(c, s2)), dst, builder.add(at, n), WIDE)
        return context.get_dummy_value()

    return _void(6), codegen


@intrinsic
def split_signs(typing: Any, dst: Any, src: Any, n: Any) -> Any:
    """The positive parts of n floats at dst, then their negative parts; n is a multiple of 8. NaN goes
    to both."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, n = args
        e, zero = Emit(builder), ir.Constant(WIDE, [0.0] * 8)
        with cgutils.for_range(builder, builder.udiv(n, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            x = builder.load(e.pointer(src, at, WIDE), align=4)
            positive = builder.select(builder.fcmp_ordered("<", x, zero), zero, x)
            negative = builder.select(builder.fcmp_ordered(">", x, zero), zero, x)
            e.store(positive, dst, at, WIDE)
            e.store(negative, dst, builder.add(at, n), WIDE)
        return context.get_dummy_value()

    return _void(3), codegen


@intrinsic
def turn_tile(typing: Any, dst: Any, src: Any, half: Any, cos: Any, sin: Any) -> Any:
    """Rotate 16 queries laid out as [2 * half, 16] by one row of angles."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, half, cos, sin = args
        e = Emit(builder)
        with cgutils.for_range(builder, half) as loop:
            low = builder.mul(loop.index, e.index(LANES))
            high = builder.add(low, builder.mul(half, e.index(LANES)))
            first, second = e.vector(src, low), e.vector(src, high)
            c, s = e.splat(e.scalar(cos, loop.index)), e.splat(e.scalar(sin, loop.index))
            minus = builder.fneg(builder.fmul(second, s))
            e.store(e.fma(first, c, minus), dst, low)
            e.store(e.fma(second, c, builder.fmul(first, s)), dst, high)
        return context.get_dummy_value()

    return _void(5), codegen


def _pointer(kind: Any) -> Any:
    def at(typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return intrinsic(at)


floats_at, ints_at = _pointer(types.float32), _pointer(types.int64)
"""An address as a pointer, for numba.carray: arrays made so cost no reference counts."""
shorts_at, words_at, bytes_at = (_pointer(k) for k in (types.int16, types.int32, types.int8))


@intrinsic
def poke(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Set the index-th int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        builder.store(args[2], e.pointer(args[0], args[1], ir.IntType(64), 8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
