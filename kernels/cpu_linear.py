"""x W^T for a few rows at memory speed: `linear.linear_rows` in numba, tasks of output rows."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from torch import Tensor

from .cpu_compile import compiled
from .cpu_pages import address
from .cpu_pool import POOL
from .cpu_tiles import dots_1x1, dots_2x2
from .cpu_wait import leave, take_ticket

SHARED_BYTES = 1 << 20
"""Weights below this are read by the calling thread alone: waking another costs more."""
TASK_BYTES = 1 << 18


def linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x [n, K], w [N, K], bias [N] or None, out [n, N]: float32, contiguous."""
    n_out, n_in = w.shape
    per_task = max(4, TASK_BYTES // (4 * max(1, n_in)) // 4 * 4)
    n_tasks = -(-n_out // per_task)
    has_bias = bias is not None
    arguments = (
        x.detach().numpy(), w.detach().numpy(),
        bias.detach().numpy() if bias is not None else np.zeros(1, dtype=np.float32),
        has_bias, out.numpy(), per_task,
    )  # fmt: skip
    if n_out * n_in * 4 < SHARED_BYTES or POOL.n_workers == 1:
        _rows(*arguments, 0, n_out)
        return
    with POOL.lock:
        POOL.run(_worker, arguments, n_tasks)


@compiled
def _worker(state, n_tasks, x, w, bias, has_bias, out, per_task):
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        first = task * per_task
        _rows(x, w, bias, has_bias, out, per_task, first, min(first + per_task, w.shape[0]))


@compiled
def _rows(x, w, bias, has_bias, out, per_task, first, last):
    """Outputs [first, last) of all rows; a weight row is read once for up to 8 rows of x."""
    n_rows, n_in = x.shape
    n_out = w.shape[0]
    at_out, at_weights = address(out), address(w)
    for r0 in range(0, n_rows, 8):
        stop = min(r0 + 8, n_rows)
        j = first
        while j < last:
            # one row streams best alone; with several, two weight rows share the loads of x
            step = 2 if stop - r0 >= 2 and last - j >= 2 else 1
            at_w = at_weights + 4 * j * n_in
            i = r0
            while i < stop:
                at_x = address(x) + 4 * i * n_in
                at = at_out + 4 * (i * n_out + j)
                if step == 2 and stop - i >= 2:
                    dots_2x2(at, n_out, at_x, n_in, at_w, n_in, n_in)
                    i += 2
                else:
                    dots_1x1(at, n_out, at_x, n_in, at_w, n_in, n_in)
                    if step == 2:
                        dots_1x1(at + 4, n_out, at_x, n_in, at_w + 4 * n_in, n_in, n_in)
                    i += 1
            if has_bias:
                for k in range(j, j + step):
                    for i in range(r0, stop):
                        out[i, k] += bias[k]
            j += step
