"""Shares of a softmax over all chunks, from products that lie in blocks of a task's chunks each.

A chunk's score is the largest of its shares over the queries. The share of one query grows with its
product less the query's log-sum-exp, so no share is made but the best one: first every block gives the
ends of its columns (maximum and sum), then these are merged into log-sum-exps (floors), then each
chunk's best product above its floor is found. Base 2 throughout.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np

from .cpu_compile import compiled
from .cpu_ir import LANES
from .cpu_pages import address
from .cpu_stored import tile_heads, tile_width
from .cpu_tiles import best_above, column_ends, exp2_floats, merge_columns


@compiled
def many_ends(block, n_live, n_chunks, n_lanes, ends):
    """block: [chunk][n_lanes] products, of which n_live chunks are filled in and n_chunks are read by
    `many_shares`; ends [2, n_lanes] gets maxima and sums of the columns."""
    for i in range(n_live * n_lanes, n_chunks * n_lanes):
        block[i] = -np.inf
    for lane in range(0, n_lanes, LANES):
        column_ends(address(block) + 4 * lane, n_lanes, n_chunks, address(ends[0]) + 4 * lane,
                    address(ends[1]) + 4 * lane)  # fmt: skip


@compiled
def few_ends(block, n_live, n_rows, n_chunks, n_room, ends):
    """block: for every tile of heads [chunk][width], n_room chunks each. Sixteen lanes of ends are
    16 / width chunks of a tile's heads."""
    h, at, lane = 0, 0, 0
    while h < n_rows:
        m = tile_heads(n_rows - h)
        width = tile_width(m)
        for i in range(at + n_live * width, at + n_chunks * width):
            block[i] = -np.inf
        column_ends(address(block) + 4 * at, LANES, n_chunks * width // LANES,
                    address(ends[0]) + 4 * lane, address(ends[1]) + 4 * lane)  # fmt: skip
        h += m
        at += n_room * width
        lane += LANES


@compiled
def merge_ends(kv_head, ends, floors, n_rows, scratch):
    """floors[kv_head]: log-sum-exp of every lane over all blocks; n_rows: heads of `few_ends`, whose
    lanes are joined by head, 0 for those of `many_ends`."""
    tops, totals = ends[kv_head, 0], ends[kv_head, 1]
    n_blocks, n_lanes = tops.shape
    sums = scratch[: 2 * LANES].reshape(2, LANES)
    h = 0
    for lane in range(0, n_lanes, LANES):
        merge_columns(address(tops) + 4 * lane, address(totals) + 4 * lane, n_lanes, n_blocks,
                      address(sums[0]), address(sums[1]))  # fmt: skip
        m, width = LANES, LANES
        if n_rows > 0:
            m = tile_heads(n_rows - h)
            width = tile_width(m)
            h += m
        for g in range(width):
            floor = np.float32(np.inf)  # of lanes that are no query: nothing is above it
            if g < m:
                floor = _log_sum(sums, g, width)
            for i in range(g, LANES, width):
                floors[kv_head, lane + i] = floor


@compiled
def _log_sum(sums, first, step):
    top = np.float32(-np.inf)
    for i in range(first, LANES, step):
        if sums[0, i] > top or sums[0, i] != sums[0, i]:
            top = sums[0, i]
    if top == -np.inf:
        return top
    total = 0.0
    for i in range(first, LANES, step):
        if sums[1, i] != 0.0:
            total += sums[1, i] * 2.0 ** np.float64(sums[0, i] - top)
    return np.float32(top + math.log2(total))


@compiled
def many_shares(scores, block, floors):
    """Best share of every chunk of a block into scores [n]."""
    n_lanes = len(floors)
    for c in range(len(scores)):
        scores[c] = best_above(address(block) + 4 * c * n_lanes, address(floors), n_lanes // LANES)
    _exp2(scores, block)


@compiled
def few_shares(scores, block, n_rows, floors, n_room):
    """The same for one query per head."""
    for c in range(len(scores)):
        scores[c] = -np.inf
    h, at, lane = 0, 0, 0
    while h < n_rows:
        m = tile_heads(n_rows - h)
        width = tile_width(m)
        for c in range(len(scores)):
            for g in range(m):
                x = block[at + c * width + g] - floors[lane + g]
                if x > scores[c] or x != x:
                    scores[c] = x
        h += m
        at += n_room * width
        lane += LANES
    _exp2(scores, block)


@compiled
def _exp2(scores, scratch):
    """scores = 2 ** scores, by way of a buffer that may be written to the end of a vector."""
    n = len(scores)
    for c in range(n):
        scratch[c] = scores[c]
    exp2_floats(address(scratch), n)
    for c in range(n):
        scores[c] = scratch[c]
