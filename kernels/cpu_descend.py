"""The compiled inside of the binary-search scorer: one KV head, one tile of chunks.

starts and base: int64 [n], chunk starts (-1 = padding) and positions of their keys. settings, int64:
chunk, end of the candidates, paper variant, keys (RAW, one position per CHUNK, or per TOKEN), heads
of the group, whether to score every token. book, cos, sin: addresses (see `cpu_pages`).
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from .cpu_compile import compiled
from .cpu_ir import LANES
from .cpu_pages import (
    KEY,
    address,
    bytes_of_row,
    kind_of,
    load_rotated,
    load_row,
    page_address,
    prefetch_bytes,
)
from .cpu_tiles import ROWS, dots_1x1, dots_1x3, dots_1x6, max_dot_6
from .cpu_wait import FAILED

TILE = 8 * ROWS
"""Chunks of one task."""
NEAR_BYTES = 4096
"""Chunks of at most this many bytes are prefetched whole."""


RAW, PER_CHUNK, PER_TOKEN = 0, 1, 2


@compiled
def call_near(kv_head, starts, chunk, end, book):
    """Prefetch small chunks: the descent's next address depends on its last score."""
    row_bytes = bytes_of_row(book)
    if chunk * row_bytes > NEAR_BYTES:
        return
    for c in range(len(starts)):
        for token in range(max(0, starts[c]), min(starts[c] + chunk, end)):
            src = page_address(token, KEY, kv_head, book)
            if src != 0:
                prefetch_bytes(src, row_bytes)


@compiled
def _key_row(token, start, position, dst, kv_head, keys, cos, sin, book):
    """Address of a key as float32: in its page where it can be read as it is, else dst. 0 = absent."""
    src = page_address(token, KEY, kv_head, book)
    if src == 0 or (keys == RAW and kind_of(token, book) == 0):
        return src
    if keys == RAW:
        load_row(dst, src, token, KEY, book)
    else:
        offset = token - start if keys == PER_TOKEN else 0
        load_rotated(dst, src, token, book, cos, sin, position + offset)
    return dst


@compiled
def descend(state, head, kv_head, starts, base, scores, queries, cos, sin, settings, book, floats,
            rows, ints):  # fmt: skip
    """Many queries of one head: 6 chunks at a time go down level by level; fills scores[head]."""
    chunk, end, paper, keys = settings[0], settings[1], settings[2] == 1, settings[3]
    n, head_dim = len(starts), rows.shape[1]
    lefts, rights, found_at = ints[:TILE], ints[TILE : 2 * TILE], ints[2 * TILE :]
    best = floats[2 * LANES :]
    at_rows, at_found, at_found_at = address(rows), address(floats), address(found_at)
    at_query = address(queries[0, head])
    at_query_right = address(queries[queries.shape[0] - 1, head])
    n_tiles, width = queries.shape[2], queries.shape[4]
    rounds = 0
    while (1 << rounds) < chunk:
        rounds += 1
    single = False
    for c in range(n):
        lefts[c] = starts[c]
        rights[c] = max(starts[c], min(starts[c] + chunk, end) if starts[c] >= 0 else -1)
        single |= rights[c] - lefts[c] == 1
        best[c] = -np.inf
    # the extra round scores the final token on the right: paper's score, and one-token chunks
    for step in range(rounds + 1 if paper or single else rounds):
        extra = step == rounds
        for first in range(0, n, ROWS):
            size = min(ROWS, n - first)
            for side in range(1 if extra else 0, 2):
                for i in range(ROWS):
                    # lanes without a chunk read something harmless
                    found_at[i] = at_query
                for i in range(size):
                    c = first + i
                    a, z = lefts[c], rights[c]
                    if a < 0:
                        continue
                    middle = (a + z) // 2
                    if z - a <= 1:
                        token = a
                    elif side == 0:
                        token = a if paper else (a + middle) // 2
                    else:
                        token = middle if paper else (middle + z) // 2
                    at = _key_row(token, starts[c], base[c], at_rows + 4 * i * head_dim, kv_head, keys,
                                  cos, sin, book)  # fmt: skip
                    if at == 0:
                        state[FAILED] = 1
                        return
                    found_at[i] = at
                query = at_query if side == 0 else at_query_right
                out = at_found + 4 * LANES * side
                if width == 1:
                    for i in range(size):
                        dots_1x1(out + 4 * i, 1, query, 0, found_at[i], 0, head_dim)
                else:
                    max_dot_6(out, at_found_at, query, n_tiles, head_dim)
            for i in range(size):
                c = first + i
                a, z = lefts[c], rights[c]
                on_left, on_right = floats[i], floats[LANES + i]
                if extra:
                    if paper or min(starts[c] + chunk, end) - starts[c] == 1:
                        best[c] = on_right
                elif z - a > 1:
                    best[c] = max(best[c], max(on_left, on_right))
                    if on_left > on_right:
                        rights[c] = (a + z) // 2
                    else:
                        lefts[c] = (a + z) // 2
    for c in range(n):
        scores[head, c] = best[c]


