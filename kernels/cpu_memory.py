"""Memory operations of the numba kernels at integer addresses: rows, conversion, RoPE, prefetch."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from .cpu_ir import F32, I32, LANES, Emit, intrinsic


def _void(n_args: int) -> Any:
    return types.void(*(types.int64,) * n_args)


def _load(kind: str, rotated: bool) -> Any:
    """One stored row as float32 at dst, rotated or not. n: elements (or pairs), multiple of 8."""
    wide = ir.VectorType(F32, 8)

    def read(e: Emit, src: Any, at: Any) -> Any:
        if kind == "float32":
            return e.b.load(e.pointer(src, at, wide), align=4)
        raw = e.b.load(e.pointer(src, at, ir.VectorType(ir.IntType(16), 8), 2), align=2)
        if kind == "float16":
            return e.b.fpext(e.b.bitcast(raw, ir.VectorType(ir.HalfType(), 8)), wide)
        ints = ir.VectorType(I32, 8)
        shifted = e.b.shl(e.b.zext(raw, ints), ir.Constant(ints, [16] * 8))
        return e.b.bitcast(shifted, wide)

    def copy(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, n = args
        e = Emit(builder)
        with cgutils.for_range(builder, builder.udiv(n, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            e.store(read(e, src, at), dst, at, wide)
        return context.get_dummy_value()

    def rotate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, n, cos, sin = args
        e = Emit(builder)
        with cgutils.for_range(builder, builder.udiv(n, e.index(8))) as loop:
            at = builder.mul(loop.index, e.index(8))
            above = builder.add(at, n)
            first, second = read(e, src, at), read(e, src, above)
            c = builder.load(e.pointer(cos, at, wide), align=4)
            s = builder.load(e.pointer(sin, at, wide), align=4)
            minus = builder.fsub(e.const(0.0, wide), builder.fmul(second, s))
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


load_float32, load_float16, load_bfloat16 = (
    _load(kind, False) for kind in ("float32", "float16", "bfloat16")
)
rotate_float32, rotate_float16, rotate_bfloat16 = (
    _load(kind, True) for kind in ("float32", "float16", "bfloat16")
)


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for one cache line, for the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kinds = [pointer.type, I32, I32, I32]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0"
        )
        builder.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 2, 1))])
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
