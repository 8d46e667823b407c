"""Queries for the numba kernels: rotated, averaged, and laid out in register tiles.

In numba rather than torch because torch's thread pool would wake for it, and its threads spin for a
while after each operation: on shared cores that costs more than the kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .cpu_compile import compiled
from .cpu_ir import LANES


def query_tiles(
    q: Tensor,
    positions: np.ndarray,
    angles: tuple[np.ndarray, np.ndarray],
    stride: int,
    scale: float,
    n_lead: int,
    repeat_first: bool,
) -> np.ndarray:
    """Rotate, average groups of `stride` queries, scale, transpose.

    q: [H, Tq, D] float32; positions: int64 [1 or heads that divide H, Tq], inside the angle table.
    Heads are joined into n_lead groups of H / n_lead, whose rows are (head, query). Returns
    [n_lead, n_tiles, D, 16]; lanes past the last row are zeros, or repeat the first row. If queries
    average to one per head the result is [n_lead, H / n_lead, D, 1].
    """
    plain = np.ascontiguousarray(q.detach().numpy(), dtype=np.float32)
    n_heads, n_queries, head_dim = plain.shape
    n_pooled = -(-n_queries // stride)
    n_rows = n_heads // n_lead * n_pooled
    if n_pooled == 1:
        tiles = np.empty((n_lead, n_rows, head_dim, 1), dtype=np.float32)
    else:
        tiles = np.zeros((n_lead, -(-n_rows // LANES), head_dim, LANES), dtype=np.float32)
    _fill(plain, np.ascontiguousarray(positions), *angles, stride, np.float32(scale), tiles,
          repeat_first)  # fmt: skip
    return tiles


@compiled
def _fill(
    q: Any, positions: Any, cos: Any, sin: Any, stride: int, scale: Any, tiles: Any, repeat: bool
) -> None:
    n_heads, n_queries, head_dim = q.shape
    half = head_dim // 2
    heads_per_lead = n_heads // tiles.shape[0]
    n_pooled = (n_queries + stride - 1) // stride
    width = tiles.shape[3]
    for h in range(n_heads):
        lead = h // heads_per_lead
        sel = h * positions.shape[0] // n_heads
        for t in range(n_pooled):
            r = h % heads_per_lead * n_pooled + t
            first = t * stride
            last = min(first + stride, n_queries)
            share = scale / np.float32(last - first)
            tile = tiles[lead, r // width]
            lane = r % width
            for d in range(half):
                low = np.float32(0.0)
                high = np.float32(0.0)
                for i in range(first, last):
                    c = cos[positions[sel, i], d]
                    s = sin[positions[sel, i], d]
                    low += q[h, i, d] * c - q[h, i, half + d] * s
                    high += q[h, i, half + d] * c + q[h, i, d] * s
                tile[d, lane] = low * share
                tile[half + d, lane] = high * share
    n_rows = heads_per_lead * n_pooled
    if repeat and width > 1:
        for lead in range(tiles.shape[0]):
            for r in range(n_rows, tiles.shape[1] * width):
                for d in range(head_dim):
                    tiles[lead, r // width, d, r % width] = tiles[lead, 0, d, 0]
