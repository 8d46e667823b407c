"""The compiled inside of attention: softmax of one segment for the queries of one KV head.

Base-2 logits inside, base-e log-sum-exp outside. Every output is one chain of operations in the
segment's key order, so a partial has the same bits in any company.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np

from .cpu_compile import compiled
from .cpu_ir import LANES
from .cpu_pages import address
from .cpu_tiles import (
    ROWS,
    scaled_1,
    scaled_2,
    scaled_4,
    scaled_6,
    softmax_columns,
    tile_1,
    tile_2,
    tile_4,
    tile_6,
)

COLUMNS = 3 * LANES
"""Query rows of one pass over a segment: 3 vectors, 8 register tiles."""


@compiled
def many_queries(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans, weights):
    """A block of queries: logits [key, row] with rows in the lanes, so softmax needs no shuffles.

    weights: base-2 logarithms added to the logits of each key, or empty.
    """
    n_queries = size[1]
    n_kv_heads, head_dim = tiles.shape[0], tiles.shape[2]
    n_rows = size[2] // n_kv_heads * n_queries
    at_k, at_v, at_s = address(keys), address(values), address(logits)
    at_tiles = address(tiles[head])
    after = n_keys * COLUMNS
    at_top, at_total = at_s + 4 * after, at_s + 4 * (after + COLUMNS)
    at_inverse = at_s + 4 * (after + 2 * COLUMNS)
    first_row = head * n_rows
    flat_lse = lse.reshape(lse.shape[0], -1)
    at_o = address(o) + 4 * (s * size[2] * n_queries + first_row) * head_dim
    for r0 in range(0, n_rows, COLUMNS):
        n_columns = min(COLUMNS, n_rows - r0)
        for j in range(0, n_columns, LANES):
            tile = at_tiles + 4 * (r0 + j) * head_dim
            i = 0
            while i < n_keys:
                at, a = at_s + 4 * (i * COLUMNS + j), at_k + 4 * i * head_dim
                left = n_keys - i
                if left >= ROWS:
                    tile_6(at, COLUMNS, a, head_dim, 1, tile, LANES, head_dim, 0)
                    i += 6
                elif left >= 4:
                    tile_4(at, COLUMNS, a, head_dim, 1, tile, LANES, head_dim, 0)
                    i += 4
                elif left >= 2:
                    tile_2(at, COLUMNS, a, head_dim, 1, tile, LANES, head_dim, 0)
                    i += 2
                else:
                    tile_1(at, COLUMNS, a, head_dim, 1, tile, LANES, head_dim, 0)
                    i += 1
        if len(weights) > 0:
            for i in range(n_keys):
                for c in range(n_columns):
                    logits[i * COLUMNS + c] += weights[i]
        for i in range(n_keys):
            low, high = spans[i, 0], spans[i, 1]
            if low > 0 or high < n_queries:
                for c in range(n_columns):
                    t = (r0 + c) % n_queries
                    if t < low or t >= high:
                        logits[i * COLUMNS + c] = -np.inf
        for j in range(0, n_columns, LANES):
            softmax_columns(at_s + 4 * j, COLUMNS, n_keys, at_top + 4 * j, at_total + 4 * j)
        for c in range(n_columns):
            _finish(logits, after, c, flat_lse[s], first_row + r0 + c)
        i = 0
        while i < n_columns:
            left = n_columns - i
            a, inverse = at_s + 4 * i, at_inverse + 4 * i
            for d in range(0, head_dim, LANES):
                out, b = at_o + 4 * ((r0 + i) * head_dim + d), at_v + 4 * d
                if left >= ROWS:
                    scaled_6(out, head_dim, a, 1, COLUMNS, b, head_dim, n_keys, inverse)
                elif left >= 4:
                    scaled_4(out, head_dim, a, 1, COLUMNS, b, head_dim, n_keys, inverse)
                elif left >= 2:
                    scaled_2(out, head_dim, a, 1, COLUMNS, b, head_dim, n_keys, inverse)
                else:
                    scaled_1(out, head_dim, a, 1, COLUMNS, b, head_dim, n_keys, inverse)
            i += 6 if left >= ROWS else 4 if left >= 4 else 2 if left >= 2 else 1


@compiled
def _finish(logits, after, c, lse, row):
    """Log-sum-exp and 1 / sum of column c."""
    lse[row], logits[after + 2 * COLUMNS + c] = finish(
        logits[after + c], logits[after + COLUMNS + c]
    )


@compiled
def finish(top, total):
    """From base-2 maximum and sum of a row: log-sum-exp (base e) and 1 / sum."""
    if total > 0.0:
        lse = np.float32((np.float64(top) + math.log2(total)) * math.log(2.0))
        return lse, np.float32(1.0) / total
    # a row that sees nothing; NaN keys come here as NaN sums and stay visible as NaN
    if total == 0.0:
        return np.float32(-np.inf), np.float32(0.0)
    return np.float32(np.nan), np.float32(np.nan)
