"""Attention over segments in numba: `attend._attend_segment` on pages, one task per segment and KV
head. Base-2 logits inside, base-e log-sum-exp outside."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..core.stage import LayerPolicy
from .cpu_compile import compiled
from .cpu_decode import attend as decode
from .cpu_decode import log_weights, visibility
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
from .cpu_softmax import COLUMNS, many_queries
from .cpu_wait import FAILED, leave, take_ticket
from .paged import PagedKV, absent_page
from .rope import Rope
from .segments import (
    FIXED,
    HEADS,
    KIND,
    KINDS,
    N_RUNS,
    RENUMBERED,
    RUN_TOKENS,
    RUNS_AT,
    Segments,
)

_WINDOW, _TAIL = KINDS.index("window"), KINDS.index("tail")


def attend(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    segments: Segments,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
    o: Tensor,
    lse: Tensor,
) -> bool:
    """Fill o [S, H, Tq, D] and lse [S, H, Tq]; False where this path does not apply."""
    pages = as_pages(view)
    if pages is None or rope.head_dim != view.head_dim:
        return False
    n_heads, n_queries, head_dim = q.shape
    if n_heads // view.n_kv_heads > COLUMNS:
        return False
    if n_queries == 1:
        return decode(q, q_start, view, segments, policy, rope, scale, o, lse)
    base = segments.base
    angles = angle_table(rope, max(segments.reach, q_start + n_queries - min(base)))
    if angles is None:
        return False
    positions = np.arange(q_start, q_start + n_queries) - np.array(base)[:, None]
    tiles = query_tiles(
        q, positions, angles, 1, scale / math.log(2.0), view.n_kv_heads, repeat_first=False
    )
    most_keys = -(-segments.most_keys // LANES) * LANES
    size = np.array([q_start, n_queries, n_heads], dtype=np.int64)
    arguments = (
        o.numpy(), lse.numpy(), size, segments.table, segments.runs, segments.key_starts,
        np.array(base), visibility(policy), log_weights(segments), tiles, *angles, pages.book,
    )  # fmt: skip
    with POOL.lock:
        keys = POOL.scratch("attend-k", (most_keys, head_dim))
        values = POOL.scratch("attend-v", (most_keys, head_dim))
        logits = POOL.scratch("attend-s", (most_keys * COLUMNS + 4 * COLUMNS,))
        spans = POOL.scratch("attend-span", (most_keys, 2), np.int64)
        n_tasks = len(segments) * view.n_kv_heads
        if POOL.run(_worker, arguments, n_tasks, (keys, values, logits, spans)):
            raise absent_page(view)
    return True


@compiled
def _worker(state, n_tasks, o, lse, size, table, runs, key_starts, base, rules, weights, tiles, cos, sin,
            book, keys, values, logits, spans):  # fmt: skip
    n_kv_heads = tiles.shape[0]
    n_segments = table.shape[0]
    at_cos, at_sin, at_book = address(cos), address(sin), address(book)
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        # windows come last and are the largest: begin with them
        s = n_segments - 1 - task // n_kv_heads
        head = task % n_kv_heads
        n_keys = _gather(s, head, n_kv_heads, size, table, runs, key_starts, base, rules, at_cos,
                         at_sin, at_book, keys, values, spans)  # fmt: skip
        if n_keys < 0:
            state[FAILED] = 1
            leave(address(state))
            return
        # runs of a tail are single keys
        first_run = table[s, RUNS_AT] + (head * table[s, HEADS] // n_kv_heads) * table[s, N_RUNS]
        many_queries(s, head, n_keys, o, lse, size, tiles, keys, values, logits, spans,
                     weights[first_run:] if len(weights) > 0 else weights)  # fmt: skip


@compiled
def _gather(s, head, n_kv_heads, size, table, runs, key_starts, base, rules, cos, sin, book, keys,
            values, spans):  # fmt: skip
    """Rotated keys, values, and the range of queries [spans[i, 0], spans[i, 1]) that see key i.

    Returns the number of keys, -1 if a page is absent.
    """
    q_start, n_queries = size[0], size[1]
    n_runs, run_tokens = table[s, N_RUNS], table[s, RUN_TOKENS]
    first_run = table[s, RUNS_AT] + (head * table[s, HEADS] // n_kv_heads) * n_runs
    position = key_starts[s, head * key_starts.shape[1] // n_kv_heads]
    if table[s, KIND] == _WINDOW:
        position -= base[head * len(base) // n_kv_heads]
    first_token = runs[first_run]
    renumbered, fixed = table[s, RENUMBERED] == 1, table[s, RENUMBERED] == FIXED
    rule = rules[table[s, KIND]]
    least, window, gap, bound = rule[0], rule[1], rule[2], rule[3]
    # beyond the last query, or never written: may hold anything
    limit = n_tokens_of(book)
    if table[s, KIND] != _TAIL:
        limit = min(q_start + n_queries, limit)
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
                where = position
                if not fixed:
                    where += n if renumbered else token - first_token
                load_rotated(at_key, src, token, book, cos, sin, where)
                load_row(at_value, src + value_offset(token, book), token, VALUE, book)
            n += 1
            at_key += row_bytes
            at_value += row_bytes
    return n
