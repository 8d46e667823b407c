"""The compiled inside of `layers.run_layers`: attention and blocks of consecutive layers in one launch.

A launch for each attention and each block of a layer costs as much as a third of what they do for one
token. Workers go through the layers together and wait for each other where a result is needed whole.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba.core import types

from ..core.errors import InternalError
from .cpu_attend_query import attend_query
from .cpu_block import Buffers, Plan, block_phases
from .cpu_compile import compiled
from .cpu_decode import Call, scratch
from .cpu_ir import intrinsic
from .cpu_pages import address
from .cpu_pool import POOL
from .cpu_query_book import HEAD_DIM, N_HEADS, N_KV_HEADS, WRONG
from .cpu_wait import FAILED, leave

if TYPE_CHECKING:
    from .layers import RowCall

BLOCK, BLOCK_COUNTERS, OUT, CALLS = range(4)
"""Columns of a layer: the book of the block after its attention, its counters, where that writes, then
the books of each row's attention."""
ATTENDING, ALL, N_CLOCKS = range(3)


@intrinsic
def _clock(typing: Any) -> Any:
    """A counter that grows steadily with time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        name = "llvm.readcyclecounter"
        module = builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return builder.call(function, [])

    return types.int64(), codegen


@compiled
def worker(state, n_tasks, layers, attended, x, gated, clocks, mine, floats, logits, found, ends):
    """layers: int64 [n, CALLS + rows]; attended: float32 [rows, H * D], the attention's result; clocks:
    what part of the time attention took, as each worker counts it."""
    n_layers, n_rows = layers.shape[0], layers.shape[1] - CALLS
    at_attended, begun = address(attended), _clock()
    attending = 0
    for layer in range(n_layers):
        before = _clock()
        for row in range(n_rows):
            if not attend_query(layers[layer, CALLS + row], floats, logits, found, ends):
                state[FAILED] = 1
        attending += _clock() - before
        block_phases(layers[layer, BLOCK], layers[layer, BLOCK_COUNTERS], at_attended, x, gated,
                     layers[layer, OUT], n_rows, address(mine))  # fmt: skip
    clocks[ATTENDING] = attending
    clocks[ALL] = max(1, _clock() - begun)
    leave(address(state))


def run(
    buffers: Buffers, plans: Sequence[Plan], row_calls: Sequence[Sequence[RowCall]]
) -> tuple[float, list[tuple[int, int]]]:
    """`layers.run_layers`: the numbers of its LayersDone."""
    calls = [[_call(one) for one in mine] for mine in row_calls]
    every = [call for mine in calls for call in mine]
    n_rows, book = len(calls[0]), every[0].book
    n_heads, n_kv_heads, head_dim = (int(book[at]) for at in (N_HEADS, N_KV_HEADS, HEAD_DIM))
    width = (n_heads + 2 * n_kv_heads) * head_dim
    x, gated, q, _ = buffers.addresses[width]
    attended = buffers.attended.ctypes.data
    layers = np.empty((len(plans), CALLS + n_rows), dtype=np.int64)
    with POOL.lock:
        # partials live until they are merged: one place for all layers of a row
        most = max(call.n_partials for call in every)
        o = POOL.shared("layers-o", (n_rows, most * n_heads * head_dim)).ctypes.data
        lse = POOL.shared("layers-l", (n_rows, (most + 1) * n_heads)).ctypes.data
        for layer, (plan, mine) in enumerate(zip(plans, calls, strict=True)):
            plan.counters[:] = 0
            layers[layer, :CALLS] = *plan.addresses, buffers.addresses[plan.n_out][2]
            for row, call in enumerate(mine):
                one = row_calls[layer][row]
                call.of_token(one.position, one.base, one.position + 1)
                key = q + 4 * (row * width + n_heads * head_dim)
                lses = lse + 4 * row * (most + 1) * n_heads
                call.to(
                    q + 4 * row * width,
                    (call.n_partials, o + 4 * row * most * n_heads * head_dim, lses),
                    (attended + 4 * row * n_heads * head_dim, lses + 4 * most * n_heads),
                    (key, key + 4 * n_kv_heads * head_dim) if one.append else (0, 0),
                )
                layers[layer, CALLS + row] = call.address
        clocks = POOL.scratch("layers-clock", (N_CLOCKS,), np.int64)
        own = (clocks, buffers.of_workers(), *scratch(every))
        if POOL.run(worker, (layers, buffers.attended, x, gated), POOL.n_workers, own):
            raise every[0].absent()
        attending, total = clocks[0]
    wrong = [
        (layer, row)
        for layer, mine in enumerate(calls)
        for row, call in enumerate(mine)
        if call.book[WRONG]
    ]
    return float(attending / total), wrong


def _call(one: RowCall) -> Call:
    call = one.prepared.call
    if call is None:
        raise InternalError("attention with a tail, or not in numba, cannot be part of a run")
    return call
