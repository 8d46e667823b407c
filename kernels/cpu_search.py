"""Binary-search scorer in numba: `score._search` on pages, one task per KV head and chunk tile."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.stage import Stage
from .cpu_compile import compiled
from .cpu_descend import PER_CHUNK, PER_TOKEN, RAW, TILE, call_near, descend, every_token
from .cpu_ir import LANES
from .cpu_pages import address, angle_table, as_pages
from .cpu_pool import POOL
from .cpu_query import query_tiles
from .cpu_tiles import ROWS
from .cpu_wait import leave, take_ticket
from .paged import PagedKV, absent_page
from .rope import Rope
from .selection import StagePositions


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
    group = n_heads // view.n_kv_heads
    scores = torch.empty(n_heads, n_chunks)
    keys = RAW if positions.per_side else PER_TOKEN if positions.per_token else PER_CHUNK
    # one query probes most tokens of a small chunk, head by head: sweep instead
    sweep = tiles.shape[-1] == 1 and stage.chunk <= 4 * group * (stage.chunk - 1).bit_length()
    settings = np.array(
        [stage.chunk, end, stage.variant == "paper", keys, group, sweep], dtype=np.int64
    )
    arguments = (
        scores.numpy(),
        np.ascontiguousarray(starts.numpy()),
        np.ascontiguousarray(positions.key_base.numpy()),
        tiles,
        *angles,
        settings,
        pages.book,
    )
    n_tasks = view.n_kv_heads * (-(-n_chunks // TILE))
    with POOL.lock:
        floats = POOL.scratch("search", (2 * LANES + TILE,))
        rows = POOL.scratch("search-rows", (max(ROWS, 2 * group + 1), view.head_dim))
        table = POOL.scratch("search-table", (stage.chunk, 2 * group))
        ints = POOL.scratch("search-int", (2 * TILE + ROWS,), np.int64)
        if POOL.run(_worker, arguments, n_tasks, (floats, rows, table, ints)):
            raise absent_page(view)
    return scores


@compiled
def _worker(state, n_tasks, scores, starts, base, queries, cos, sin, settings, book, floats, rows,
            table, ints):  # fmt: skip
    n_heads, n_chunks = scores.shape
    group = settings[4]
    n_kv_heads = n_heads // group
    # plain addresses: taking one from an array in an inner loop costs more than a dot product
    at_cos, at_sin, at_book = address(cos), address(sin), address(book)
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        kv_head = task % n_kv_heads
        first = task // n_kv_heads * TILE
        last = min(first + TILE, n_chunks)
        mine = starts[kv_head * starts.shape[0] // n_kv_heads, first:last]
        position = base[kv_head * starts.shape[0] // n_kv_heads, first:last]
        if settings[5]:
            every_token(state, kv_head, mine, position, scores[:, first:last], queries, at_cos,
                        at_sin, settings, at_book, rows, table)  # fmt: skip
            continue
        call_near(kv_head, mine, settings[0], settings[1], at_book)
        for g in range(group):
            descend(state, kv_head * group + g, kv_head, mine, position, scores[:, first:last],
                    queries, at_cos, at_sin, settings, at_book, floats, rows, ints)  # fmt: skip
