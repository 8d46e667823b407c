"""Stored K and V in the arithmetic of one query: rows are converted, and keys rotated, on their way
into registers. Eight lanes, one row of the page at a time; nothing is copied.

A tile is 1 to 4 query heads of one KV head. Its logits lie as [key][width], width = 1, 2 or 4 (three
heads are padded to four), so that eight results of one step are one store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from .cpu_compile import compiled
from .cpu_formats import (
    KINDS,
    LANES,
    SCALED,
    WIDE,
    in_channels,
    items_per_byte,
    load_channels,
    load_pairs,
    load_stored,
)
from .cpu_ir import I32, I64, Emit, intrinsic

HEADS = (1, 2, 3, 4)
"""Heads of a tile."""
RUN_WORDS = 8
"""int64 numbers of one run in `weigh`."""


def width_of(n_heads: int) -> int:
    """Logits of one key in a tile."""
    return 4 if n_heads == 3 else n_heads


tile_width = compiled(width_of)


def _void(n_args: int) -> Any:
    return types.void(*(types.int64,) * n_args)


def _shuffle(e: Emit, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return e.b.shuffle_vector(x, y, mask)


def _sums(e: Emit, rows: Sequence[Any]) -> Any:
    """The sums of eight vectors as one, each in the same order (neighbours first)."""
    even, odd = (0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15)
    level = list(rows)
    for _ in range(2):
        level = [
            e.b.fadd(_shuffle(e, x, y, even), _shuffle(e, x, y, odd))
            for x, y in zip(level[::2], level[1::2], strict=True)
        ]
    low = _shuffle(e, level[0], level[1], (0, 1, 2, 3, 8, 9, 10, 11))
    high = _shuffle(e, level[0], level[1], (4, 5, 6, 7, 12, 13, 14, 15))
    return e.b.fadd(low, high)


def _plain_dots(kind: str, n_heads: int) -> Any:
    """out[row][width] = query . row, for rows that lie one after the other, as `_dots`."""
    width = width_of(n_heads)
    per_step = LANES // width

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, q, first, row_bytes, n_rows, n_dims = args
        e = Emit(builder)
        last = builder.sub(n_rows, e.index(1))
        n_steps = builder.udiv(builder.add(n_rows, e.index(per_step - 1)), e.index(per_step))
        sums = [cgutils.alloca_once(builder, WIDE) for _ in range(per_step * n_heads)]
        with cgutils.for_range(builder, n_steps) as step:
            rows = []
            for t in range(per_step):
                index = builder.add(builder.mul(step.index, e.index(per_step)), e.index(t))
                index = builder.select(builder.icmp_signed("<", index, last), index, last)
                rows.append(builder.add(first, builder.mul(index, row_bytes)))
            for total in sums:
                builder.store(e.const(0.0, WIDE), total)
            with cgutils.for_range(builder, builder.udiv(n_dims, e.index(LANES))) as part:
                at = builder.mul(part.index, e.index(LANES))
                # only kinds of summaries, which have no use for half a row
                values = [load_stored(e, kind, row, at, at) for row in rows]
                for h in range(n_heads):
                    where = builder.add(builder.mul(n_dims, e.index(h)), at)
                    query = builder.load(e.pointer(q, where, WIDE), align=4)
                    for t, value in enumerate(values):
                        total = sums[t * n_heads + h]
                        builder.store(e.fma(value, query, builder.load(total)), total)
            parts = []
            for t in range(per_step):
                parts += [builder.load(total) for total in sums[t * n_heads : (t + 1) * n_heads]]
                parts += [e.const(0.0, WIDE)] * (width - n_heads)
            e.store(_sums(e, parts), out, builder.mul(step.index, e.index(LANES)), WIDE)
        return context.get_dummy_value()

    return codegen


def _dots(kind: str, n_heads: int) -> Any:
    """out[key][width] = query . rotated key, for keys that lie one after the other.

    q: n_heads rotated queries, 2 * half floats each; key: the first row, row_bytes apart; cos, sin:
    angles of the first key, half floats each, those of the next key turn_step floats later. Up to 7
    floats beyond the last key's are overwritten. table: of int4c, what ends the block of these keys.
    """
    width = width_of(n_heads)
    per_step = LANES // width

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, q, key, row_bytes, n_keys, half, cos, sin, turn_step, table = args
        e = Emit(builder)
        last = builder.sub(n_keys, e.index(1))
        n_steps = builder.udiv(builder.add(n_keys, e.index(per_step - 1)), e.index(per_step))
        n_parts = builder.udiv(half, e.index(LANES))
        sums = [cgutils.alloca_once(builder, WIDE) for _ in range(per_step * n_heads)]
        with cgutils.for_range(builder, n_steps) as step:
            rows, angles = [], []
            for t in range(per_step):
                index = builder.add(builder.mul(step.index, e.index(per_step)), e.index(t))
                # beyond the last key: that key again, its result is overwritten or masked
                index = builder.select(builder.icmp_signed("<", index, last), index, last)
                rows.append(builder.add(key, builder.mul(index, row_bytes)))
                angles.append(builder.mul(index, turn_step))
            for total in sums:
                builder.store(e.const(0.0, WIDE), total)
            with cgutils.for_range(builder, n_parts) as part:
                at = builder.mul(part.index, e.index(LANES))
                above = builder.add(at, half)
                rotated = []
                if kind == "int4c":
                    channels = [load_channels(e, table, x, half) for x in (at, above)]
                for row, angle in zip(rows, angles, strict=True):
                    first, second = load_pairs(e, kind, row, at, half)
                    if kind == "int4c":
                        first = in_channels(e, first, channels[0])
                        second = in_channels(e, second, channels[1])
                    where = builder.add(angle, at)
                    c = builder.load(e.pointer(cos, where, WIDE), align=4)
                    s = builder.load(e.pointer(sin, where, WIDE), align=4)
                    minus = builder.fneg(builder.fmul(second, s))
                    rotated.append(
                        (e.fma(first, c, minus), e.fma(second, c, builder.fmul(first, s)))
                    )
                for h in range(n_heads):
                    row = builder.mul(half, e.index(2 * h))
                    low = builder.load(e.pointer(q, builder.add(row, at), WIDE), align=4)
                    high = builder.load(e.pointer(q, builder.add(row, above), WIDE), align=4)
                    for t, (first, second) in enumerate(rotated):
                        total = sums[t * n_heads + h]
                        value = e.fma(first, low, builder.load(total))
                        builder.store(e.fma(second, high, value), total)
            parts = []
            for t in range(per_step):
                parts += [builder.load(total) for total in sums[t * n_heads : (t + 1) * n_heads]]
                parts += [e.const(0.0, WIDE)] * (width - n_heads)
            result = _sums(e, parts)
            if kind in SCALED:
                scales = ir.Constant(WIDE, ir.Undefined)
                n_bytes = builder.mul(half, e.index(2 // items_per_byte(kind)))
                for t, row in enumerate(rows):
                    scale = builder.load(e.pointer(builder.add(row, n_bytes), e.index(0)), align=1)
                    for h in range(width):
                        lane = ir.Constant(I32, t * width + h)
                        scales = builder.insert_element(scales, scale, lane)
                result = builder.fmul(result, scales)
            e.store(result, out, builder.mul(step.index, e.index(LANES)), WIDE)
        return context.get_dummy_value()

    return codegen


def _weigh(kind: str, n_heads: int) -> Any:
    """acc[h] += sum over keys of p[key][width] * value, keys ascending.

    acc: n_heads * n_dims floats; runs: n_runs entries of RUN_WORDS int64 that begin with the address
    of the first value row and the number of rows.
    """
    width = width_of(n_heads)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        acc, p, runs, n_runs, row_bytes, n_dims = args
        e = Emit(builder)
        sums = [cgutils.alloca_once(builder, WIDE) for _ in range(2 * n_heads)]
        place = cgutils.alloca_once(builder, I64)
        half = builder.udiv(n_dims, e.index(2))
        with cgutils.for_range(builder, builder.udiv(n_dims, e.index(2 * LANES))) as part:
            at = builder.mul(part.index, e.index(2 * LANES))
            above = builder.add(at, e.index(LANES))
            places = [
                builder.add(builder.mul(n_dims, e.index(h)), where)
                for h in range(n_heads)
                for where in (at, above)
            ]
            for total, where in zip(sums, places, strict=True):
                builder.store(builder.load(e.pointer(acc, where, WIDE), align=4), total)
            builder.store(p, place)
            with cgutils.for_range(builder, n_runs) as run:
                entry = builder.mul(run.index, e.index(RUN_WORDS))
                first = builder.load(e.pointer(runs, entry, I64, 8))
                n_rows = builder.load(e.pointer(runs, builder.add(entry, e.index(1)), I64, 8))
                with cgutils.for_range(builder, n_rows) as key:
                    row = builder.add(first, builder.mul(key.index, row_bytes))
                    low = load_stored(e, kind, row, at, half)
                    high = load_stored(e, kind, row, above, half)
                    here = builder.load(place)
                    for h in range(n_heads):
                        weight = e.splat(e.scalar(here, e.index(h)), WIDE)
                        for value, total in ((low, sums[2 * h]), (high, sums[2 * h + 1])):
                            builder.store(e.fma(value, weight, builder.load(total)), total)
                    builder.store(builder.add(here, e.index(4 * width)), place)
            for total, where in zip(sums, places, strict=True):
                e.store(builder.load(total), acc, where, WIDE)
        return context.get_dummy_value()

    return codegen


def _softmax(width: int) -> Any:
    """For s [keys][width], n_vectors * 8 floats: s = 2 ** (s - maximum of its column), maxima and sums
    (8 floats each, the columns repeated). A column of -inf gives zeros, sum 0 and maximum -inf."""

    def fold(e: Emit, name: str, x: Any) -> Any:
        step = LANES // 2
        while step >= width:
            turned = _shuffle(e, x, x, [(i + step) % LANES for i in range(LANES)])
            x = e.b.fadd(x, turned) if name == "add" else e.maximum(x, turned)
            step //= 2
        return x

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        s, n_vectors, top_out, total_out = args
        e = Emit(builder)
        lowest = e.const(float("-inf"), WIDE)
        state = cgutils.alloca_once_value(builder, lowest)
        with cgutils.for_range(builder, n_vectors) as loop:
            at = builder.mul(loop.index, e.index(LANES))
            value = builder.load(e.pointer(s, at, WIDE), align=4)
            builder.store(e.maximum(builder.load(state), value), state)
        top = fold(e, "max", builder.load(state))
        e.store(top, top_out, e.index(0), WIDE)
        safe = builder.select(builder.fcmp_ordered("==", top, lowest), e.const(0.0, WIDE), top)
        builder.store(e.const(0.0, WIDE), state)
        with cgutils.for_range(builder, n_vectors) as loop:
            at = builder.mul(loop.index, e.index(LANES))
            value = builder.load(e.pointer(s, at, WIDE), align=4)
            value = e.exp2(builder.fsub(value, safe))
            e.store(value, s, at, WIDE)
            builder.store(builder.fadd(builder.load(state), value), state)
        e.store(fold(e, "add", builder.load(state)), total_out, e.index(0), WIDE)
        return context.get_dummy_value()

    def softmax(typing: Any, s: Any, n_vectors: Any, top_out: Any, total_out: Any) -> Any:
        return _void(4), codegen

    return intrinsic(softmax)


_softmax_1, _softmax_2, _softmax_4 = (_softmax(width) for width in (1, 2, 4))


@compiled
def tile_heads(left: int) -> int:
    """Heads of the next tile, of so many that are left."""
    return min(left, HEADS[-1])


@compiled
def softmax_tile(s: int, n_keys: int, width: int, top_out: int, total_out: int) -> None:
    """`_softmax` of [n_keys][width] logits, which up to 7 of -inf must follow to whole vectors."""
    n_vectors = (n_keys * width + LANES - 1) // LANES
    if width == 4:
        _softmax_4(s, n_vectors, top_out, total_out)
    elif width == 2:
        _softmax_2(s, n_vectors, top_out, total_out)
    else:
        _softmax_1(s, n_vectors, top_out, total_out)


def _switched(make: Callable[[str, int], Any], kinds: Sequence[str] = KINDS) -> Any:
    """One codegen over all kinds and heads, chosen at run time outside the loops: the last argument
    is `variant_of`."""
    parts = [make(kind, n_heads) for kind in kinds for n_heads in HEADS]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        end = builder.append_basic_block("end")
        choice = builder.switch(args[-1], end)
        for i, part in enumerate(parts):
            block = builder.append_basic_block(f"variant.{i}")
            choice.add_case(ir.Constant(I64, i), block)
            builder.position_at_end(block)
            part(context, builder, signature, args[:-1])
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return codegen


@intrinsic
def dots(typing: Any, out: Any, q: Any, key: Any, row_bytes: Any, n_keys: Any, half: Any, cos: Any,
         sin: Any, turn_step: Any, table: Any, variant: Any) -> Any:  # fmt: skip
    """See `_dots`; variant: KINDS number * 4 + heads - 1."""
    return _void(11), _switched(_dots)


@intrinsic
def weigh(typing: Any, acc: Any, p: Any, runs: Any, n_runs: Any, row_bytes: Any, n_dims: Any,
          variant: Any) -> Any:  # fmt: skip
    """See `_weigh`; variant as for `dots`."""
    return _void(7), _switched(_weigh)


@intrinsic
def plain_dots(typing: Any, out: Any, q: Any, first: Any, row_bytes: Any, n_rows: Any, n_dims: Any,
               variant: Any) -> Any:  # fmt: skip
    """See `_plain_dots`; variant as for `dots`, of the first three kinds."""
    return _void(7), _switched(_plain_dots, KINDS[:3])
