"""Register tiles of the numba kernels.

Library GEMMs choose another reduction order for other shapes, so their bits depend on how many rows
a call happens to have. Here every output element is one chain of fused multiply-adds, k ascending,
whatever stands beside it: a row's bits are a function of its own operands alone (DESIGN 6.2).
Measured on a 2-core AVX2 machine: 96 GFLOP/s a core, torch's GEMM 87.
"""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types

from .cpu_ir import F32, I64, LANES, Emit, intrinsic

ROWS = 6
"""Rows of the widest tile: 6 x 16 floats are 12 of the 16 registers of AVX2."""


def _void(n_args: int) -> Any:
    return types.void(*(types.int64,) * n_args)


def _accumulate(
    e: Emit, sums: list[Any], rows: list[Any], step_k: Any, b: Any, ld_b: Any, n_k: Any
) -> None:
    """sums[i] += A[i, k] * B[k, 0:16] over k; rows: the addresses of A[i, 0]."""
    builder = e.b
    with cgutils.for_range(builder, n_k) as loop:
        right = e.vector(b, builder.mul(loop.index, ld_b))
        offset = builder.mul(loop.index, step_k)
        for row, total in zip(rows, sums, strict=True):
            left = e.splat(e.scalar(row, offset))
            builder.store(e.fma(left, right, builder.load(total)), total)


def _tile(rows: int, scaled: bool) -> Any:
    """C[i, 0:16] = scale[i] * sum_k A[i, k] * B[k, 0:16] for `rows` rows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, ld_c, a, step_i, step_k, b, ld_b, n_k, scale = args
        e = Emit(builder)
        sums = [cgutils.alloca_once_value(builder, e.const(0.0)) for _ in range(rows)]
        rows_at = [
            builder.add(a, builder.mul(builder.mul(step_i, e.index(i)), e.index(4)))
            for i in range(rows)
        ]
        _accumulate(e, sums, rows_at, step_k, b, ld_b, n_k)
        for i, total in enumerate(sums):
            value = builder.load(total)
            if scaled:
                value = builder.fmul(value, e.splat(e.scalar(scale, e.index(i))))
            e.store(value, c, builder.mul(ld_c, e.index(i)))
        return context.get_dummy_value()

    def tile(typing: Any, c: Any, ld_c: Any, a: Any, step_i: Any, step_k: Any, b: Any, ld_b: Any,
             n_k: Any, scale: Any) -> Any:  # fmt: skip
        return _void(9), codegen

    return intrinsic(tile)


tile_6, tile_4, tile_2, tile_1 = (_tile(n, False) for n in (6, 4, 2, 1))
scaled_6, scaled_4, scaled_2, scaled_1 = (_tile(n, True) for n in (6, 4, 2, 1))


@intrinsic
def max_dot_6(typing: Any, out: Any, keys: Any, queries: Any, n_tiles: Any, n_k: Any) -> Any:
    """out[i] = max over queries of key i . query, for 6 keys.

    keys: address of 6 int64 addresses of rows; queries: [n_tiles, n_k, 16].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, keys, queries, n_tiles, n_k = args
        e = Emit(builder)
        rows = [builder.load(e.pointer(keys, e.index(i), I64, 8)) for i in range(ROWS)]
        tops = [cgutils.alloca_once_value(builder, e.const(float("-inf"))) for _ in range(ROWS)]
        sums = [cgutils.alloca_once_value(builder, e.const(0.0)) for _ in range(ROWS)]
        tile_bytes = builder.mul(n_k, e.index(4 * LANES))
        with cgutils.for_range(builder, n_tiles) as loop:
            for total in sums:
                builder.store(e.const(0.0), total)
            tile = builder.add(queries, builder.mul(loop.index, tile_bytes))
            _accumulate(e, sums, rows, e.index(1), tile, e.index(LANES), n_k)
            for top, total in zip(tops, sums, strict=True):
                builder.store(e.maximum(builder.load(top), builder.load(total)), top)
        for i, top in enumerate(tops):
            e.store(e.reduce("max", builder.load(top)), out, e.index(i), F32)
        return context.get_dummy_value()

    return _void(5), codegen


