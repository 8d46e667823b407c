"""Merge of attention partials in numba: `attend.merge_partials`."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from .cpu_compile import compiled
from .cpu_pages import address
from .cpu_pool import POOL
from .cpu_wait import leave, take_ticket

ROWS_PER_TASK = 48


def merge(o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    """`attend.merge_partials` into out [H, Tq, D] and out_lse [H, Tq]."""
    n_segments, n_heads, n_queries, head_dim = o.shape
    n_rows = n_heads * n_queries
    partials = o.numpy().reshape(n_segments, n_rows, head_dim)
    arguments = (
        partials, lse.numpy().reshape(n_segments, n_rows),
        out.numpy().reshape(n_rows, head_dim), out_lse.numpy().reshape(n_rows),
    )  # fmt: skip
    n_tasks = -(-n_rows // ROWS_PER_TASK)
    if n_tasks == 1:
        merge_rows(*arguments, 0, n_rows)
        return
    with POOL.lock:
        POOL.run(_merge_worker, arguments, n_tasks)


@compiled
def _merge_worker(state, n_tasks, o, lse, out, out_lse):
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        first = task * ROWS_PER_TASK
        merge_rows(o, lse, out, out_lse, first, min(first + ROWS_PER_TASK, o.shape[1]))


@compiled
def merge_rows(o, lse, out, out_lse, first, last):
    n_segments, _, head_dim = o.shape
    for r in range(first, last):
        top = np.float32(-np.inf)
        for s in range(n_segments):
            if lse[s, r] > top or lse[s, r] != lse[s, r]:
                top = lse[s, r]
        safe = np.float32(0.0) if top == -np.inf else top
        total = np.float32(0.0)
        for d in range(head_dim):
            out[r, d] = 0.0
        for s in range(n_segments):
            weight = np.float32(math.exp(lse[s, r] - safe))
            total += weight
            for d in range(head_dim):
                out[r, d] += weight * o[s, r, d]
        inverse = np.float32(1.0) / total if total != 0.0 else np.float32(0.0)
        for d in range(head_dim):
            out[r, d] *= inverse
        out_lse[r] = np.float32(safe + math.log(total)) if total != 0.0 else np.float32(-np.inf)
