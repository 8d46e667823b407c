"""The small things between the products of a decoder block, in compiled code at integer addresses.

Every element is computed alone or in a fixed order, so that bits depend on nothing but a row's own
numbers. Also how the workers of one kernel call go from one phase of it to the next together.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from .cpu_compile import compiled
from .cpu_ir import F32, LANES, VEC, Emit, intrinsic
from .cpu_wait import take_ticket, wait_until

COUNTER_BYTES = 128
"""Apart from each other, or one worker's counting would take the line from under another's."""
COUNTERS_OF_PHASE = 2 * COUNTER_BYTES
LOOKS_BEFORE_YIELDING = 2000
"""A few microseconds."""
_LOG2_E = 1.4426950408889634


def _each(e: Emit, n: Any, body: Callable[[Any, Any], None]) -> None:
    """body(kind, offset) over n elements: by vectors, then one by one."""
    builder = e.b
    whole = builder.udiv(n, e.index(LANES))
    with cgutils.for_range(builder, whole) as loop:
        body(VEC, builder.mul(loop.index, e.index(LANES)))
    done = builder.mul(whole, e.index(LANES))
    with cgutils.for_range(builder, builder.sub(n, done)) as loop:
        body(F32, builder.add(done, loop.index))


def _load(e: Emit, kind: Any, address: Any, offset: Any) -> Any:
    return e.vector(address, offset) if kind is VEC else e.scalar(address, offset)


@intrinsic
def add_row(typing: Any, dst: Any, src: Any, n: Any) -> Any:
    """dst += src for n floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, n = args
        e = Emit(builder)

        def body(kind: Any, at: Any) -> None:
            total = builder.fadd(_load(e, kind, dst, at), _load(e, kind, src, at))
            e.store(total, dst, at, kind)

        _each(e, n, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _scale_row(typing: Any, dst: Any, src: Any, weight: Any, factor: Any, n: Any) -> Any:
    """dst = (src * factor) * weight for n floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dst, src, weight, factor, n = args
        e = Emit(builder)
        wide = e.splat(factor)

        def body(kind: Any, at: Any) -> None:
            value = builder.fmul(_load(e, kind, src, at), wide if kind is VEC else factor)
            e.store(builder.fmul(value, _load(e, kind, weight, at)), dst, at, kind)

        _each(e, n, body)
        return context.get_dummy_value()

    address = types.int64
    return types.void(address, address, address, types.float32, types.int64), codegen


@intrinsic
def gate_vectors(typing: Any, gate: Any, up: Any, n_vectors: Any) -> Any:
    """gate = silu(gate) * up for n_vectors times 16 floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gate, up, n_vectors = args
        e = Emit(builder)
        one = e.const(1.0)
        with cgutils.for_range(builder, n_vectors) as loop:
            at = builder.mul(loop.index, e.index(LANES))
            x = e.vector(gate, at)
            positive = builder.fcmp_ordered(">=", x, e.const(0.0))
            # of the negative magnitude, which never overflows
            low = builder.select(positive, builder.fsub(e.const(0.0), x), x)
            power = e.exp2(builder.fmul(low, e.const(_LOG2_E)))
            upper = builder.select(positive, one, power)
            sigmoid = builder.fdiv(upper, builder.fadd(one, power))
            e.store(builder.fmul(builder.fmul(x, sigmoid), e.vector(up, at)), gate, at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _sum_of_squares(typing: Any, src: Any, n: Any) -> Any:
    """Of n floats: 16 partial sums, pairwise, then the tail."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        src, n = args
        e = Emit(builder)
        sums = cgutils.alloca_once_value(builder, e.const(0.0))
        total = cgutils.alloca_once(builder, F32)
        whole = builder.udiv(n, e.index(LANES))
        with cgutils.for_range(builder, whole) as loop:
            x = e.vector(src, builder.mul(loop.index, e.index(LANES)))
            builder.store(e.fma(x, x, builder.load(sums)), sums)
        builder.store(e.reduce("add", builder.load(sums)), total)
        done = builder.mul(whole, e.index(LANES))
        with cgutils.for_range(builder, builder.sub(n, done)) as loop:
            x = e.scalar(src, builder.add(done, loop.index))
            builder.store(e.fma(x, x, builder.load(total)), total)
        return builder.load(total)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """The float64 whose bits an int64 holds: books hold addresses and few other numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@compiled
def norm_row(dst, src, weight, eps, n):
    """RMSNorm of n floats; dst may be src."""
    mean = np.float64(_sum_of_squares(src, n)) / n
    _scale_row(dst, src, weight, np.float32(1.0 / math.sqrt(mean + eps)), n)


@compiled
def next_task(counters, n_tasks):
    """A task of the phase that has these counters, or -1 when all are taken."""
    task = take_ticket(counters)
    return task if task < n_tasks else -1


@compiled
def task_done(counters):
    take_ticket(counters + COUNTER_BYTES)


@compiled
def wait_for_tasks(counters, n_tasks):
    """Until all tasks of a phase are done, by whichever workers came: what they wrote is visible.

    Mostly one is to wait for less than a task, so the core is kept for about that long.
    """
    for _ in range(LOOKS_BEFORE_YIELDING):
        if wait_until(counters + COUNTER_BYTES, n_tasks, 0):
            return
    while not wait_until(counters + COUNTER_BYTES, n_tasks, 1000):
        pass