def _dots(n_x: int, n_w: int) -> Any:
    """out[i, j] = x[i] . w[j] for n_x rows x and n_w rows w: 16 partial sums each, then pairwise,
    then the tail of n_k % 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, ld_out, x, ld_x, w, ld_w, n_k = args
        e = Emit(builder)
        pairs = [(i, j) for i in range(n_x) for j in range(n_w)]
        sums = {p: cgutils.alloca_once_value(builder, e.const(0.0)) for p in pairs}
        x_rows = [builder.add(x, builder.mul(ld_x, e.index(4 * i))) for i in range(n_x)]
        w_rows = [builder.add(w, builder.mul(ld_w, e.index(4 * j))) for j in range(n_w)]
        whole = builder.udiv(n_k, e.index(LANES))
        with cgutils.for_range(builder, whole) as loop:
            offset = builder.mul(loop.index, e.index(LANES))
            rights = [e.vector(row, offset) for row in w_rows]
            for i in range(n_x):
                left = e.vector(x_rows[i], offset)
                for j in range(n_w):
                    total = sums[i, j]
                    builder.store(e.fma(left, rights[j], builder.load(total)), total)
        tails = {p: cgutils.alloca_once(builder, F32) for p in pairs}
        for p in pairs:
            builder.store(e.reduce("add", builder.load(sums[p])), tails[p])
        done = builder.mul(whole, e.index(LANES))
        with cgutils.for_range(builder, builder.sub(n_k, done)) as loop:
            offset = builder.add(done, loop.index)
            for i, j in pairs:
                product = (e.scalar(x_rows[i], offset), e.scalar(w_rows[j], offset))
                builder.store(e.fma(*product, builder.load(tails[i, j])), tails[i, j])
        for i, j in pairs:
            at = builder.add(builder.mul(ld_out, e.index(i)), e.index(j))
            e.store(builder.load(tails[i, j]), out, at, F32)
        return context.get_dummy_value()

    def dots(typing: Any, out: Any, ld_out: Any, x: Any, ld_x: Any, w: Any, ld_w: Any,
             n_k: Any) -> Any:  # fmt: skip
        return _void(7), codegen

    return intrinsic(dots)


dots_1x6, dots_1x3, dots_1x1 = _dots(1, 6), _dots(1, 3), _dots(1, 1)


def _tops(e: Emit, rows: Any, ld: Any, n: Any, out: Any) -> Any:
    """Maxima of 16 columns of n rows to `out`; with 0 in place of -inf, which cannot be subtracted, as a
    vector."""
    lowest = e.const(float("-inf"))
    state = cgutils.alloca_once_value(e.b, lowest)
    with cgutils.for_range(e.b, n) as loop:
        value = e.vector(rows, e.b.mul(loop.index, ld))
        e.b.store(e.maximum(e.b.load(state), value), state)
    top = e.b.load(state)
    e.store(top, out, e.index(0))
    return e.b.select(e.b.fcmp_ordered("==", top, lowest), e.const(0.0), top)


def _columns(store: bool) -> Any:
    """For 16 columns of s [n_keys, ld_s]: the maxima and the sums of 2 ** (s - max), to 16 floats each;
    with `store` also s = 2 ** (s - max). A column of -inf gives zeros, sum 0 and maximum -inf."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        s, ld_s, n_keys, top_out, total_out = args
        e = Emit(builder)
        safe = _tops(e, s, ld_s, n_keys, top_out)
        state = cgutils.alloca_once_value(builder, e.const(0.0))
        with cgutils.for_range(builder, n_keys) as loop:
            at = builder.mul(loop.index, ld_s)
            value = e.exp2(builder.fsub(e.vector(s, at), safe))
            if store:
                e.store(value, s, at)
            builder.store(builder.fadd(builder.load(state), value), state)
        e.store(builder.load(state), total_out, e.index(0))
        return context.get_dummy_value()

    def columns(typing: Any, s: Any, ld_s: Any, n_keys: Any, top_out: Any, total_out: Any) -> Any:
        return _void(5), codegen

    return intrinsic(columns)


softmax_columns, column_ends = _columns(True), _columns(False)


@intrinsic
def merge_columns(
    typing: Any, tops: Any, totals: Any, ld: Any, n: Any, top_out: Any, total_out: Any
) -> Any:
    """What `column_ends` gives for all rows from what it gave for n parts of them, ld floats apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tops, totals, ld, n, top_out, total_out = args
        e = Emit(builder)
        safe = _tops(e, tops, ld, n, top_out)
        state = cgutils.alloca_once_value(builder, e.const(0.0))
        with cgutils.for_range(builder, n) as loop:
            at = builder.mul(loop.index, ld)
            weight = e.exp2(builder.fsub(e.vector(tops, at), safe))
            builder.store(e.fma(e.vector(totals, at), weight, builder.load(state)), state)
        e.store(builder.load(state), total_out, e.index(0))
        return context.get_dummy_value()

    return _void(6), codegen


@intrinsic
def best_above(typing: Any, x: Any, floor: Any, n_vectors: Any) -> Any:
    """max over i of x[i] - floor[i], for n_vectors * 16 floats. All NaN gives NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, floor, n_vectors = args
        e = Emit(builder)
        state = cgutils.alloca_once_value(builder, e.const(float("-inf")))
        with cgutils.for_range(builder, n_vectors) as loop:
            at = builder.mul(loop.index, e.index(LANES))
            value = builder.fsub(e.vector(x, at), e.vector(floor, at))
            builder.store(e.maximum(builder.load(state), value), state)
        return e.reduce("max", builder.load(state))

    return types.float32(*(types.int64,) * 3), codegen


@intrinsic
def exp2_floats(typing: Any, x: Any, n: Any) -> Any:
    """x = 2 ** x for n floats; those up to the next multiple of 16 are overwritten."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, n = args
        e = Emit(builder)
        n_vectors = builder.udiv(builder.add(n, e.index(LANES - 1)), e.index(LANES))
        with cgutils.for_range(builder, n_vectors) as loop:
            at = builder.mul(loop.index, e.index(LANES))
            e.store(e.exp2(e.vector(x, at)), x, at)
        return context.get_dummy_value()

    return _void(2), codegen
