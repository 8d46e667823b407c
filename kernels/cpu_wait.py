"""How workers of a kernel share their tasks and wait for each other, in compiled code."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from .cpu_compile import compiled
from .cpu_ir import I32, Emit, intrinsic

FAILED, LEFT = 1, 2
"""Places in a kernel's state after the next ticket: failure flag, workers that have returned."""


@intrinsic
def take_ticket(typing: Any, counter: Any) -> Any:
    """Atomically add 1 to the int64 at an address, after all that this thread has written is
    visible; returns its old value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        pointer = e.pointer(args[0], e.index(0), ir.IntType(64), 8)
        return builder.atomic_rmw("add", pointer, e.index(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def _look(typing: Any, address: Any) -> Any:
    """The int64 at an address, as other threads have left it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        return builder.load_atomic(e.pointer(args[0], e.index(0), ir.IntType(64), 8), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _let_others_run(typing: Any) -> Any:
    """sched_yield: whoever else wants this core gets it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@compiled
def leave(state):
    """A worker has done. state: address of the kernel's state."""
    take_ticket(state + 8 * LEFT)


@compiled
def wait_until(address, wanted, n_looks):
    """Whether the int64 at an address reaches `wanted` within n_looks looks (about 1 us each).

    At each look the core is offered to others, so waiting never holds up what runs beside us.
    """
    for _ in range(n_looks):
        if _look(address) >= wanted:
            return True
        _let_others_run()
    return _look(address) >= wanted
