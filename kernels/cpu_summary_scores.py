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
from .cpu_formats import LANES as WIDTH
from .cpu_ir import LANES
from .cpu_memory import peek, rotate_float32, split_signs, turn_tile
from .cpu_page_summaries import summarise_run
from .cpu_pages import KEY, address, distance_angles, load_kind, prefetch_bytes
from .cpu_stored import plain_dots, tile_heads, tile_width
from .cpu_summary_shares import few_ends, few_shares, many_ends, many_shares, merge_ends
from .cpu_tiles import ROWS, max_dot_6, tile_6
from .cpu_wait import FAILED, leave, take_ticket, wait_until

TILE = 96
"""Chunks of one task, a multiple of 16."""
SPARE = 8
"""Chunks beyond them that a kernel may write."""
NEAR_BYTES = 4096
"""Most bytes asked for ahead: slots lie apart, and the machine's read-ahead stops at their edges."""
_BASE, _SLOTS, _READY, _PER_PAGE, _CHUNK, _PAGE_TOKENS, _ENTRY_BYTES, _KIND = range(8)
"""Columns of a table's book."""
_N_HEADS, _END, _BOUNDS, _SOFTMAX, _SCORED, _MERGE, _MERGED, _SHARE = range(8)
"""Columns of the settings; the last four count."""


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
           spread, table, pages, blocks, ends, floors, turned, rows, ints):  # fmt: skip
    """Products of all chunks; with shares two more rounds: the log-sum-exp of every query over all
    chunks, then every chunk's best share.

    blocks [Hkv, n, ...]: products of a task's chunks, see `_few` and `_many`; ends [Hkv, 2, n, lanes] and
    floors [Hkv, lanes] for their log-sum-exp; all three are empty without shares.
    """
    n_kv_heads, n_chunks = scores.shape
    at_table, at_pages = address(table), address(pages)
    at_settings = address(settings)
    softmax = settings[_SOFTMAX] == 1
    single = tiles.shape[3] == 1
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            break
        kv_head, block = task % n_kv_heads, task // n_kv_heads
        first = block * TILE
        last = min(first + TILE, n_chunks)
        if single:
            good = _few(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos,
                        coarse_sin, settings, spread, at_table, at_pages, blocks, ends, turned,
                        rows)  # fmt: skip
        else:
            good = _many(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos,
                         coarse_sin, settings, spread, at_table, at_pages, blocks, ends, turned, rows,
                         ints)  # fmt: skip
        if not good:
            state[FAILED] = 1
        take_ticket(at_settings + 8 * _SCORED)
    if softmax:
        _shares(n_tasks, scores, starts, tiles, blocks, ends, floors, at_settings, rows)
    leave(address(state))


