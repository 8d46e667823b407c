"""x W^T for one task of output rows, in compiled code: each weight is read once for up to 8 rows of x.

One row streams weights best with nothing but loads: the hardware sees what comes next. With several
rows the arithmetic hides the stream from it, so tiles ask for their weights some rows ahead; and
where the rows of x do not fit the first-level cache together, K goes by in pieces, between which the
16 partial sums of an output are kept. Either way an output is the one chain of fused multiply-adds
of `cpu_tiles.dots_1x1`, so its bits are the same. Measured with 8 rows on 2 cores with AVX-512:
50 GB/s of weights at K = 576 (200 GFLOP/s) and 43 at 1536, where 2 x 2 tiles gave 22 and 20.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types

from .cpu_compile import compiled
from .cpu_ir import F32, I32, LANES, VEC, Emit, intrinsic
from .cpu_tiles import dots_1x1

GROUP = 8
"""Rows of x that share one reading of the weights."""
PANEL = 16
"""Weight rows whose partial sums are kept while K goes by in pieces."""
SUMS_FLOATS = PANEL * GROUP * LANES
"""Scratch that `products` needs."""
HEIGHT = 4 if binding.get_host_cpu_features().get("avx512f") else 2
"""Rows of x in a tile: with 2 weight rows, 4 make 8 sums, which are all 16 registers of AVX2."""
WHOLE_BYTES = 20 << 10
"""Rows of x up to this stay in the first-level cache (32 KB) while the weights stream through."""
PIECE_BYTES = 12 << 10
AHEAD_BYTES = 10 << 10
"""Weights are asked for so far ahead: at memory speed, for longer than memory takes to answer."""

_SUM_ROW = GROUP * LANES


def _ask_for(builder: Any, address: Any) -> None:
    """Prefetch one cache line for the second-level cache."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 2, 1))])


