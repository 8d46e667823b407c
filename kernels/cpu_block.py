"""`block.BlockStep` in numba: all that stands between two attentions, in one call of the worker pool.

The call has four phases, each a set of tasks of output rows: x += attended Wo^T; silu(gate) * up;
x += that Wd^T; q, k and v of the next layer. A worker goes on when all tasks of a phase are done,
whoever did them. The norms before the second and the fourth are computed by every worker that gets
a task there, which is cheaper than phases of their own.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .block_weights import AfterAttention, BeforeAttention, Norm
from .cpu_block_book import (
    BIAS,
    DOWN,
    GATE,
    HEAD_DIM,
    HIDDEN,
    K_NORM,
    MLP_NORM,
    N_HEADS,
    N_IN,
    N_KV_HEADS,
    N_OUT,
    NEXT_NORM,
    NORM_EPS,
    NORM_WEIGHT,
    OUT,
    PER_TASK,
    Q_NORM,
    QKV,
    UP,
    WEIGHT,
    most_rows_of_a_task,
    most_tasks,
    n_weight_bytes,
    write_book,
)
from .cpu_block_parts import (
    COUNTERS_OF_PHASE,
    add_row,
    float_of_bits,
    gate_vectors,
    next_task,
    norm_row,
    task_done,
    wait_for_tasks,
)
from .cpu_compile import compiled
from .cpu_ir import LANES
from .cpu_memory import peek
from .cpu_pages import address
from .cpu_pool import POOL, SHARED_BYTES
from .cpu_products import SUMS_FLOATS, products
from .cpu_wait import leave

_N_PHASES = 4


class Plan:
    """A step for compiled code."""

    def __init__(self, after: AfterAttention | None, before: BeforeAttention | Norm) -> None:
        self._holds = (after, before)  # the book has their addresses
        self._book = book = write_book(after, before)
        self.counters = np.zeros(_N_PHASES * COUNTERS_OF_PHASE // 8, dtype=np.int64)
        self.addresses = (book.ctypes.data, self.counters.ctypes.data)
        self._n_tasks = most_tasks(book) if n_weight_bytes(book) >= SHARED_BYTES else 1
        self.n_gated = int(book[DOWN + N_IN])
        self.per_task = most_rows_of_a_task(book)
        self.hidden, self.n_attended = int(book[HIDDEN]), int(book[OUT + N_IN])
        self.n_out = int(book[QKV + N_OUT]) or self.hidden

    def run(self, buffers: Buffers, attended: Tensor | None) -> None:
        """`block.BlockStep.run`, of what fits."""
        given = 0 if attended is None else attended.data_ptr()
        with POOL.lock:
            self.counters[:] = 0
            arguments = (self._book, self.counters, given, *buffers.addresses[self.n_out])
            POOL.run(_worker, arguments, self._n_tasks, (buffers.of_workers(),))


class Buffers:
    """What plans read and write for n rows, and their scratch: asking the pool for it at each call
    would cost a third of what the call itself does."""

    def __init__(self, n_rows: int, plans: Sequence[Plan]) -> None:
        hidden = plans[0].hidden
        self.x = torch.zeros(n_rows, hidden)
        self.outs = {n: torch.zeros(n_rows, n) for n in {plan.n_out for plan in plans}}
        self._gated = torch.zeros(n_rows, stride_of(max(plan.n_gated for plan in plans)))
        self.addresses = {
            n: (self.x.data_ptr(), self._gated.data_ptr(), out.data_ptr(), n_rows)
            for n, out in self.outs.items()
        }
        per_task = max(plan.per_task for plan in plans)
        self._n_mine = SUMS_FLOATS + n_rows * (stride_of(hidden) + per_task) + LANES
        self._mine = np.zeros((0, self._n_mine), dtype=np.float32)
        n_attended = max(plan.n_attended for plan in plans)
        self.attended = np.zeros((n_rows, n_attended), dtype=np.float32)

    def of_workers(self) -> np.ndarray:
        """Scratch [at least as many as there are workers, n]."""
        if len(self._mine) < POOL.n_workers:
            self._mine = np.zeros((POOL.n_workers, self._n_mine), dtype=np.float32)
        return self._mine


def stride_of(n: int) -> int:
    """Floats from one row of n to the next in our own buffers: whole cache lines, and never half the
    first-level cache's sets apart, or eight rows side by side would push each other out."""
    lines = (n + LANES - 1) // LANES
    return LANES * (lines + 8 if lines % 32 == 0 else lines)


_stride = compiled(stride_of)


@compiled
def _worker(state, n_tasks, book, counters, attended, x, gated, out, n_rows, mine):
    block_phases(address(book), address(counters), attended, x, gated, out, n_rows, address(mine))
    leave(address(state))


@compiled
def block_phases(at, counter, attended, x, gated, out, n_rows, mine):
    """All of a step, by every worker. Returns when all of it is done. mine: a worker's own scratch:
    partial sums, the normed rows of x, products of a task before they are added."""
    sums = _aligned(mine)
    normed = sums + 4 * SUMS_FLOATS
    part = normed + 4 * n_rows * _stride(peek(at, HIDDEN))
    if peek(at, OUT + WEIGHT) != 0:
        width = peek(at, OUT + N_IN)
        _add_product(at, OUT, counter, x, attended, width, n_rows, sums, part)
        counter += COUNTERS_OF_PHASE
        _gate(at, counter, x, gated, n_rows, sums, normed, part)
        counter += COUNTERS_OF_PHASE
        width = _stride(peek(at, DOWN + N_IN))
        _add_product(at, DOWN, counter, x, gated, width, n_rows, sums, part)
        counter += COUNTERS_OF_PHASE
    if peek(at, QKV + WEIGHT) != 0:
        _heads(at, counter, x, out, n_rows, sums, normed)
    else:
        _last_norm(at, counter, x, out, n_rows)


