"""One query's attention in compiled code, from its book: the new key into its page, tasks of segments and
KV heads, then the merge. Whoever calls it may go on to the next layer at once (`cpu_layers`).
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from .cpu_append import append_row
from .cpu_block_parts import float_of_bits, next_task, task_done, wait_for_tasks
from .cpu_compile import compiled
from .cpu_memory import floats_at, ints_at, load_float32, peek, poke, rotate_float32
from .cpu_merge import merge_rows
from .cpu_one_query import TOGETHER, partials
from .cpu_pages import KEY, address, kind_of, page_tokens_of, row_address, value_offset
from .cpu_query_book import (
    APPEND_COUNTER,
    BASE,
    COS,
    COUNTER_NUMBERS,
    COUNTERS,
    EXACT,
    FOLD,
    HEAD_DIM,
    KEY_STARTS,
    LSES,
    MERGE_COUNTER,
    MOST,
    N_BASES,
    N_HEADS,
    N_KV_HEADS,
    N_PARTIALS,
    N_RUNS_ALL,
    N_SEGMENTS,
    N_WEIGHTS,
    NEW_KEY,
    NEW_VALUE,
    PAGES,
    PARTIALS,
    PARTIALS_COUNTER,
    Q_START,
    QUERY,
    RESULT,
    RESULT_LSE,
    RULES,
    RUNS,
    SIN,
    TABLE,
    WEIGHTS,
    WRONG,
)
from .cpu_wait import FAILED, leave
from .segments import COLUMNS
from .segments import KINDS as SEGMENT_KINDS


@compiled
def worker(state, n_tasks, book, floats, logits, found, ends):
    if not attend_query(address(book), floats, logits, found, ends):
        state[FAILED] = 1
    leave(address(state))


@compiled
def attend_query(at, floats, logits, found, ends):
    """All of one query's attention, by every worker; False if a page was absent. at: address of a book
    (`cpu_query_book`); the others are a worker's own scratch.

    Where the book has a result, the partials are merged into it, and returning means that it is there.
    """
    counters = peek(at, COUNTERS)
    good = True
    if peek(at, NEW_KEY) != 0:
        counter = counters + 8 * COUNTER_NUMBERS * APPEND_COUNTER
        if next_task(counter, 1) == 0:
            good = _append(at)
            task_done(counter)
        wait_for_tasks(counter, 1)
    counter = counters + 8 * COUNTER_NUMBERS * PARTIALS_COUNTER
    n_segments, n_kv_heads = peek(at, N_SEGMENTS), peek(at, N_KV_HEADS)
    n_tasks = (n_segments + TOGETHER - 1) // TOGETHER * n_kv_heads
    task = next_task(counter, n_tasks)
    if task >= 0:
        n_heads, head_dim, n_partials = peek(at, N_HEADS), peek(at, HEAD_DIM), peek(at, N_PARTIALS)
        n_bases, n_runs = peek(at, N_BASES), peek(at, N_RUNS_ALL)
        table = carray(ints_at(peek(at, TABLE)), (n_segments, COLUMNS))
        runs = carray(ints_at(peek(at, RUNS)), (n_runs,))
        key_starts = carray(ints_at(peek(at, KEY_STARTS)), (n_segments, n_bases))
        base = carray(ints_at(peek(at, BASE)), (n_bases,))
        rules = carray(ints_at(peek(at, RULES)), (len(SEGMENT_KINDS), 4))
        weights = carray(floats_at(peek(at, WEIGHTS)), (peek(at, N_WEIGHTS),))
        o = carray(floats_at(peek(at, PARTIALS)), (n_partials, n_heads, head_dim))
        lse = carray(floats_at(peek(at, LSES)), (n_partials, n_heads))
        queries = floats[len(floats) - n_heads * head_dim :].reshape(n_heads, head_dim)
        _turned_queries(queries, at, base)
        while task >= 0:
            # windows come last and are the largest: begin with them
            last = n_segments - task // n_kv_heads * TOGETHER
            first = max(0, last - TOGETHER)
            head = task % n_kv_heads
            found_all = partials(first, last, head, at, table, runs, key_starts, base, rules, weights,
                              queries, o, lse, floats, logits, found, ends)  # fmt: skip
            good = good and found_all
            task_done(counter)
            task = next_task(counter, n_tasks)
    if peek(at, RESULT) != 0:
        wait_for_tasks(counter, n_tasks)
        _merge(at, counters + 8 * COUNTER_NUMBERS * MERGE_COUNTER)
    return good


@compiled
def _append(at):
    """The token's key and value into its page; False if the page is absent."""
    book, position, head_dim = peek(at, PAGES), peek(at, Q_START), peek(at, HEAD_DIM)
    most = np.float32(float_of_bits(peek(at, MOST)))
    page_tokens = page_tokens_of(book)
    page = position // page_tokens
    for head in range(peek(at, N_KV_HEADS)):
        dst = row_address(page, position - page * page_tokens, KEY, head, book)
        if dst == 0:
            return False
        src = 4 * head * head_dim
        kind, to_value = kind_of(position, book), value_offset(position, book)
        good = append_row(dst, kind, peek(at, NEW_KEY) + src, head_dim, most)
        if (
            not append_row(dst + to_value, kind, peek(at, NEW_VALUE) + src, head_dim, most)
            or not good
        ):
            poke(at, WRONG, 1)
    return True


@compiled
def _turned_queries(queries, at, base):
    """The query of every head as the products want it: scaled, and rotated where keys have the model's
    own angles."""
    n_heads, head_dim = queries.shape
    half = head_dim // 2
    fold = np.float32(float_of_bits(peek(at, FOLD)))
    query, dst = peek(at, QUERY), address(queries)
    for h in range(n_heads):
        row = 4 * h * head_dim
        if peek(at, EXACT) == 1:
            angle = 4 * half * (peek(at, Q_START) - base[h * len(base) // n_heads])
            rotate_float32(
                dst + row, query + row, half, peek(at, COS) + angle, peek(at, SIN) + angle
            )
        else:
            load_float32(dst + row, query + row, head_dim)
        for d in range(head_dim):
            queries[h, d] *= fold


@compiled
def _merge(at, counter):
    """Heads of a group are a task. o may have more partials than these segments made: a tail's."""
    n_heads, n_kv_heads, head_dim = peek(at, N_HEADS), peek(at, N_KV_HEADS), peek(at, HEAD_DIM)
    group, n_partials = n_heads // n_kv_heads, peek(at, N_PARTIALS)
    o = carray(floats_at(peek(at, PARTIALS)), (n_partials, n_heads, head_dim))
    lse = carray(floats_at(peek(at, LSES)), (n_partials, n_heads))
    out = carray(floats_at(peek(at, RESULT)), (n_heads, head_dim))
    out_lse = carray(floats_at(peek(at, RESULT_LSE)), (n_heads,))
    while True:
        head = next_task(counter, n_kv_heads)
        if head < 0:
            break
        merge_rows(o, lse, out, out_lse, head * group, (head + 1) * group)
        task_done(counter)
    wait_for_tasks(counter, n_kv_heads)
