"""x W^T for a few rows at memory speed: `linear.linear_rows` in numba, tasks of output rows."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from torch import Tensor

from .cpu_compile import compiled
from .cpu_pages import address
from .cpu_pool import POOL, SHARED_BYTES
from .cpu_products import SUMS_FLOATS, products
from .cpu_wait import leave, take_ticket

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
    with POOL.lock:
        sums = POOL.scratch("linear", (SUMS_FLOATS,))
        if n_out * n_in * 4 < SHARED_BYTES or POOL.n_workers == 1:
            _rows(*arguments, 0, n_out, sums[0])
        else:
            POOL.run(_worker, arguments, n_tasks, (sums,))


@compiled
def _worker(state, n_tasks, x, w, bias, has_bias, out, per_task, sums):
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        first = task * per_task
        last = min(first + per_task, w.shape[0])
        _rows(x, w, bias, has_bias, out, per_task, first, last, sums)


@compiled
def _rows(x, w, bias, has_bias, out, per_task, first, last, sums):
    """Outputs [first, last) of all rows."""
    n_rows, n_in = x.shape
    n_out = w.shape[0]
    at, at_w = address(out) + 4 * first, address(w) + 4 * first * n_in
    products(at, n_out, address(x), n_in, n_rows, at_w, last - first, n_in, address(sums))
    if has_bias:
        for i in range(n_rows):
            for k in range(first, last):
                out[i, k] += bias[k]
