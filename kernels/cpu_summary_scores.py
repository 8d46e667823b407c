"""The compiled inside of the summary scorers: tasks of chunks of one KV head, then shares if wanted.

table: address of a book that says where ready summaries lie, see the columns below; pages: of
Pages.book, for chunks that have none. Queries come as tiles rotated to the first query's position and
are turned by a chunk's distance from it, once for neighbours at the same distance.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from .cpu_compile import compiled
from .cpu_ir import LANES
from .cpu_memory import peek, rotate_float32, split_signs, turn_tile
from .cpu_page_summaries import summarise_run
from .cpu_pages import KEY, address, distance_angles, load_kind, prefetch_bytes
from .cpu_stored import LANES as WIDTH
from .cpu_stored import plain_dots, softmax_tile, tile_heads, tile_width
from .cpu_tiles import ROWS, max_dot_6, softmax_columns, tile_6
from .cpu_wait import FAILED, leave, take_ticket, wait_until

TILE = 96
"""Chunks of one task."""
NEAR_BYTES = 4096
"""Most bytes asked for ahead: slots lie apart, and the machine's read-ahead stops at their edges."""
_BASE, _SLOTS, _READY, _PER_PAGE, _CHUNK, _PAGE_TOKENS, _ENTRY_BYTES, _KIND = range(8)
"""Columns of a table's book."""
_N_HEADS, _END, _BOUNDS, _SOFTMAX, _DONE, _MERGE = range(6)
"""Columns of the settings; the last two count."""


@compiled
def _entry(start, end, kv_head, n_kv_heads, table):
    """Address of a chunk's ready summary, 0 if it has none (it is cut, or not filled in)."""
    chunk = peek(table, _CHUNK)
    if start + chunk > end or start + chunk > peek(table, _READY):
        return 0
    page_tokens = peek(table, _PAGE_TOKENS)
    page = (start + chunk - 1) // page_tokens
    slot = peek(peek(table, _SLOTS), page)
    per_page = peek(table, _PER_PAGE)
    index = (start - page * page_tokens) // chunk if per_page > 1 else 0
    return peek(table, _BASE) + ((slot * n_kv_heads + kv_head) * per_page + index) * peek(
        table, _ENTRY_BYTES
    )


@compiled
def _call_near(start, end, kv_head, n_kv_heads, table):
    """Ask for the summaries of a later chunk and those that follow it in its slot."""
    if start < 0:
        return
    src = _entry(start, end, kv_head, n_kv_heads, table)
    if src != 0:
        n = min(WIDTH, peek(table, _PER_PAGE)) * peek(table, _ENTRY_BYTES)
        prefetch_bytes(src, min(n, NEAR_BYTES))


@compiled
def _summarise(rows, at_row, start, end, chunk, kv_head, head_dim, bounds, spread, pages):
    """A summary from the keys of [start, min(start + chunk, end)) into rows[at_row:]; False if absent.

    The last 2 * head_dim floats of rows are scratch.
    """
    n = 2 if bounds else 1
    out = rows[at_row : at_row + n * head_dim].reshape(n, head_dim)
    scratch = rows[len(rows) - 2 * head_dim :].reshape(2, head_dim)
    return summarise_run(out, scratch, start, min(start + chunk, end), KEY, kv_head, spread, pages)


