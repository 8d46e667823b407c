"""Inner products of one query with bookmark keys where they lie, in numba: `bookmark.page_scores`.

Products are added as numpy's halves are, so that both give the same bits.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from .cpu_compile import compiled
from .cpu_pages import address
from .cpu_pool import POOL
from .cpu_wait import leave, take_ticket

_TASK_PAGES = 2048
"""About 1.5 MB of keys of the smallest model: more than it costs to hand a task over."""


def summed_products(
    summed: np.ndarray, table: np.ndarray, slots: np.ndarray, *, per_kv_head: bool
) -> np.ndarray:
    """summed: float32 [Hkv, D], queries summed over each KV head's group; table: float32 [n_slots, Hkv, D];
    slots: int64 [n] of the pages. Returns float32 [n, 1], or [n, Hkv] of each head alone."""
    n_pages, (n_kv_heads, dim) = len(slots), summed.shape
    out = np.empty((n_pages, n_kv_heads if per_kv_head else 1), dtype=np.float32)
    if not n_pages:
        return out
    with POOL.lock:
        rows = POOL.scratch("bookmark-products", (dim,))
        heads = POOL.scratch("bookmark-heads", (n_kv_heads,))
        arguments = (out, np.ascontiguousarray(summed), table, slots)
        POOL.run(_worker, arguments, -(-n_pages // _TASK_PAGES), (rows, heads))
    return out


@compiled
def _worker(state, n_tasks, out, summed, table, slots, row, heads):
    n_pages, (n_kv_heads, dim) = len(slots), summed.shape
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        for page in range(task * _TASK_PAGES, min(n_pages, (task + 1) * _TASK_PAGES)):
            slot = slots[page]
            for h in range(n_kv_heads):
                for d in range(dim):
                    row[d] = table[slot, h, d] * summed[h, d]
                heads[h] = _halved(row, dim)
            if out.shape[1] == 1:
                out[page, 0] = _halved(heads, n_kv_heads)
            else:
                out[page] = heads


@compiled
def _halved(x, n):
    """The sum of x[:n], halves added to halves; x is used up."""
    while n > 1:
        half = n // 2
        for i in range(half):
            x[i] += x[half + i]
        if n % 2:
            x[0] += x[n - 1]
        n = half
    return x[0]
