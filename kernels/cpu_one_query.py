"""The compiled inside of one query's attention: partials of a few segments for one KV head.

Base-2 logits inside, base-e log-sum-exp outside. The order of all sums is that of the keys in a segment
and of the segments, whatever the number of threads.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from .cpu_compile import compiled
from .cpu_formats import LANES
from .cpu_memory import peek, peek_float, rotate_float32
from .cpu_pages import (
    INT4,
    INT4C,
    INT8,
    KEY,
    VALUE,
    address,
    channels_of,
    distance_angles,
    even_tokens,
    kind_of,
    n_tokens_of,
    page_tokens_of,
    prefetch_bytes,
    row_address,
    step_of,
    value_offset,
)
from .cpu_query_book import COARSE_COS, COARSE_SIN, COS, EXACT, N_KV_HEADS, PAGES, Q_START, SIN
from .cpu_softmax import finish
from .cpu_stored import RUN_WORDS, dots, softmax_tile, tile_heads, tile_width, weigh
from .segments import FIXED, HEADS, KIND, N_RUNS, RENUMBERED, RUN_TOKENS, RUNS_AT
from .segments import KINDS as SEGMENT_KINDS

SPAN = 32
"""Consecutive positions that share one rotation of the queries."""
BATCH = 64
"""Values weighed in one sweep: they stay in the first-level cache while it walks over dimensions."""
TOGETHER = 4
"""Segments of one task: enough to read ahead across their edges."""
AHEAD = 2
NEAR_BYTES = 2048
"""How many runs ahead keys and values are asked for, and how much of each; the machine's own read-ahead
finds the rest of a long run."""
_WINDOW = SEGMENT_KINDS.index("window")


@compiled
def partials(first, last, head, at, table, runs, key_starts, base, rules, weights, queries, o, lse, floats,
          logits, found, ends):  # fmt: skip
    """Partials of segments [first, last) for one KV head; False if a page is absent."""
    n_kv_heads, book = peek(at, N_KV_HEADS), peek(at, PAGES)
    n_runs = _find(first, last, head, n_kv_heads, peek(at, Q_START), table, runs, key_starts, base, rules,
                   len(weights) > 0, book, found, ends)  # fmt: skip
    if n_runs < 0:
        return False
    begin = 0
    for s in range(first, last):
        end = ends[s - first]
        n_keys = _logits(
            begin, end, n_runs, head, at, base, weights, queries, floats, logits, found
        )
        _weigh_values(s, head, begin, end, n_keys, n_kv_heads, o, lse, book, floats, logits, found)
        begin = end
    return True


@compiled
def _find(first, last, head, n_kv_heads, q_start, table, runs, key_starts, base, rules, weighted,
          book, found, ends):  # fmt: skip
    """The visible part of every run of segments [first, last): addresses, keys, position.

    found: rows of (address of the first value, keys, address of the first key, position, number of the
    run whose weight they have, whether all keys have that position, kind of the keys, address of their
    channels' scales); ends: after each segment, the rows so far. Returns their number, -1 if a page is
    absent. Runs that follow each other in memory and position are joined.
    """
    page_tokens, even = page_tokens_of(book), even_tokens(book)
    n = 0
    for s in range(first, last):
        n_runs, run_tokens, kind = table[s, N_RUNS], table[s, RUN_TOKENS], table[s, KIND]
        first_run = table[s, RUNS_AT] + (head * table[s, HEADS] // n_kv_heads) * n_runs
        position = key_starts[s, head * key_starts.shape[1] // n_kv_heads]
        if kind == _WINDOW:
            position -= base[head * len(base) // n_kv_heads]
        first_token = runs[first_run]
        renumbered, fixed = table[s, RENUMBERED] == 1, table[s, RENUMBERED] == FIXED
        least, window, gap, bound = rules[kind, 0], rules[kind, 1], rules[kind, 2], rules[kind, 3]
        low_limit = max(least, q_start - window + 1)
        high_limit = min(min(bound, q_start - gap + 1), n_tokens_of(book))
        begin = n
        for r in range(n_runs):
            start = runs[first_run + r]
            low, high = max(start, low_limit), min(start + run_tokens, high_limit)
            before = r * run_tokens - start if renumbered else -first_token
            while start >= 0 and low < high:
                # a run may go over the edge of a page, or of a block
                page = low // page_tokens
                edge = min(high, low - low % even + even)
                src = row_address(page, low - page * page_tokens, KEY, head, book)
                kind_here = kind_of(low, book)
                if src == 0:
                    return -1
                where = position if fixed else position + low + before
                if (
                    n > begin
                    and not weighted
                    and not fixed
                    and found[n - 1, 2] + found[n - 1, 1] * step_of(kind_here, KEY, book) == src
                    and found[n - 1, 3] + found[n - 1, 1] == where
                    and low % even
                ):
                    found[n - 1, 1] += edge - low
                else:
                    found[n, 0] = src + value_offset(low, book)
                    found[n, 1] = edge - low
                    found[n, 2] = src
                    found[n, 3] = where
                    found[n, 4] = first_run + r
                    found[n, 5] = fixed
                    found[n, 6] = kind_here
                    found[n, 7] = channels_of(src, low, book) if kind_here == INT4C else 0
                    n += 1
                low = edge
        ends[s - first] = n
    return n


@compiled
def _stride(logits, group):
    """Floats between the logits of two tiles of heads."""
    return (len(logits) // ((group + 3) // 4)) // LANES * LANES


@compiled
def _logits(begin, end, n_found, head, at, base, weights, queries, floats, logits, found):
    """Logits of the keys of runs [begin, end). Returns the number of keys."""
    exact, book = peek(at, EXACT) == 1, peek(at, PAGES)
    n_heads, head_dim = queries.shape
    n_kv_heads = peek(at, N_KV_HEADS)
    group, half = n_heads // n_kv_heads, head_dim // 2
    query_position = peek(at, Q_START) - base[head * len(base) // n_kv_heads]
    at_query = address(queries) + 4 * head * group * head_dim
    at_turned, at_logits = address(floats), address(logits)
    at_cos, at_sin = peek(at, COS), peek(at, SIN)
    stride = _stride(logits, group)
    n = 0
    origin = -SPAN
    for r in range(begin, end):
        if r + AHEAD < n_found:
            # runs lie apart: ask for a later one while this one is read
            n_bytes = found[r + AHEAD, 1] * step_of(found[r + AHEAD, 6], VALUE, book)
            prefetch_bytes(found[r + AHEAD, 2], min(NEAR_BYTES, n_bytes))
            prefetch_bytes(found[r + AHEAD, 0], min(NEAR_BYTES, n_bytes))
            if found[r + AHEAD, 7] != 0:
                prefetch_bytes(found[r + AHEAD, 7], 4 * head_dim)
        left, src, where = found[r, 1], found[r, 2], found[r, 3]
        row_bytes, variant = step_of(found[r, 6], KEY, book), 4 * found[r, 6] - 1
        step = half
        while left > 0:
            if exact:
                n_here, angle, turned = left, 4 * where * half, at_query
            else:
                fixed = found[r, 5] == 1
                if where < origin or where >= origin + (1 if fixed else SPAN):
                    origin = where
                    _turn(at_turned, at_query, query_position - where, group, head_dim, at_cos, at_sin,
                          peek(at, COARSE_COS), peek(at, COARSE_SIN),
                          at_turned + 4 * 2 * group * head_dim)  # fmt: skip
                n_here = left if fixed else min(left, origin + SPAN - where)
                step = 0 if fixed else half
                angle = 4 * (where - origin) * half
                turned = at_turned
            h = 0
            out = 0
            while h < group:
                m = tile_heads(group - h)
                dots(at_logits + 4 * (out + n * tile_width(m)), turned + 4 * h * head_dim, src, row_bytes,
                     n_here, half, at_cos + angle, at_sin + angle, step, found[r, 7],
                     variant + m)  # fmt: skip
                if len(weights) > 0:
                    for i in range(out + n * tile_width(m), out + (n + n_here) * tile_width(m)):
                        logits[i] += weights[found[r, 4]]
                h += m
                out += stride
            n += n_here
            left -= n_here
            where += n_here
            src += n_here * row_bytes
    return n


@compiled
def _turn(dst, src, distance, n_heads, head_dim, cos, sin, coarse_cos, coarse_sin, angle):
    """Rotate queries by a distance; angle: scratch for one row of cos and sin."""
    half = head_dim // 2
    at_cos, at_sin = distance_angles(distance, half, cos, sin, coarse_cos, coarse_sin, angle)
    for h in range(n_heads):
        at = 4 * h * head_dim
        rotate_float32(dst + at, src + at, half, at_cos, at_sin)


@compiled
def _weigh_values(s, head, begin, end, n_keys, n_kv_heads, o, lse, book, floats, logits, found):
    _, n_heads, head_dim = o.shape
    group = n_heads // n_kv_heads
    stride = _stride(logits, group)
    at_acc = address(floats) + 4 * group * head_dim
    at_ends = 3 * group * head_dim + 2 * head_dim
    h = 0
    first = 0
    while h < group:
        m = tile_heads(group - h)
        width = tile_width(m)
        n_floats = n_keys * width
        for i in range(n_floats, (n_floats + LANES - 1) // LANES * LANES):
            logits[first + i] = -np.inf
        at_s = address(logits) + 4 * first
        at_top = address(floats) + 4 * at_ends
        softmax_tile(at_s, n_keys, width, at_top, at_top + 4 * LANES)
        _scale_weights(first, width, begin, end, head_dim, book, logits, found)
        for i in range(m * head_dim):
            floats[group * head_dim + i] = 0.0
        r, done = begin, 0
        while r < end:
            size, batch, kind = 0, 0, found[r, 6]
            while (
                r + batch < end
                and found[r + batch, 6] == kind
                and (batch == 0 or size + found[r + batch, 1] <= BATCH)
            ):
                size += found[r + batch, 1]
                batch += 1
            weigh(at_acc, at_s + 4 * done * width, address(found) + 8 * RUN_WORDS * r, batch,
                  step_of(kind, VALUE, book), head_dim, 4 * kind + m - 1)  # fmt: skip
            done += size
            r += batch
        for g in range(m):
            row = head * group + h + g
            lse[s, row], inverse = finish(floats[at_ends + g], floats[at_ends + LANES + g])
            for d in range(head_dim):
                o[s, row, d] = floats[group * head_dim + g * head_dim + d] * inverse
        h += m
        first += stride


@compiled
def _scale_weights(first, width, begin, end, head_dim, book, logits, found):
    """Values that end with a scale: it goes into the weights."""
    n = first
    for r in range(begin, end):
        kind = found[r, 6]
        if kind not in (INT8, INT4):
            return  # so are all others
        at, row_bytes = found[r, 0] + head_dim, step_of(kind, VALUE, book)
        if kind == INT4:
            at -= head_dim // 2
        for _ in range(found[r, 1]):
            scale = peek_float(at)
            for w in range(width):
                logits[n + w] *= scale
            n += width
            at += row_bytes