@compiled
def _shares(n_tasks, scores, starts, tiles, blocks, ends, floors, settings, rows):
    n_kv_heads, n_chunks = scores.shape
    n_rows = tiles.shape[1]
    single = tiles.shape[3] == 1
    while not wait_until(settings + 8 * _SCORED, n_tasks, 100):
        pass
    while True:
        kv_head = take_ticket(settings + 8 * _MERGE)
        if kv_head >= n_kv_heads:
            break
        merge_ends(kv_head, ends, floors, n_rows if single else 0, rows)
        take_ticket(settings + 8 * _MERGED)
    while not wait_until(settings + 8 * _MERGED, n_kv_heads, 100):
        pass
    while True:
        task = take_ticket(settings + 8 * _SHARE)
        if task >= n_tasks:
            break
        kv_head, block = task % n_kv_heads, task // n_kv_heads
        first = block * TILE
        last = min(first + TILE, n_chunks)
        if single:
            few_shares(scores[kv_head, first:last], blocks[kv_head, block], n_rows, floors[kv_head],
                       TILE + SPARE)  # fmt: skip
        else:
            many_shares(scores[kv_head, first:last], blocks[kv_head, block], floors[kv_head])
        mine = starts[kv_head * starts.shape[0] // n_kv_heads]
        for c in range(first, last):
            if mine[c] < 0:
                scores[kv_head, c] = -np.inf


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
         spread, table, pages, blocks, ends, turned, rows):  # fmt: skip
    """One query per head: products [chunk][width] of up to four heads at a time, TILE + SPARE chunks
    for each tile of heads."""
    n_kv_heads, end, bounds = settings[_N_HEADS], settings[_END], settings[_BOUNDS] == 1
    n_rows, head_dim = tiles.shape[1], tiles.shape[2]
    n_dims = 2 * head_dim if bounds else head_dim
    sel = kv_head * starts.shape[0] // n_kv_heads
    backs = where[kv_head * where.shape[0] // n_kv_heads]
    chunk, entry_bytes = peek(table, _CHUNK), peek(table, _ENTRY_BYTES)
    ready, per_page = min(end, peek(table, _READY)), peek(table, _PER_PAGE)
    softmax = settings[_SOFTMAX] == 1
    distance, queries = np.int64(-1), np.int64(0)
    # products go to where all of the task's are kept, or to a place of their own
    out_of_rows = (len(rows) - 2 * head_dim) // 8 * 8 - 4 * WIDTH
    products = address(rows) + 4 * out_of_rows
    if softmax:
        products = address(blocks[kv_head, first // TILE])
    c = first
    while c < last:
        start = starts[sel, c]
        if start < 0:
            break
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
            room = min(last - c, (ready - start) // chunk, WIDTH)
            room = min(room, per_page - start // chunk % per_page) if per_page > 1 else 1
            while (
                n < room
                and starts[sel, c + n] == start + n * chunk
                and (len(backs) == 1 or backs[c + n] == back)
            ):
                n += 1
        if c + n < last:
            _call_near(starts[sel, c + n], end, kv_head, n_kv_heads, table)
        h, at = 0, 0
        while h < n_rows:
            m = tile_heads(n_rows - h)
            width = tile_width(m)
            if softmax:
                plain_dots(products + 4 * (at + (c - first) * width), queries + 4 * h * n_dims, src,
                           row_bytes, n, n_dims, 4 * kind + m - 1)  # fmt: skip
            else:
                plain_dots(products, queries + 4 * h * n_dims, src, row_bytes, n, n_dims,
                           4 * kind + m - 1)  # fmt: skip
                for i in range(n):
                    if h == 0:
                        scores[kv_head, c + i] = -np.inf
                    for g in range(m):
                        x = rows[out_of_rows + i * width + g]
                        if x > scores[kv_head, c + i] or x != x:
                            scores[kv_head, c + i] = x
            h += m
            at += (TILE + SPARE) * width
        c += n
    if softmax:
        few_ends(blocks[kv_head, first // TILE], c - first, n_rows, TILE, TILE + SPARE,
                 ends[kv_head, :, first // TILE])  # fmt: skip
    else:
        for i in range(c, last):
            scores[kv_head, i] = -np.inf
    return True


@compiled
def _many(kv_head, first, last, scores, starts, where, tiles, cos, sin, coarse_cos, coarse_sin, settings,
          spread, table, pages, blocks, ends, turned, rows, ints):  # fmt: skip
    """Many queries: tiles of 6 chunks and 16 queries, products [chunk][query]."""
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
    products = np.int64(0)
    if softmax:
        products = address(blocks[kv_head, first // TILE])
    for i in range(ROWS):
        ints[i] = address(rows) + 4 * i * n_dims
    c = first
    while c < last:
        start = starts[sel, c]
        if start < 0:
            break
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
                tile_6(products + 4 * ((c - first) * n_lanes + t * LANES), n_lanes, address(rows), n_dims,
                       1, queries + 4 * t * n_dims * LANES, LANES, n_dims, 0)  # fmt: skip
        else:
            max_dot_6(address(rows) + 4 * results, address(ints), queries, n_tiles, n_dims)
            for i in range(n):
                scores[kv_head, c + i] = rows[results + i]
        c += n
    if softmax:
        many_ends(blocks[kv_head, first // TILE], c - first, last - first, n_lanes,
                  ends[kv_head, :, first // TILE])  # fmt: skip
    else:
        for i in range(c, last):
            scores[kv_head, i] = -np.inf
    return True
