"""Attention over segments in numba: `attend._attend_segment` on pages, one task per segment and KV
head. Base-2 logits inside, base-e log-sum-exp outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import njit
from torch import Tensor

from ..core.stage import LayerPolicy
from .cpu_pages import (
    KEY,
    OPTIONS,
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
from .cpu_tiles import (
    LANES,
    ROWS,
    dots_1x1,
    dots_1x6,
    scaled_1,
    scaled_2,
    scaled_4,
    scaled_6,
    softmax_columns,
    softmax_row,
    take_ticket,
    tile_1,
    tile_2,
    tile_4,
    tile_6,
)
from .paged import PagedKV, absent_page
from .plan import Segment
from .rope import Rope

COLUMNS = 3 * LANES
"""Query rows of one pass over a segment: 3 vectors, 8 register tiles."""
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
    rows, all_runs, all_starts = [], [], []
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


@njit(**OPTIONS)
def _worker(state, n_tasks, o, lse, size, table, runs, key_starts, tiles, cos, sin, book, keys,
            values, logits, spans):  # type: ignore[no-untyped-def]  # fmt: skip
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
            _many(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans)
        else:
            _one(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans)


@njit(**OPTIONS)
def _gather(s, head, n_kv_heads, size, table, runs, key_starts, cos, sin, book, keys, values,
            spans):  # type: ignore[no-untyped-def]  # fmt: skip
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


@njit(**OPTIONS)
def _many(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans):  # type: ignore[no-untyped-def]
    """A block of queries: logits [key, row] with rows in the lanes, so softmax needs no shuffles."""
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


@njit(**OPTIONS)
def _finish(logits, after, c, lse, row):  # type: ignore[no-untyped-def]
    """From base-2 maximum and sum of column c: log-sum-exp (base e) and 1 / sum."""
    top = logits[after + c]
    total = logits[after + COLUMNS + c]
    if total > 0.0:
        lse[row] = np.float32((np.float64(top) + math.log2(total)) * math.log(2.0))
        logits[after + 2 * COLUMNS + c] = np.float32(1.0) / total
    else:
        # a row that sees nothing; NaN keys come here as NaN sums and stay visible as NaN
        lse[row] = -np.inf if total == 0.0 else np.nan
        logits[after + 2 * COLUMNS + c] = 0.0 if total == 0.0 else np.nan


@njit(**OPTIONS)
def _one(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans):  # type: ignore[no-untyped-def]
    """One query: logits [head of the group, key] with keys in the lanes."""
    n_group, head_dim = tiles.shape[1], tiles.shape[2]
    padded = (n_keys + LANES - 1) // LANES * LANES
    at_k, at_v, at_s = address(keys), address(values), address(logits)
    after = n_group * padded
    first_row = head * n_group
    flat_lse = lse.reshape(lse.shape[0], -1)
    for g in range(n_group):
        query = address(tiles[head, g])
        row = at_s + 4 * g * padded
        i = 0
        while i < n_keys:
            if n_keys - i >= ROWS:
                dots_1x6(row + 4 * i, ROWS, query, head_dim, at_k + 4 * i * head_dim, head_dim,
                         head_dim)  # fmt: skip
                i += ROWS
            else:
                dots_1x1(row + 4 * i, 1, query, head_dim, at_k + 4 * i * head_dim, head_dim,
                         head_dim)  # fmt: skip
                i += 1
        for i in range(n_keys):
            if spans[i, 0] > 0 or spans[i, 1] < 1:
                logits[g * padded + i] = -np.inf
        for i in range(n_keys, padded):
            logits[g * padded + i] = -np.inf
        softmax_row(row, padded // LANES, at_s + 4 * (after + g), at_s + 4 * (after + COLUMNS + g))
        _finish(logits, after, g, flat_lse[s], first_row + g)
    at_inverse = at_s + 4 * (after + 2 * COLUMNS)
    at_o = address(o) + 4 * (s * size[2] + first_row) * head_dim
    g = 0
    while g < n_group:
        left = n_group - g
        a, inverse = at_s + 4 * g * padded, at_inverse + 4 * g
        for d in range(0, head_dim, LANES):
            out, b = at_o + 4 * (g * head_dim + d), at_v + 4 * d
            if left >= ROWS:
                scaled_6(out, head_dim, a, padded, 1, b, head_dim, n_keys, inverse)
            elif left >= 4:
                scaled_4(out, head_dim, a, padded, 1, b, head_dim, n_keys, inverse)
            elif left >= 2:
                scaled_2(out, head_dim, a, padded, 1, b, head_dim, n_keys, inverse)
            else:
                scaled_1(out, head_dim, a, padded, 1, b, head_dim, n_keys, inverse)
        g += 6 if left >= ROWS else 4 if left >= 4 else 2 if left >= 2 else 1


def merge(o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    """`attend.merge_partials` into out [H, Tq, D] and out_lse [H, Tq]."""
    n_segments, n_heads, n_queries, head_dim = o.shape
    n_rows = n_heads * n_queries
    partials = o.numpy().reshape(n_segments, n_rows, head_dim)
    arguments = (
        partials, lse.numpy().reshape(n_segments, n_rows),
        out.numpy().reshape(n_rows, head_dim), out_lse.numpy().reshape(n_rows),
    )  # fmt: skip
    n_tasks = -(-n_rows // COLUMNS)
    if n_tasks == 1:
        _merge_rows(*arguments, 0, n_rows)
        return
    with POOL.lock:
        POOL.run(_merge_worker, arguments, n_tasks)


@njit(**OPTIONS)
def _merge_worker(state, n_tasks, o, lse, out, out_lse):  # type: ignore[no-untyped-def]
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            return
        first = task * COLUMNS
        _merge_rows(o, lse, out, out_lse, first, min(first + COLUMNS, o.shape[1]))


@njit(**OPTIONS)
def _merge_rows(o, lse, out, out_lse, first, last):  # type: ignore[no-untyped-def]
    n_segments, _, head_dim = o.shape
    for r in range(first, last):
        top = np.float32(-np.inf)
        for s in range(n_segments):
            if lse[s, r] > top or lse[s, r] != lse[s, r]:
                top = lse[s, r]
        safe = np.float32(0.0) if top == -np.inf else top
        total = np.float32(0.0)
        for d in range(head_dim):
            out[r, d] = 0.0
        for s in range(n_segments):
            weight = np.float32(math.exp(lse[s, r] - safe))
            total += weight
            for d in range(head_dim):
                out[r, d] += weight * o[s, r, d]
        inverse = np.float32(1.0) / total if total != 0.0 else np.float32(0.0)
        for d in range(head_dim):
            out[r, d] *= inverse
        out_lse[r] = np.float32(safe + math.log(total)) if total != 0.0 else np.float32(-np.inf)
