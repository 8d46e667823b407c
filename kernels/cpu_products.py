"""x W^T for one task of output rows, in compiled code: each weight is read once for up to 8 rows of x.

One row streams weights best with nothing but loads: the hardware sees what comes next. With several
rows the arithmetic hides the stream from it, so tiles ask for their weights some rows ahead; and
where the rows of x do not fit the first-level cache together, K goes by in pieces, between which the
16 partial sums of an output are kept. Either way an output is the one chain of fused multiply-adds
of `cpu_tiles.dots_1x1`, so its bits are the same. Measured on a core with AVX-512 that reads 33 GB/s:
with 8 rows 25 GB/s of weights at K = 576 (100 GFLOP/s) and 20 at 1536 and 4096, where tiles of 2 x 2
gave 11 and less.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import binding
from numba.core import cgutils, types

from .cpu_compile import compiled
from .cpu_ir import F32, LANES, VEC, Emit, intrinsic
from .cpu_tiles import dots_1x1


def _has(feature: str) -> bool:
    try:
        return bool(binding.get_host_cpu_features().get(feature))
    except RuntimeError:  # LLVM does not know this machine
        return False


GROUP = 8
"""Rows of x that share one reading of the weights."""
PANEL = 16
"""Weight rows whose partial sums are kept while K goes by in pieces."""
SUMS_FLOATS = PANEL * GROUP * LANES
"""Scratch that `products` needs."""
HEIGHT = 4 if _has("avx512f") else 2
"""Rows of x beside 2 of w in a tile: 4 make 8 sums, which are all 16 registers of AVX2."""
WHOLE_BYTES = 20 << 10
"""Rows of x up to this stay in the first-level cache (32 KB) while the weights stream through."""
PIECE_BYTES = 10 << 10
AHEAD_BYTES = 20 << 10
"""Weights are asked for so far ahead: at memory speed, for longer than memory takes to answer."""
AHEAD_BYTES_OF_TWO = 2 << 10
"""With two rows of x the hardware still sees the stream, and only needs a start."""

_SUM_ROW = GROUP * LANES


def _tile(
    e: Emit, n_x: int, n_w: int, asks: bool, out: Any, ld_out: Any, sums_at: Any, x: Any, ld_x: Any,
    w: Any, ld_w: Any, n_vectors: Any, ahead: Any, begins: Any, tail: Any,
) -> None:  # fmt: skip
    """Products of n_x rows x and n_w rows w over one piece of K; asks: for the weights ahead."""
    builder = e.b
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
        if asks:
            n_bytes = builder.add(ahead, builder.mul(offset, e.index(4)))
            for row in w_rows:
                e.prefetch(builder.add(row, n_bytes))
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


def _tiles(n_x: int, n_w: int, height: int) -> Any:
    """Products of n_x rows x, `height` at a time, with n_rows rows w, n_w at a time.

    begins: 1 for the first piece of K, else the partial sums are taken from `sums` [n_rows, GROUP,
    16]. tail: -1 before the last piece, and the sums go back there; else the elements that follow
    the last whole vector, and out is written. The loops are in here because a call for each tile
    would end the run of loads that memory sees.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, ld_out, sums, x, ld_x, w, ld_w, n_rows, *rest = args
        e = Emit(builder)
        with cgutils.for_range(builder, builder.udiv(n_rows, e.index(n_w))) as loop:
            row = builder.mul(loop.index, e.index(n_w))
            at = builder.add(out, builder.mul(row, e.index(4)))
            mine = builder.add(sums, builder.mul(row, e.index(4 * _SUM_ROW)))
            right = builder.add(w, builder.mul(builder.mul(row, ld_w), e.index(4)))
            for i in range(0, n_x, height):
                to = builder.add(at, builder.mul(ld_out, e.index(4 * i)))
                kept = builder.add(mine, e.index(4 * LANES * i))
                left = builder.add(x, builder.mul(ld_x, e.index(4 * i)))
                n = min(height, n_x - i)
                _tile(e, n, n_w, i == 0, to, ld_out, kept, left, ld_x, right, ld_w, *rest)
        return context.get_dummy_value()

    def tiles(typing: Any, out: Any, ld_out: Any, sums: Any, x: Any, ld_x: Any, w: Any, ld_w: Any,
              n_rows: Any, n_vectors: Any, ahead: Any, begins: Any, tail: Any) -> Any:  # fmt: skip
        return types.void(*(types.int64,) * 12), codegen

    return intrinsic(tiles)


_1x1, _2x1, _3x1, _4x1 = (_tiles(n, 1, n) for n in (1, 2, 3, 4))
_5x2, _6x2, _7x2, _8x2 = (_tiles(n, 2, HEIGHT) for n in (5, 6, 7, 8))


@compiled
def _few(n_x, out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail):
    """1 to 4 rows of x: one stream of weights is worth more than shared loads of x."""
    if n_x == 4:
        _4x1(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    elif n_x == 3:
        _3x1(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    elif n_x == 2:
        _2x1(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    else:
        _1x1(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)


@compiled
def _many(n_x, out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail):
    """5 to 8 rows of x."""
    if n_x == 8:
        _8x2(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    elif n_x == 7:
        _7x2(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    elif n_x == 6:
        _6x2(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    else:
        _5x2(out, ld_out, sums, x, ld_x, w, ld_w, n_rows, n_vectors, ahead, begins, tail)
    if n_rows % 2:
        j = n_rows - 1
        to, mine, right = out + 4 * j, sums + 4 * _SUM_ROW * j, w + 4 * j * ld_w
        for i in range(0, n_x, 4):
            _few(min(4, n_x - i), to + 4 * i * ld_out, ld_out, mine + 4 * LANES * i,
                 x + 4 * i * ld_x, ld_x, right, ld_w, 1, n_vectors, ahead, begins, tail)  # fmt: skip


@compiled
def _group(out, ld_out, x, ld_x, n_x, w, n_w, n_k, sums):
    """2 to GROUP rows of x."""
    n_vectors = n_k // LANES
    piece = n_vectors
    if 4 * LANES * n_vectors * n_x > WHOLE_BYTES:
        piece = max(1, PIECE_BYTES // (4 * LANES * n_x))
    piece = max(1, piece)
    n_bytes = AHEAD_BYTES_OF_TWO if n_x == 2 else AHEAD_BYTES
    ahead = 4 * n_k * -(-n_bytes // (4 * min(n_k, LANES * piece)))
    for panel in range(0, n_w, PANEL):
        n_rows = min(PANEL, n_w - panel)
        at = out + 4 * panel
        for k in range(0, max(1, n_vectors), piece):
            size = min(piece, n_vectors - k)
            begins = 1 if k == 0 else 0
            tail = n_k - LANES * n_vectors if k + size == n_vectors else -1
            left, right = x + 4 * LANES * k, w + 4 * (panel * n_k + LANES * k)
            if n_x <= 4:
                _few(
                    n_x, at, ld_out, sums, left, ld_x, right, n_k, n_rows, size, ahead, begins, tail
                )
            else:
                _many(
                    n_x, at, ld_out, sums, left, ld_x, right, n_k, n_rows, size, ahead, begins, tail
                )


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