@compiled
def worker(state, n_tasks, scores, starts, where, tiles, cos, sin, coarse_cos, coarse_sin, settings,
           spread, table, pages, everything, turned, rows, ints):  # fmt: skip
    n_kv_heads, n_chunks = scores.shape
    at_table, at_pages = address(table), address(pages)
    done = address(settings) + 8 * _DONE
    softmax = settings[_SOFTMAX] == 1
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            break
        kv_head = task % n_kv_heads
        first = task // n_kv_heads * TILE
        last = min(first + TILE, n_chunks)
        if tiles.shape[3] == 1:
            good = _few(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos,
                        coarse_sin, settings, spread, at_table, at_pages, everything, turned,
                        rows)  # fmt: skip
        else:
            good = _many(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos,
                         coarse_sin, settings, spread, at_table, at_pages, everything, turned, rows,
                         ints)  # fmt: skip
        if not good:
            state[FAILED] = 1
        take_ticket(done)
    if softmax:
        while not wait_until(done, n_tasks, 100):
            pass
        while True:
            kv_head = take_ticket(address(settings) + 8 * _MERGE)
            if kv_head >= n_kv_heads:
                break
            mine = starts[kv_head * starts.shape[0] // n_kv_heads]
            _shares(kv_head, mine, scores, settings, everything, tiles, rows)
    leave(address(state))


@compiled
def _turn_all(kv_head, distance, tiles, cos, sin, coarse_cos, coarse_sin, bounds, turned):
    """All queries of a KV head at a distance, in their positive and negative parts for bounds.

    Returns the address of the result, laid out as the tiles.
    """
    n_tiles, head_dim, lanes = tiles.shape[1], tiles.shape[2], tiles.shape[3]
    size = head_dim * lanes
    half, scratch = head_dim // 2, address(turned) + 4 * 3 * n_tiles * size
    at_cos, at_sin = distance_angles(distance, half, address(cos), address(sin), address(coarse_cos),
                                     address(coarse_sin), scratch)  # fmt: skip
    for i in range(n_tiles):
        dst, src = address(turned) + 4 * i * size, address(tiles[kv_head, i])
        if lanes > 1:
            turn_tile(dst, src, half, at_cos, at_sin)
        else:
            rotate_float32(dst, src, half, at_cos, at_sin)
        if bounds:
            split_signs(address(turned) + 4 * (n_tiles + 2 * i) * size, dst, size)
    return address(turned) + (4 * n_tiles * size if bounds else 0)


@compiled
def _few(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos, coarse_sin, settings,
         spread, table, pages, everything, turned, rows):  # fmt: skip
    """One query per head: [chunk][width] logits of up to four heads at a time."""
    n_kv_heads, end, bounds = settings[_N_HEADS], settings[_END], settings[_BOUNDS] == 1
    n_rows, head_dim = tiles.shape[1], tiles.shape[2]
    n_dims = 2 * head_dim if bounds else head_dim
    sel = kv_head * starts.shape[0] // n_kv_heads
    backs = where[kv_head * where.shape[0] // n_kv_heads]
    chunk, entry_bytes = peek(table, _CHUNK), peek(table, _ENTRY_BYTES)
    softmax = settings[_SOFTMAX] == 1
    n_chunks = starts.shape[1]
    distance, queries = np.int64(-1), np.int64(0)
    out_of_rows = (len(rows) - 2 * head_dim) // 8 * 8 - 8 * WIDTH
    c = first
    while c < last:
        start = starts[sel, c]
        if start < 0:
            for i in range(c, last):
                scores[kv_head, i] = -np.inf
            if softmax:
                _blank(kv_head, c, last, n_rows, n_chunks, everything)
            return True
        back = backs[c if len(backs) > 1 else 0]
        if back != distance:
            distance = back
            queries = _turn_all(
                kv_head, back, tiles, cos, sin, coarse_cos, coarse_sin, bounds, turned
            )
        src = _entry(start, end, kv_head, n_kv_heads, table)
        kind, row_bytes, n = peek(table, _KIND), entry_bytes, 1
        if src == 0:
            if not _summarise(rows, 0, start, end, chunk, kv_head, head_dim, bounds, spread, pages):
                return False
            src, kind, row_bytes = address(rows), 0, 4 * n_dims
        else:
            # neighbours in one slot, at the same distance, are one run
            while (
                n < WIDTH
                and c + n < last
                and starts[sel, c + n] == start + n * chunk
                and (len(backs) == 1 or backs[c + n] == back)
                and _entry(start + n * chunk, end, kv_head, n_kv_heads, table)
                == src + n * entry_bytes
            ):
                n += 1
        if c + n < last:
            _call_near(starts[sel, c + n], end, kv_head, n_kv_heads, table)
        h, at = 0, 0
        for i in range(n):
            scores[kv_head, c + i] = -np.inf
        while h < n_rows:
            m = tile_heads(n_rows - h)
            width = tile_width(m)
            out = address(rows) + 4 * out_of_rows
            plain_dots(out, queries + 4 * h * n_dims, src, row_bytes, n, n_dims, 4 * kind + m - 1)
            for i in range(n):
                for g in range(m):
                    x = rows[out_of_rows + i * width + g]
                    if softmax:
                        everything[kv_head, at + (c + i) * width + g] = x
                    if x > scores[kv_head, c + i] or x != x:
                        scores[kv_head, c + i] = x
                if softmax and m == 3:
                    everything[kv_head, at + (c + i) * width + 3] = -np.inf
            h += m
            at += (n_chunks + WIDTH) * width
        c += n
    return True


@compiled
def _blank(kv_head, first, last, n_rows, n_chunks, everything):
    h, at = 0, 0
    while h < n_rows:
        m = tile_heads(n_rows - h)
        width = tile_width(m)
        for i in range(first * width, last * width):
            everything[kv_head, at + i] = -np.inf
        h += m
        at += (n_chunks + WIDTH) * width


@compiled
def _many(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos, coarse_sin, settings,
          spread, table, pages, everything, turned, rows, ints):  # fmt: skip
    """Many queries: tiles of 6 chunks and 16 queries."""
    n_kv_heads, end, bounds = settings[_N_HEADS], settings[_END], settings[_BOUNDS] == 1
    n_tiles, head_dim = tiles.shape[1], tiles.shape[2]
    n_dims = 2 * head_dim if bounds else head_dim
    sel = kv_head * starts.shape[0] // n_kv_heads
    backs = where[kv_head * where.shape[0] // n_kv_heads]
    chunk = peek(table, _CHUNK)
    softmax = settings[_SOFTMAX] == 1
    n_lanes = n_tiles * LANES
    distance, queries = np.int64(-1), np.int64(0)
    results = (len(rows) - 2 * head_dim) // 8 * 8 - LANES * ROWS
    for i in range(ROWS):
        ints[i] = address(rows) + 4 * i * n_dims
    c = first
    while c < last:
        start = starts[sel, c]
        if start < 0:
            for i in range(c, last):
                scores[kv_head, i] = -np.inf
                if softmax:
                    for lane in range(n_lanes):
                        everything[kv_head, i * n_lanes + lane] = -np.inf
            return True
        back = backs[c if len(backs) > 1 else 0]
        if back != distance:
            distance = back
            queries = _turn_all(
                kv_head, back, tiles, cos, sin, coarse_cos, coarse_sin, bounds, turned
            )
        n = 0
        while (
            n < ROWS
            and c + n < last
            and starts[sel, c + n] >= 0
            and (len(backs) == 1 or backs[c + n] == back)
        ):
            src = _entry(starts[sel, c + n], end, kv_head, n_kv_heads, table)
            if src != 0:
                load_kind(address(rows) + 4 * n * n_dims, src, n_dims, peek(table, _KIND))
            elif not _summarise(rows, n * n_dims, starts[sel, c + n], end, chunk, kv_head, head_dim, bounds,
                                spread, pages):  # fmt: skip
                return False
            n += 1
        for i in range(n, ROWS):
            for d in range(n_dims):
                rows[i * n_dims + d] = rows[d]
        if softmax:
            for t in range(n_tiles):
                out = address(rows) + 4 * results
                tile_6(
                    out,
                    LANES,
                    address(rows),
                    n_dims,
                    1,
                    queries + 4 * t * n_dims * LANES,
                    LANES,
                    n_dims,
                    0,
                )
                for i in range(n):
                    for lane in range(LANES):
                        everything[kv_head, (c + i) * n_lanes + t * LANES + lane] = rows[
                            results + i * LANES + lane
                        ]
        else:
            max_dot_6(address(rows) + 4 * results, address(ints), queries, n_tiles, n_dims)
            for i in range(n):
                scores[kv_head, c + i] = rows[results + i]
        c += n
    return True


@compiled
def _shares(kv_head, starts, scores, settings, everything, tiles, rows):
    """Softmax over the chunks for every query row; a chunk gets the largest of its shares."""
    n_chunks = len(starts)
    at_ends = (len(rows) - 2 * tiles.shape[2]) // 8 * 8 - LANES * ROWS
    top, total = address(rows) + 4 * at_ends, address(rows) + 4 * (at_ends + LANES)
    for c in range(n_chunks):
        scores[kv_head, c] = 0.0
    if tiles.shape[3] > 1:
        n_lanes = tiles.shape[1] * LANES
        for t in range(tiles.shape[1]):
            at = address(everything[kv_head]) + 4 * t * LANES
            softmax_columns(at, n_lanes, n_chunks, top, total)
            for c in range(n_chunks):
                for lane in range(LANES):
                    x = (
                        everything[kv_head, c * n_lanes + t * LANES + lane]
                        / rows[at_ends + LANES + lane]
                    )
                    if x > scores[kv_head, c] or x != x:
                        scores[kv_head, c] = x
    else:
        n_rows, h, at = tiles.shape[1], 0, 0
        while h < n_rows:
            m = tile_heads(n_rows - h)
            width = tile_width(m)
            n = n_chunks * width
            for i in range(n, (n + WIDTH - 1) // WIDTH * WIDTH):
                everything[kv_head, at + i] = -np.inf
            softmax_tile(address(everything[kv_head]) + 4 * at, n_chunks, width, top, total)
            for c in range(n_chunks):
                for g in range(m):
                    x = everything[kv_head, at + c * width + g] / rows[at_ends + LANES + g]
                    if x > scores[kv_head, c] or x != x:
                        scores[kv_head, c] = x
            h += m
            at += (n_chunks + WIDTH) * width
    for c in range(n_chunks):
        if starts[c] < 0:
            scores[kv_head, c] = -np.inf
