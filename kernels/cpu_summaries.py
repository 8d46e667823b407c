"""Scores of chunks by their summaries, in numba: `score._summary` on tables, tasks of chunks.

The bound of a chunk is the sum over dimensions of max(q * high, q * low), which is the dot product of
(high, low) with (positive part of q, negative part of q): one kernel serves `bounds` and `mean`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .cpu_ir import LANES
from .cpu_pages import KINDS, as_pages
from .cpu_pool import POOL
from .cpu_query import query_tiles
from .cpu_summary_scores import SPARE, TILE, worker
from .cpu_tiles import ROWS
from .paged import PagedKV, absent_page
from .rope import Rope
from .selection import StagePositions
from .summaries import Summaries, TableName, check_tables, per_page_of, table_of


def summary_scores(
    q: Tensor,
    view: PagedKV,
    starts: Tensor,
    stage: Stage,
    policy: LayerPolicy,
    positions: StagePositions,
    rope: Rope,
    end: int,
    scale: float,
    summaries: Summaries | None,
) -> Tensor | None:
    """float32 [Hkv, C] as `score.score_chunks`, or None where this path does not apply.

    Chunks without a ready summary (cut ones, or all without `summaries`) are read from their keys.
    """
    pages = as_pages(view)
    if pages is None or rope.head_dim != view.head_dim:
        return None
    head_dim = q.shape[2]
    n_kv_heads, n_chunks = view.n_kv_heads, starts.shape[1]
    where, reference = _distances(positions, stage.chunk, starts, end)
    reach = int(where.max(initial=0)) + 1
    fine_cos, fine_sin, coarse_cos, coarse_sin = (t.numpy() for t in rope.distance_tables(reach))
    softmax = policy.reduce == "softmax"
    fold = rope.attention_scaling**2 * (scale / math.log(2.0) if softmax else 1.0)
    small = positions.query.numpy() - reference[:, None]
    tiles = query_tiles(
        q, small, (fine_cos, fine_sin), stage.query_stride, fold, n_kv_heads, repeat_first=True
    )
    name = table_of(stage)
    if check_tables([name], view.page_tokens, policy.sink) is not None:
        summaries = None  # these chunks do not lie in pages' slots
    book, _held = _table(summaries, name, view, stage.chunk)
    bounds = stage.scorer == "bounds"
    settings = np.array([n_kv_heads, end, bounds, softmax, 0, 0, 0, 0], dtype=np.int64)
    scores = torch.empty(n_kv_heads, n_chunks)
    n_dims = head_dim * (2 if bounds else 1)
    n_blocks = -(-n_chunks // TILE)
    arguments = (
        scores.numpy(), np.ascontiguousarray(starts.numpy()), where, tiles, fine_cos, fine_sin,
        coarse_cos, coarse_sin, settings, np.float32(stage.spread), book, pages.book,
    )  # fmt: skip
    with POOL.lock:
        shared = _room(n_kv_heads if softmax else 0, n_blocks, tiles)
        turned = POOL.scratch("summary-q", (tiles[0].size * 3 + 2 * head_dim,))
        rows = POOL.scratch(
            "summary-k", ((ROWS + 2) * max(n_dims, 2 * head_dim) + 8 * LANES * ROWS,)
        )
        ints = POOL.scratch("summary-i", (ROWS,), np.int64)
        n_tasks = n_kv_heads * n_blocks
        if POOL.run(worker, (*arguments, *shared), n_tasks, (turned, rows, ints)):
            raise absent_page(view)
    return scores


def _room(n_kv_heads: int, n_blocks: int, tiles: np.ndarray) -> tuple[np.ndarray, ...]:
    """Blocks, ends and floors of `cpu_summary_scores.worker`. Under the pool's lock."""
    _, n_tiles, _, width = tiles.shape
    if width > 1:
        n_lanes = n_tiles * LANES
        size = (TILE + SPARE) * n_lanes
    else:
        # up to four heads are a tile of as many numbers a chunk, which are joined in sixteens
        n_lanes = -(-n_tiles // 4) * LANES
        size = (TILE + SPARE) * 4 * -(-n_tiles // 4)
    shapes = {
        "summary-b": (n_kv_heads, n_blocks, size),
        "summary-e": (n_kv_heads, 2, n_blocks, n_lanes),
        "summary-f": (n_kv_heads, n_lanes),
    }
    return tuple(POOL.shared(name, shape) for name, shape in shapes.items())


def _distances(
    positions: StagePositions, chunk: int, starts: Tensor, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far back each chunk stands from the block's first query, int64 [Hsel, C] (or [Hsel, 1]: all the
    same), and that query's position [Hsel]."""
    reference = positions.query[:, 0].numpy()
    if positions.per_side:
        # keys stand at 1, whatever they are
        return np.ascontiguousarray(reference[:, None] - 1), reference
    position = positions.key_base
    if positions.per_token:
        position = position + (end - starts).clamp(max=chunk) // 2
    back = reference[:, None] - position.numpy()
    return np.ascontiguousarray(np.maximum(back, 0)), reference


def _table(
    summaries: Summaries | None, name: TableName, view: PagedKV, chunk: int
) -> tuple[np.ndarray, object]:
    """A table's book for compiled code, see `cpu_summary_scores`, and what must live as long."""
    table = None if summaries is None else summaries.tables.get(name)
    page_tokens = view.page_tokens
    if table is None or summaries is None:
        return np.array([0, 0, 0, 1, chunk, page_tokens, 0, 0], dtype=np.int64), None
    slots = np.ascontiguousarray(summaries.slots)
    entry_bytes = table.shape[3] * table.shape[4] * table.element_size()
    book = np.array(
        [
            table.data_ptr(),
            slots.ctypes.data,
            summaries.n_tokens,
            per_page_of(chunk, page_tokens),
            chunk,
            page_tokens,
            entry_bytes,
            KINDS[table.dtype],
        ],
        dtype=np.int64,
    )
    return book, (table, slots)