@compiled
def _aligned(place):
    return (place + 63) // 64 * 64


@compiled
def _norm_rows(book, at, x, n_rows, normed):
    n = peek(book, HIDDEN)
    eps = float_of_bits(peek(book, at + NORM_EPS))
    for i in range(n_rows):
        to = normed + 4 * i * _stride(n)
        norm_row(to, x + 4 * i * n, peek(book, at + NORM_WEIGHT), eps, n)


@compiled
def _add_product(book, at, counter, x, source, ld_source, n_rows, sums, part):
    """x += source W^T + bias. Returns when all of it is done."""
    weight, bias = peek(book, at + WEIGHT), peek(book, at + BIAS)
    n_out, n_in, per_task = peek(book, at + N_OUT), peek(book, at + N_IN), peek(book, at + PER_TASK)
    n_tasks = -(-n_out // per_task)
    while True:
        task = next_task(counter, n_tasks)
        if task < 0:
            break
        first = task * per_task
        n = min(per_task, n_out - first)
        products(part, n, source, ld_source, n_rows, weight + 4 * first * n_in, n, n_in, sums)
        for i in range(n_rows):
            row = part + 4 * i * n
            if bias != 0:
                add_row(row, bias + 4 * first, n)
            add_row(x + 4 * (i * n_out + first), row, n)
        task_done(counter)
    wait_for_tasks(counter, n_tasks)


@compiled
def _gate(book, counter, x, gated, n_rows, sums, normed, part):
    """gated = silu(gate) * up of norm(x), each + bias. Returns when all of it is done."""
    n_out, n_in = peek(book, GATE + N_OUT), peek(book, GATE + N_IN)
    per_task, ld_normed, ld_gated = (
        peek(book, GATE + PER_TASK),
        _stride(n_in),
        _stride(n_out),
    )
    n_tasks = -(-n_out // per_task)
    is_first = True
    while True:
        task = next_task(counter, n_tasks)
        if task < 0:
            break
        if is_first:
            _norm_rows(book, MLP_NORM, x, n_rows, normed)
            is_first = False
        first = task * per_task
        n = min(per_task, n_out - first)
        to = gated + 4 * first
        for side in range(2):
            product = GATE if side == 0 else UP
            weight = peek(book, product + WEIGHT) + 4 * first * n_in
            bias = peek(book, product + BIAS)
            at, ld = (to, ld_gated) if side == 0 else (part, per_task)
            products(at, ld, normed, ld_normed, n_rows, weight, n, n_in, sums)
            if bias != 0:
                for i in range(n_rows):
                    add_row(at + 4 * i * ld, bias + 4 * first, n)
        for i in range(n_rows):
            gate_vectors(to + 4 * i * ld_gated, part + 4 * i * per_task, -(-n // LANES))
        task_done(counter)
    wait_for_tasks(counter, n_tasks)


@compiled
def _heads(book, counter, x, out, n_rows, sums, normed):
    """out = q, k, v of norm(x). Returns when all of it is done."""
    n_out, n_in = peek(book, QKV + N_OUT), peek(book, QKV + N_IN)
    weight, bias = peek(book, QKV + WEIGHT), peek(book, QKV + BIAS)
    per_task, head_dim = peek(book, QKV + PER_TASK), peek(book, HEAD_DIM)
    n_heads, n_kv_heads = peek(book, N_HEADS), peek(book, N_KV_HEADS)
    n_tasks = -(-n_out // per_task)
    is_first = True
    while True:
        task = next_task(counter, n_tasks)
        if task < 0:
            break
        if is_first:
            _norm_rows(book, NEXT_NORM, x, n_rows, normed)
            is_first = False
        first = task * per_task
        n = min(per_task, n_out - first)
        to = out + 4 * first
        ld = _stride(n_in)
        products(to, n_out, normed, ld, n_rows, weight + 4 * first * n_in, n, n_in, sums)
        for i in range(n_rows):
            if bias != 0:
                add_row(to + 4 * i * n_out, bias + 4 * first, n)
            for head in range(first // head_dim, (first + n) // head_dim):
                norm = Q_NORM if head < n_heads else K_NORM
                if head < n_heads + n_kv_heads and peek(book, norm + NORM_WEIGHT) != 0:
                    row = out + 4 * (i * n_out + head * head_dim)
                    eps = float_of_bits(peek(book, norm + NORM_EPS))
                    norm_row(row, row, peek(book, norm + NORM_WEIGHT), eps, head_dim)
        task_done(counter)
    wait_for_tasks(counter, n_tasks)


@compiled
def _last_norm(book, counter, x, out, n_rows):
    n = peek(book, HIDDEN)
    eps = float_of_bits(peek(book, NEXT_NORM + NORM_EPS))
    while True:
        row = next_task(counter, n_rows)
        if row < 0:
            break
        at = 4 * row * n
        norm_row(out + at, x + at, peek(book, NEXT_NORM + NORM_WEIGHT), eps, n)
        task_done(counter)
    wait_for_tasks(counter, n_rows)