def _tile(n_x: int, n_w: int) -> Any:
    """Products of n_x rows x and n_w rows w over one piece of K.

    begins: 1 for the first piece, else the partial sums are taken from `sums` [n_w, GROUP, 16].
    tail: -1 before the last piece, and the sums go back there; else the elements that follow the
    last whole vector, and out[i, j] is written.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, ld_out, sums_at, x, ld_x, w, ld_w, n_vectors, ahead, begins, tail = args
        e = Emit(builder)
        pairs = [(i, j) for i in range(n_x) for j in range(n_w)]
        sums = {p: cgutils.alloca_once(builder, VEC) for p in pairs}
        totals = {p: cgutils.alloca_once(builder, F32) for p in pairs}
        places = {(i, j): e.index(j * _SUM_ROW + i * LANES) for i, j in pairs}
        for p in pairs:
            builder.store(e.const(0.0), sums[p])
        with builder.if_then(builder.icmp_signed("==", begins, e.index(0))):
            for p in pairs:
                builder.store(e.vector(sums_at, places[p]), sums[p])
        x_rows = [builder.add(x, builder.mul(ld_x, e.index(4 * i))) for i in range(n_x)]
        w_rows = [builder.add(w, builder.mul(ld_w, e.index(4 * j))) for j in range(n_w)]
        with cgutils.for_range(builder, n_vectors) as loop:
            offset = builder.mul(loop.index, e.index(LANES))
            n_bytes = builder.add(ahead, builder.mul(loop.index, e.index(4 * LANES)))
            for row in w_rows:
                _ask_for(builder, builder.add(row, n_bytes))
            rights = [e.vector(row, offset) for row in w_rows]
            for i in range(n_x):
                left = e.vector(x_rows[i], offset)
                for j in range(n_w):
                    total = sums[i, j]
                    builder.store(e.fma(left, rights[j], builder.load(total)), total)
        with builder.if_else(builder.icmp_signed("<", tail, e.index(0))) as (more, last):
            with more:
                for p in pairs:
                    e.store(builder.load(sums[p]), sums_at, places[p])
            with last:
                for p in pairs:
                    builder.store(e.reduce("add", builder.load(sums[p])), totals[p])
                done = builder.mul(n_vectors, e.index(LANES))
                with cgutils.for_range(builder, tail) as loop:
                    offset = builder.add(done, loop.index)
                    for i, j in pairs:
                        product = (e.scalar(x_rows[i], offset), e.scalar(w_rows[j], offset))
                        builder.store(e.fma(*product, builder.load(totals[i, j])), totals[i, j])
                for i, j in pairs:
                    at = builder.add(builder.mul(ld_out, e.index(i)), e.index(j))
                    e.store(builder.load(totals[i, j]), out, at, F32)
        return context.get_dummy_value()

    def tile(typing: Any, out: Any, ld_out: Any, sums: Any, x: Any, ld_x: Any, w: Any, ld_w: Any,
             n_vectors: Any, ahead: Any, begins: Any, tail: Any) -> Any:  # fmt: skip
        return types.void(*(types.int64,) * 11), codegen

    return intrinsic(tile)


_1x1, _2x1, _3x1, _4x1 = (_tile(n, 1) for n in (1, 2, 3, 4))
_1x2, _2x2, _3x2, _4x2 = (_tile(n, 2) for n in (1, 2, 3, 4))


@compiled
def _row_of_tiles(out, ld_out, sums, x, ld_x, n_x, w, n_w, ld_w, n_vectors, ahead, begins, tail):
    """One or two weight rows with n_x rows of x."""
    i = 0
    while i < n_x:
        height = min(HEIGHT, n_x - i)
        at, mine, left = out + 4 * i * ld_out, sums + 4 * LANES * i, x + 4 * i * ld_x
        if n_w == 2:
            if height == 4:
                _4x2(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
            elif height == 3:
                _3x2(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
            elif height == 2:
                _2x2(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
            else:
                _1x2(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
        elif height == 4:
            _4x1(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
        elif height == 3:
            _3x1(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
        elif height == 2:
            _2x1(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
        else:
            _1x1(at, ld_out, mine, left, ld_x, w, ld_w, n_vectors, ahead, begins, tail)
        i += height


@compiled
def _group(out, ld_out, x, ld_x, n_x, w, n_w, n_k, sums):
    """2 to GROUP rows of x."""
    n_vectors = n_k // LANES
    piece = n_vectors
    if 4 * LANES * n_vectors * n_x > WHOLE_BYTES:
        piece = max(1, PIECE_BYTES // (4 * LANES * n_x))
    piece = max(1, piece)
    # two weight rows share the loads of x; the fewer rows of x, the more one stream is worth
    width = 2 if n_x >= 4 else 1
    ahead = 4 * n_k * -(-AHEAD_BYTES // (4 * min(n_k, LANES * piece)))
    for panel in range(0, n_w, PANEL):
        end = min(panel + PANEL, n_w)
        for k in range(0, max(1, n_vectors), piece):
            size = min(piece, n_vectors - k)
            begins = 1 if k == 0 else 0
            tail = n_k - LANES * n_vectors if k + size == n_vectors else -1
            j = panel
            while j < end:
                n_mine = min(width, end - j)
                _row_of_tiles(
                    out + 4 * j, ld_out, sums + 4 * _SUM_ROW * (j - panel),
                    x + 4 * LANES * k, ld_x, n_x, w + 4 * (j * n_k + LANES * k), n_mine, n_k,
                    size, ahead, begins, tail,
                )  # fmt: skip
                j += n_mine


@compiled
def products(out, ld_out, x, ld_x, n_x, w, n_w, n_k, sums):
    """out[i, j] = x[i] . w[j]; w: n_w contiguous rows of n_k. Addresses; ld in elements.

    sums: SUMS_FLOATS of scratch.
    """
    for i in range(0, n_x, GROUP):
        height = min(GROUP, n_x - i)
        at, left = out + 4 * i * ld_out, x + 4 * i * ld_x
        if height == 1:
            for j in range(n_w):
                dots_1x1(at + 4 * j, ld_out, left, ld_x, w + 4 * j * n_k, n_k, n_k)
        else:
            _group(at, ld_out, left, ld_x, height, w, n_w, n_k, sums)
