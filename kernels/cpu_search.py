"""Binary-search scorer in numba: `score._search` on pages, one task per query head and chunk tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..core.stage import Stage
from .cpu_pages import (
    KEY,
    OPTIONS,
    Pages,
    angle_table,
    as_pages,
    load_rotated,
    load_row,
    page_address,
)
from .cpu_pool import POOL
from .cpu_query import query_tiles
from .cpu_tiles import LANES, ROWS, dots_1x6, max_dot_6, take_ticket
from .paged import PagedKV, absent_page
from .rope import Rope
from .selection import StagePositions

TILE = 8 * ROWS
"""Chunks of one task."""


def search_scores(
    q: Tensor,
    view: PagedKV,
    starts: Tensor,
    stage: Stage,
    positions: StagePositions,
    rope: Rope,
    end: int,
) -> Tensor | None:
    """As `score._search` from unrotated queries: [H, C], or None where this path does not apply.

    In the relative style only differences of positions matter: the query is rotated once per side
    and keys are read raw.
    """
    pages = as_pages(view)
    if pages is None or rope.head_dim != view.head_dim:
        return None
    query = positions.query.numpy()
    span = stage.chunk if positions.per_token else 1
    reach = int(query.max()) + 1
    if not positions.per_side:
        reach = max(reach, int(positions.key_base.max()) + span)
    angles = angle_table(rope, reach)
    if angles is None:
        return None
    sides = [query]
    scale = 1.0
    if positions.per_side:
        # keys stand at 0 and 1; the torch path scales keys too (yarn)
        sides = [query, query - 1]
        scale = rope.attention_scaling
    tiles = np.stack(
        [query_tiles(q, p, angles, stage.query_stride, scale, q.shape[0], True) for p in sides]
    )
    n_heads, n_chunks = q.shape[0], starts.shape[1]
    scores = torch.empty(n_heads, n_chunks)
    settings = np.array(
        [
            stage.chunk,
            end,
            stage.variant == "paper",
            positions.per_side,
            positions.per_token,
            n_heads // view.n_kv_heads,
        ],
        dtype=np.int64,
    )
    arguments = (
        scores.numpy(),
        np.ascontiguousarray(starts.numpy()),
        np.ascontiguousarray(positions.key_base.numpy()),
        tiles,
        *angles,
        settings,
    )
    if _run(arguments, pages):
        raise absent_page(view)
    return scores


def _run(arguments: tuple[Any, ...], pages: Pages) -> bool:
    n_heads, n_chunks = arguments[0].shape
    n_tasks = n_heads * (-(-n_chunks // TILE))
    rest = (pages.bases, pages.memory, pages.row, pages.layout)
    with POOL.lock:
        floats = POOL.scratch("search", (ROWS * int(pages.layout[1]) + LANES + TILE,))
        ints = POOL.scratch("search-int", (2 * TILE,), np.int64)
        return POOL.run(_worker, (*arguments, *rest), n_tasks, (floats, ints))


@njit(**OPTIONS)
def _worker(state, n_tasks, scores, starts, base, queries, cos, sin, settings,
            bases, memory, row, layout, floats, ints):  # type: ignore[no-untyped-def]  # fmt: skip
    n_heads, n_chunks = scores.shape
    while True:
        task = take_ticket(state.ctypes.data)
        if task >= n_tasks:
            return
        # heads are the inner index: the heads of a group read the same pages one after another
        head = task % n_heads
        first = task // n_heads * TILE
        last = min(first + TILE, n_chunks)
        _tile(state, head, first, last, scores, starts, base, queries, cos, sin, settings,
              bases, memory, row, layout, floats, ints)  # fmt: skip


@njit(**OPTIONS)
def _tile(state, head, first, last, scores, starts, base, queries, cos, sin, settings,
          bases, memory, row, layout, floats, ints):  # type: ignore[no-untyped-def]  # fmt: skip
    chunk, end, paper, per_side = settings[0], settings[1], settings[2], settings[3]
    head_dim = layout[1]
    kv_head = head // settings[5]
    sel = head * starts.shape[0] // scores.shape[0]
    n = last - first
    lefts, rights = ints[:TILE], ints[TILE:]
    found = floats[ROWS * head_dim : ROWS * head_dim + LANES]
    best = floats[ROWS * head_dim + LANES :]
    rounds = 0
    while (1 << rounds) < chunk:
        rounds += 1
    for c in range(n):
        lefts[c] = starts[sel, first + c]
        rights[c] = min(lefts[c] + chunk, end)
        if lefts[c] < 0:
            rights[c] = lefts[c]
        best[c] = -np.inf
    # the extra round scores the final token on the right: paper's score, and one-token chunks
    for step in range(rounds + 1):
        for g in range(0, n, ROWS):
            size = min(ROWS, n - g)
            if step == rounds:
                wanted = False
                for i in range(size):
                    c = g + i
                    whole = min(starts[sel, first + c] + chunk, end) - starts[sel, first + c]
                    if lefts[c] >= 0 and (paper == 1 or whole == 1):
                        wanted = True
                if not wanted:
                    continue
            for side in range(2):
                if step == rounds and side == 0:
                    continue
                for i in range(size):
                    c = g + i
                    a, z = lefts[c], rights[c]
                    middle = (a + z) // 2
                    if z - a <= 1:
                        token = a
                    elif side == 0:
                        token = a if paper else (a + middle) // 2
                    else:
                        token = middle if paper else (middle + z) // 2
                    if token < 0:
                        continue
                    src = page_address(token, KEY, kv_head, bases, memory, row, layout)
                    if src == 0:
                        state[1] = 1
                        return
                    dst = floats.ctypes.data + 4 * i * head_dim
                    if per_side:
                        load_row(dst, src, layout)
                    else:
                        position = base[sel, first + c]
                        if settings[4]:
                            position += token - starts[sel, first + c]
                        load_rotated(dst, src, layout, cos, sin, position)
                rows = queries[side if per_side else 0, head]
                out = found.ctypes.data + 4 * 8 * side
                if rows.shape[2] == 1:
                    dots_1x6(out, ROWS, rows.ctypes.data, head_dim, floats.ctypes.data, head_dim,
                             head_dim)  # fmt: skip
                else:
                    max_dot_6(out, floats.ctypes.data, head_dim, rows.ctypes.data, rows.shape[0],
                              head_dim)  # fmt: skip
            for i in range(size):
                c = g + i
                a, z = lefts[c], rights[c]
                on_left, on_right = found[i], found[8 + i]
                if step == rounds:
                    whole = min(starts[sel, first + c] + chunk, end) - starts[sel, first + c]
                    if paper == 1 or whole == 1:
                        best[c] = on_right
                elif z - a > 1:
                    best[c] = max(best[c], max(on_left, on_right))
                    if on_left > on_right:
                        rights[c] = (a + z) // 2
                    else:
                        lefts[c] = (a + z) // 2
    for c in range(n):
        scores[head, first + c] = best[c]
