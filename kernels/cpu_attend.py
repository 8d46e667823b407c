"""Attention over segments in numba: `attend._attend_segment` on pages, one task per segment and KV
head. Base-2 logits inside, base-e log-sum-exp outside."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..core.stage import LayerPolicy
from .cpu_compile import compiled
from .cpu_ir import LANES
from .cpu_pages import (
    KEY,
    VALUE,
    address,
    angle_table,
    as_pages,
    load_rotated,
    load_row,
    n_tokens_of,
    page_address,
    value_offset,
    zero_row,
)
from .cpu_pool import POOL
from .cpu_query import query_tiles
from .cpu_softmax import COLUMNS, many_queries, one_query
from .cpu_tiles import take_ticket
from .paged import PagedKV, absent_page
from .plan import Segment
from .rope import Rope

_FAR = 1 << 60


def attend(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    segments: Sequence[Segment],
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
    o: Tensor,
    lse: Tensor,
) -> bool:
    """Fill o [S, H, Tq, D] and lse [S, H, Tq]; False where this path does not apply."""
    pages = as_pages(view)
    base = segments[0].base
    if pages is None or rope.head_dim != view.head_dim or any(s.base != base for s in segments):
        return False
    n_heads, n_queries, head_dim = q.shape
    if n_heads // view.n_kv_heads > COLUMNS:
        return False
    table, runs, key_starts, most_keys, reach = _tables(segments, policy)
    angles = angle_table(rope, max(reach, q_start + n_queries - min(base)))
    if angles is None:
        return False
    positions = np.arange(q_start, q_start + n_queries) - np.array(base)[:, None]
    tiles = query_tiles(
        q, positions, angles, 1, scale / math.log(2.0), view.n_kv_heads, repeat_first=False
    )
    most_keys = -(-most_keys // LANES) * LANES
    columns = COLUMNS if n_queries > 1 else n_heads // view.n_kv_heads
    size = np.array([q_start, n_queries, n_heads], dtype=np.int64)
    arguments = (
        o.numpy(), lse.numpy(), size, table, runs, key_starts, tiles, *angles, pages.book,
    )  # fmt: skip
    with POOL.lock:
        keys = POOL.scratch("attend-k", (most_keys, head_dim))
        values = POOL.scratch("attend-v", (most_keys, head_dim))
        logits = POOL.scratch("attend-s", (most_keys * columns + 4 * COLUMNS,))
        spans = POOL.scratch("attend-span", (most_keys, 2), np.int64)
        n_tasks = len(segments) * view.n_kv_heads
        if POOL.run(_worker, arguments, n_tasks, (keys, values, logits, spans)):
            raise absent_page(view)
    return True


def _tables(
    segments: Sequence[Segment], policy: LayerPolicy
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Segments as one int64 table, their runs and key starts flat; the most keys of a segment, and
    one past the largest key position.

    Columns: offset of runs, heads of runs, runs, tokens of a run, offset of key starts, heads of
    key starts, renumbered, then visibility: least token, window (keys p - window < t), gap (keys
    t <= p - gap), one past the greatest token.
    """
    window = _FAR if policy.dense else policy.window
    rules = {
        "sink": (0, _FAR, policy.window, policy.sink),
        "selected": (policy.sink, _FAR, policy.window, _FAR),
        "window": (0, window, 0, _FAR),
    }
    rows: list[tuple[int, ...]] = []
    all_runs: list[np.ndarray] = []
    all_starts: list[int] = []
    n_runs = n_starts = most_keys = reach = 0
    for s in segments:
        heads, n = s.runs.shape
        rows.append(
            (n_runs, heads, n, s.block_tokens, n_starts, len(s.key_start), int(s.renumbered),
             *rules[s.kind])
        )  # fmt: skip
        all_runs.append(s.runs.reshape(-1))
        all_starts += s.key_start
        n_runs += heads * n
        n_starts += len(s.key_start)
        most_keys = max(most_keys, n * s.block_tokens)
        span = n * s.block_tokens
        if not s.renumbered:
            span = int((s.runs.max(axis=1) - s.runs[:, 0]).max()) + s.block_tokens
        reach = max(reach, max(s.key_start) + span)
    return (
        np.array(rows, dtype=np.int64),
        np.concatenate(all_runs),
        np.array(all_starts, dtype=np.int64),
        most_keys,
        reach,
    )


@compiled
def _worker(state, n_tasks, o, lse, size, table, runs, key_starts, tiles, cos, sin, book, keys,
            values, logits, spans):  # fmt: skip
    n_kv_heads = tiles.shape[0]
    n_segments = table.shape[0]
    at_cos, at_sin, at_book = address(cos), address(sin), address(book)
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            return
        # windows come last and are the largest: begin with them
        s = n_segments - 1 - task // n_kv_heads
        head = task % n_kv_heads
        n_keys = _gather(s, head, n_kv_heads, size, table, runs, key_starts, at_cos, at_sin, at_book,
                         keys, values, spans)  # fmt: skip
        if n_keys < 0:
            state[1] = 1
            return
        if size[1] > 1:
            many_queries(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans)
        else:
            one_query(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans)


@compiled
def _gather(s, head, n_kv_heads, size, table, runs, key_starts, cos, sin, book, keys, values,
            spans):  # fmt: skip
    """Rotated keys, values, and the range of queries [spans[i, 0], spans[i, 1]) that see key i.

    Returns the number of keys, -1 if a page is absent.
    """
    q_start, n_queries = size[0], size[1]
    n_runs, run_tokens = table[s, 2], table[s, 3]
    first_run = table[s, 0] + (head * table[s, 1] // n_kv_heads) * n_runs
    position = key_starts[table[s, 4] + head * table[s, 5] // n_kv_heads]
    first_token = runs[first_run]
    renumbered = table[s, 6] == 1
    least, window, gap, bound = table[s, 7], table[s, 8], table[s, 9], table[s, 10]
    # beyond the last query, or never written: may hold anything
    limit = min(q_start + n_queries, n_tokens_of(book))
    to_value = value_offset(book) * (VALUE - KEY)
    row_bytes = 4 * keys.shape[1]
    at_key, at_value = address(keys), address(values)
    n = 0
    for r in range(n_runs):
        start = runs[first_run + r]
        for token in range(start, start + run_tokens):
            spans[n, 0] = 0
            spans[n, 1] = 0
            if start < 0 or token >= limit:
                zero_row(at_key, book)
                zero_row(at_value, book)
            else:
                if least <= token < bound:
                    spans[n, 0] = max(0, token + gap - q_start)
                    spans[n, 1] = max(0, min(n_queries, token + window - q_start))
                src = page_address(token, KEY, head, book)
                if src == 0:
                    return -1
                where = position + (n if renumbered else token - first_token)
                load_rotated(at_key, src, book, cos, sin, where)
                load_row(at_value, src + to_value, book)
            n += 1
            at_key += row_bytes
            at_value += row_bytes
    return n