@compiled
def every_token(state, kv_head, starts, base, scores, queries, cos, sin, settings, book, rows,
                table):  # fmt: skip
    """One query per head: score every token of a small chunk in one sweep, then descend on scores.

    Probing would read most of them anyway, once per head and in an order that stalls. Fills
    scores[h] of all heads of the group.
    """
    chunk, end, paper, keys = settings[0], settings[1], settings[2] == 1, settings[3]
    group, head_dim, n_sides = settings[4], rows.shape[1], queries.shape[0]
    n_rows = n_sides * group
    for s in range(n_sides):
        for g in range(group):
            for d in range(head_dim):
                rows[s * group + g, d] = queries[s, kv_head * group + g, 0, d, 0]
    at_rows, at_table = address(rows), address(table)
    row_bytes = bytes_of_row(book)
    at_key = at_rows + 4 * 2 * group * head_dim
    columns = table.shape[1]
    for c in range(len(starts)):
        start = starts[c]
        size = min(start + chunk, end) - start
        if start < 0:
            size = 0
        # chunks lie apart: ask for the next one while this one is scored
        ahead = 0
        if c + 1 < len(starts) and starts[c + 1] >= 0 and chunk * row_bytes <= NEAR_BYTES:
            ahead = page_address(starts[c + 1], KEY, kv_head, book)
        for j in range(size):
            if ahead != 0:
                prefetch_bytes(ahead + j * row_bytes, row_bytes)
            key = _key_row(start + j, start, base[c], at_key, kv_head, keys, cos, sin, book)  # fmt: skip
            if key == 0:
                state[FAILED] = 1
                return
            r = 0
            while r < n_rows:
                out, query = at_table + 4 * (j * columns + r), at_rows + 4 * r * head_dim
                if n_rows - r >= 6:
                    dots_1x6(out, 0, key, 0, query, head_dim, head_dim)
                    r += 6
                elif n_rows - r >= 3:
                    dots_1x3(out, 0, key, 0, query, head_dim, head_dim)
                    r += 3
                else:
                    dots_1x1(out, 0, key, 0, query, head_dim, head_dim)
                    r += 1
        for g in range(group):
            scores[kv_head * group + g, c] = _walk(table, size, g, n_rows - group + g, paper)


@compiled
def _walk(table, size, left, right, paper):
    """The descent on scores: columns `left` and `right` of table hold those of the two sides."""
    a, z, best = 0, size, np.float32(-np.inf)
    while z - a > 1:
        middle = (a + z) // 2
        left_probe, right_probe = (a + middle) // 2, (middle + z) // 2
        if paper:
            left_probe, right_probe = a, middle
        on_left, on_right = table[left_probe, left], table[right_probe, right]
        best = max(best, max(on_left, on_right))
        if on_left > on_right:
            z = middle
        else:
            a = middle
    if size > 0 and (paper or size == 1):
        best = table[a, right]
    return best
