"""x W^T + b for a few rows: torch's one-row linear is slow, and has other bits for 1 to 3 rows."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from . import cpu_linear
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_linear = None  # type: ignore[assignment]

ROW_TILE = 16
"""A fixed height of every library GEMM here: other heights have other bits."""


def linear_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [n, K], w: [N, K], bias: [N] or None, float32. Returns [n, N] float32.

    A row has the same bits whatever rows stand beside it. Reads w at memory speed up to 8 rows.
    """
    tensors = (x, w) if bias is None else (x, w, bias)
    plain = all(t.dtype == torch.float32 and t.is_contiguous() and t.is_cpu for t in tensors)
    if cpu_linear is not None and plain:
        out = torch.empty(x.shape[0], w.shape[0])
        cpu_linear.linear(x, w, bias, out)
        return out
    return linear_torch(x, w, bias)


def linear_torch(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_rows` where numba is missing or its path does not apply."""
    n_rows = x.shape[0]
    out = torch.empty(n_rows, w.shape[0])
    for i in range(0, n_rows, ROW_TILE):
        tile = x[i : i + ROW_TILE]
        padded = torch.nn.functional.pad(tile, (0, 0, 0, ROW_TILE - tile.shape[0]))
        out[i : i + ROW_TILE] = (padded @ w.mT)[: tile.shape[0]]
    return out if bias is None else out + bias
