"""x W^T + b for a few rows: torch's one-row linear is slow, and has other bits for 1 to 3 rows."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_TILE = 8


def linear_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [n, K] float32, w: [N, K] float32, bias: [N] or None. Returns [n, N] float32.

    A row has the same bits whatever rows stand beside it.
    """
    n_rows = x.shape[0]
    out = torch.empty(n_rows, w.shape[0])
    for i in range(0, n_rows, ROW_TILE):
        tile = x[i : i + ROW_TILE]
        # a fixed tile height: library GEMMs have other bits for other heights
        padded = torch.nn.functional.pad(tile, (0, 0, 0, 2 * ROW_TILE - tile.shape[0]))
        out[i : i + ROW_TILE] = (padded @ w.mT)[: tile.shape[0]]
    return out if bias is None else out + bias
