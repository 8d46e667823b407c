"""Scores of chunks by their summaries on the device: `score._summary` on tables, and the queries for it.

Queries are turned and averaged once (`triton_queries`), by their distance from the row's first query. Where
all chunks stand at one distance (select_rope relative) that distance is in them already and products of
matrices do the rest; else a mean key is turned by its chunk's distance, and for bounds, which hold for
unrotated keys only, each query is turned back.

The bound of a chunk, sum over d of max(q * high, q * low), is positive part of q times high plus negative
part of q times low: stored numbers enter the products as they are.

`bookmark` retrieval (RetroLM): one trained key per page is a table of ("mean", page_tokens, 1.0), queries are
those that the caller projected. Call `triton_queries.turn_queries(..., rotate=False)` (or hand in pooled
queries of that layout, [R, H, 1, Tp, D]) and `summary_scores` with a stage of scorer mean and select_rope
relative: nothing is rotated by the latter. `n_ready` counts the pages that have a key, later ones are scored
by the mean of theirs.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .gpu_pages import KIND, DeviceAngles, DevicePages, DeviceScratch
from .summaries import check_tables, per_page_of, table_of
from .triton_common import rotate, turn_of
from .triton_lists import (
    FIXED,
    STREAMING,
    STYLES,
    StageLists,
    add_tile,
    as_score,
    best_of,
    distance_of,
    half_block,
    log_sum,
    open_list,
    page_arguments,
    start_of,
    streaming_base,
)
from .triton_summaries import check_table, summarise_run

MAX: tl.constexpr = tl.constexpr(0)
SHARES: tl.constexpr = tl.constexpr(1)
ROWS: tl.constexpr = tl.constexpr(2)
ENDS: tl.constexpr = tl.constexpr(3)
"""What is stored: best raw score per KV head; best share per KV head, its logarithm, from ends; all scores of
single queries and the ends of their softmax; the ends alone."""
TILE = 32
"""Chunks of one tile; more need more registers than there are."""
RUN = 16
"""Keys that are read at once where a chunk has no ready summary."""
MOST_ROWS = 16
"""Queries of a KV head whose scores are all stored, at most: more are scored twice for a softmax."""


def summary_scores(
    queries: Tensor,
    lists: StageLists,
    stage: Stage,
    policy: LayerPolicy,
    pages: DevicePages,
    table: Tensor | None,
    angles: DeviceAngles,
    scale: float,
    scratch: DeviceScratch,
    *,
    page_row: Tensor | None = None,
    n_ready: Tensor | None = None,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor | None]:
    """Scores of the chunks of every list that must be scored.

    queries: of `turn_queries`. table: of `table_of(stage)`, slots are page ids; None: all chunks are
    summarised from their keys here, as those are that are cut or have no ready summary. n_ready: int32 [R]
    leading pages with summaries, None = all that the first query's token fills. precision: of products of
    matrices, "ieee" or "tf32".

    Returns scores float32 [R, n, most] and None: n = Hkv, raw (reduce max) or the logarithms of shares; or
    n = H raw scores and the ends [R, H, splits, 2] of their softmax, see `triton_lists.log_sum`.
    Raises ValueError if the table does not fit.
    """
    n_rows, n_heads, _, n_pooled, head_dim = queries.shape
    n_kv_heads = pages.n_kv_heads
    group = n_heads // n_kv_heads
    name = table_of(stage)
    if table is not None and check_tables([name], pages.page_tokens, policy.sink) is not None:
        table = None
    if table is not None:
        check_table(name, table, pages)
    bounds = stage.scorer == "bounds"
    per_query = bounds and policy.select_rope != "relative"
    block_half = half_block(head_dim)
    tile = min(TILE, max(16, triton.next_power_of_2(lists.most)))
    n_rows_m = group * n_pooled
    block_m = min(64, max(16, triton.next_power_of_2(n_rows_m)))
    if per_query:
        block_m = triton.next_power_of_2(n_rows_m)
    n_blocks_m = -(-n_rows_m // block_m)
    splits = lists.splits(tile)
    softmax = policy.reduce == "softmax"
    keep_rows = softmax and n_pooled == 1 and group <= MOST_ROWS
    ends = None
    if softmax:
        ends = scratch.take("select.ends", (n_rows, n_heads * n_pooled, splits, 2))
    n_stored = n_heads if keep_rows else n_kv_heads
    scores = scratch.take("select.scores", (n_rows, n_stored, lists.most))
    modes = ([ROWS] if keep_rows else [ENDS, SHARES]) if softmax else [MAX]
    kernel = _turned_bounds_kernel if per_query else _products_kernel
    for mode in modes:
        per_block = n_blocks_m if mode.value >= ROWS.value and not per_query else 1
        kernel[(splits, n_kv_heads * per_block, n_rows)](
            queries, queries if table is None else table, scores, scores if ends is None else ends,
            lists.q_start, lists.q_start if lists.n_queries is None else lists.n_queries, lists.fresh,
            lists.starts, lists.n_starts, lists.offset, *page_arguments(pages, page_row),
            pages.pages if n_ready is None else n_ready, *angles.tables, scale, LEAST=lists.least,
            MODE=mode.value, SPAN=lists.span, STYLE=STYLES[policy.select_rope],
            KV_HEADS=n_kv_heads, GROUP=group, STRIDE=stage.query_stride, TP=n_pooled,
            BOUNDS=bounds, SPREAD=stage.spread, PER_PAGE=per_page_of(stage.chunk, pages.page_tokens),
            PAGE_TOKENS=pages.page_tokens, HALF=head_dim // 2, ROW_BYTES=pages.row_bytes,
            KIND=KIND[pages.kv_dtype], HAS_TABLE=table is not None, HAS_READY=n_ready is not None,
            HAS_ROWS=page_row is not None, HAS_COUNT=lists.n_queries is not None,
            BLOCK_N=tile, BLOCK_M=block_m, BLOCK_HALF=block_half,
            RUN=min(RUN, triton.next_power_of_2(stage.chunk)), SPLITS=splits,
            BLOCK_SPLITS=triton.next_power_of_2(splits), PRECISION=precision, num_warps=8,
            **lists.constants,
        )  # fmt: skip
    return scores, ends if keep_rows else None


@triton.jit
def _tile_of_summaries(
    table, index, start, live, end, ready_end, last, kv_head, ids, address, mine, column,
    KV_HEADS: tl.constexpr, BOUNDS: tl.constexpr, SPREAD: tl.constexpr, PER_PAGE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, HALF: tl.constexpr, ROW_BYTES: tl.constexpr, KIND: tl.constexpr,
    HAS_TABLE: tl.constexpr, RUN: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Halves of the maxima and of the minima (of the means, twice, if not BOUNDS) of a tile of chunks, four
    float32 [BLOCK_N, BLOCK_HALF]. last: end of the list or of the tile."""
    width: tl.constexpr = 4 * HALF if BOUNDS else 2 * HALF
    # starts ascend: those without a ready summary are the last ones
    ready = live & (start + CHUNK <= ready_end)
    if HAS_TABLE:
        page = (start + CHUNK - 1) // PAGE_TOKENS
        slot = tl.load(ids + page, mask=ready, other=0).to(tl.int64)
        entry = (start - page * PAGE_TOKENS) // CHUNK if PER_PAGE > 1 else 0
        at = ((slot * KV_HEADS + kv_head) * PER_PAGE + entry) * width
        at = table + at[:, None] + column[None, :]
        mask = ready[:, None] & (column < HALF)[None, :]
        high_0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        high_1 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        low_0, low_1 = high_0, high_1
        if BOUNDS:
            low_0 = tl.load(at + 2 * HALF, mask=mask, other=0.0).to(tl.float32)
            low_1 = tl.load(at + 3 * HALF, mask=mask, other=0.0).to(tl.float32)
    else:
        high_0 = tl.zeros_like(index[:, None] + column[None, :]).to(tl.float32)
        high_1, low_0, low_1 = high_0, high_0, high_0
    n_ready = tl.sum(ready.to(tl.int32), axis=0)
    first_cut = tl.min(index, axis=0) + n_ready
    for c in range(first_cut, last):
        begin = start_of(c, True, mine, FIRST, SINK, CHUNK)
        mean_0, mean_1, top_0, top_1, bottom_0, bottom_1 = summarise_run(
            begin, tl.minimum(end - begin, CHUNK), ids, address, 0, column, SPREAD, RUN, PAGE_TOKENS,
            ROW_BYTES, HALF, KIND, BOUNDS
        )  # fmt: skip
        here = (index == c)[:, None]
        if BOUNDS:
            high_0 = tl.where(here, top_0[None, :], high_0)
            high_1 = tl.where(here, top_1[None, :], high_1)
            low_0 = tl.where(here, bottom_0[None, :], low_0)
            low_1 = tl.where(here, bottom_1[None, :], low_1)
        else:
            high_0 = tl.where(here, mean_0[None, :], high_0)
            high_1 = tl.where(here, mean_1[None, :], high_1)
    return high_0, high_1, low_0, low_1


@triton.jit
def _ready(
    row, position, end, n_queries, n_ready, TP: tl.constexpr, STRIDE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_READY: tl.constexpr,
    HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """End of the tokens that ready summaries may cover, and averages of queries that the row has."""
    n_pages = tl.load(n_ready + row) if HAS_READY else (position + 1) // PAGE_TOKENS
    ready_end = tl.minimum(end, n_pages * PAGE_TOKENS) if HAS_TABLE else end * 0
    n_live = end * 0 + TP
    if HAS_COUNT:
        n_live = (tl.load(n_queries + row) + STRIDE - 1) // STRIDE
    return ready_end, n_live


@triton.jit(do_not_specialize=["offset"])
def _products_kernel(
    queries, table, scores, ends, q_start, n_queries, fresh, starts, n_starts, offset, address, n_ids,
    pages, n_pages, page_row, n_ready, fine_cos, fine_sin, coarse_cos, coarse_sin, scale,
    LEAST: tl.constexpr, MODE: tl.constexpr, SPAN: tl.constexpr, STYLE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, TP: tl.constexpr,
    BOUNDS: tl.constexpr, SPREAD: tl.constexpr, PER_PAGE: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    HALF: tl.constexpr, ROW_BYTES: tl.constexpr, KIND: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_READY: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, RUN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr,
    OVERLAP: tl.constexpr, CHUNK: tl.constexpr, REFRESH: tl.constexpr, LISTS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head and, for ends, block of its queries, row): products of matrices."""
    split, pair, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = pair % KV_HEADS
    which = kv_head * LISTS // KV_HEADS
    position, end, n = open_list(
        row, which, q_start, fresh, n_starts, offset, FIRST, SINK, OVERLAP, CHUNK, REFRESH, LISTS, MOST
    )  # fmt: skip
    if n <= LEAST:
        return
    ready_end, n_live = _ready(
        row, position, end, n_queries, n_ready, TP, STRIDE, PAGE_TOKENS, HAS_TABLE, HAS_READY, HAS_COUNT
    )  # fmt: skip
    mine = starts + (row * LISTS + which) * MOST
    page_at = tl.load(page_row + row) if HAS_ROWS else row
    ids = pages + page_at.to(tl.int64) * n_pages
    keys = address + kv_head.to(tl.int64) * n_ids
    column = tl.arange(0, BLOCK_HALF)
    n_rows: tl.constexpr = GROUP * TP
    first_row = row.to(tl.int64) * (KV_HEADS * n_rows) + kv_head * n_rows
    base = 0
    if STYLE == STREAMING:
        base = streaming_base(n, end, mine, FIRST, SINK, CHUNK)
    if MODE >= ROWS:
        first_block = pair // KV_HEADS
        last_block = first_block + 1
    else:
        first_block = 0
        last_block = (n_rows + BLOCK_M - 1) // BLOCK_M
    most = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split, (n + BLOCK_N - 1) // BLOCK_N, SPLITS):
        index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = index < n
        start = start_of(index, live, mine, FIRST, SINK, CHUNK)
        high_0, high_1, low_0, low_1 = _tile_of_summaries(
            table, index, start, live, end, ready_end, tl.minimum(n, (tile + 1) * BLOCK_N), kv_head, ids,
            keys, mine, column, KV_HEADS, BOUNDS, SPREAD, PER_PAGE, PAGE_TOKENS, HALF, ROW_BYTES, KIND,
            HAS_TABLE, RUN, FIRST, SINK, CHUNK
        )  # fmt: skip
        if STYLE != FIXED:  # mean keys; bounds have a kernel of their own
            distance = distance_of(
                index, start, position, n, end, base, STYLE, OVERLAP, CHUNK, SPAN, True
            )
            cos, sin = turn_of(
                -distance, live, column, HALF, fine_cos, fine_sin, coarse_cos, coarse_sin
            )
            high_0, high_1 = rotate(high_0, high_1, cos, sin)
        best = tl.full([BLOCK_N], -2147483648, tl.int32)
        for block in range(first_block, last_block):
            m = block * BLOCK_M + tl.arange(0, BLOCK_M)
            some = (m < n_rows) & (m % TP < n_live)
            at_q = queries + ((first_row + m) * (2 * HALF))[:, None] + column[None, :]
            mask = some[:, None] & (column < HALF)[None, :]
            first = tl.load(at_q, mask=mask, other=0.0)
            second = tl.load(at_q + HALF, mask=mask, other=0.0)
            if BOUNDS:
                # where, not maximum: what is no number stays none
                up, down = tl.where(first < 0.0, 0.0, first), tl.where(first < 0.0, first, 0.0)
                s = tl.dot(up, tl.trans(high_0), input_precision=PRECISION)
                s = tl.dot(down, tl.trans(low_0), s, input_precision=PRECISION)
                up, down = tl.where(second < 0.0, 0.0, second), tl.where(second < 0.0, second, 0.0)
                s = tl.dot(up, tl.trans(high_1), s, input_precision=PRECISION)
                s = tl.dot(down, tl.trans(low_1), s, input_precision=PRECISION)
            else:
                s = tl.dot(first, tl.trans(high_0), input_precision=PRECISION)
                s = tl.dot(second, tl.trans(high_1), s, input_precision=PRECISION)
            here = some[:, None] & live[None, :]
            if MODE == MAX:
                best = tl.maximum(best, best_of(s, here, 0))
            elif MODE == SHARES:
                logs = log_sum(ends, first_row + m, some, SPLITS, BLOCK_SPLITS)
                best = tl.maximum(best, best_of(s * scale - logs[:, None], here, 0))
            else:
                most, total = add_tile(most, total, s * scale, here, 1)
            if MODE == ROWS:
                # one average a head: rows are heads
                to = scores + ((first_row + m) * MOST)[:, None] + index[None, :]
                tl.store(to, s, mask=here)
        if MODE <= SHARES:
            to = scores + (row.to(tl.int64) * KV_HEADS + kv_head) * MOST + index
            tl.store(to, as_score(best), mask=live)
    if MODE >= ROWS:
        m = first_block * BLOCK_M + tl.arange(0, BLOCK_M)
        to = ends + ((first_row + m) * SPLITS + split) * 2
        tl.store(to, most, mask=m < n_rows)
        tl.store(to + 1, total, mask=m < n_rows)


@triton.jit(do_not_specialize=["offset"])
def _turned_bounds_kernel(
    queries, table, scores, ends, q_start, n_queries, fresh, starts, n_starts, offset, address, n_ids,
    pages, n_pages, page_row, n_ready, fine_cos, fine_sin, coarse_cos, coarse_sin, scale,
    LEAST: tl.constexpr, MODE: tl.constexpr, SPAN: tl.constexpr, STYLE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, TP: tl.constexpr,
    BOUNDS: tl.constexpr, SPREAD: tl.constexpr, PER_PAGE: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    HALF: tl.constexpr, ROW_BYTES: tl.constexpr, KIND: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_READY: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, RUN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr,
    OVERLAP: tl.constexpr, CHUNK: tl.constexpr, REFRESH: tl.constexpr, LISTS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """As `_products_kernel` for bounds of chunks at their own distances: one query after the other, turned
    back by each chunk's. BLOCK_M covers all queries of a KV head."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    which = kv_head * LISTS // KV_HEADS
    position, end, n = open_list(
        row, which, q_start, fresh, n_starts, offset, FIRST, SINK, OVERLAP, CHUNK, REFRESH, LISTS, MOST
    )  # fmt: skip
    if n <= LEAST:
        return
    ready_end, n_live = _ready(
        row, position, end, n_queries, n_ready, TP, STRIDE, PAGE_TOKENS, HAS_TABLE, HAS_READY, HAS_COUNT
    )  # fmt: skip
    mine = starts + (row * LISTS + which) * MOST
    page_at = tl.load(page_row + row) if HAS_ROWS else row
    ids = pages + page_at.to(tl.int64) * n_pages
    keys = address + kv_head.to(tl.int64) * n_ids
    column = tl.arange(0, BLOCK_HALF)
    n_rows: tl.constexpr = GROUP * TP
    first_row = row.to(tl.int64) * (KV_HEADS * n_rows) + kv_head * n_rows
    base = 0
    if STYLE == STREAMING:
        base = streaming_base(n, end, mine, FIRST, SINK, CHUNK)
    m = tl.arange(0, BLOCK_M)
    most = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split, (n + BLOCK_N - 1) // BLOCK_N, SPLITS):
        index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = index < n
        start = start_of(index, live, mine, FIRST, SINK, CHUNK)
        high_0, high_1, low_0, low_1 = _tile_of_summaries(
            table, index, start, live, end, ready_end, tl.minimum(n, (tile + 1) * BLOCK_N), kv_head, ids,
            keys, mine, column, KV_HEADS, BOUNDS, SPREAD, PER_PAGE, PAGE_TOKENS, HALF, ROW_BYTES, KIND,
            HAS_TABLE, RUN, FIRST, SINK, CHUNK
        )  # fmt: skip
        distance = distance_of(
            index, start, position, n, end, base, STYLE, OVERLAP, CHUNK, SPAN, True
        )
        cos, sin = turn_of(distance, live, column, HALF, fine_cos, fine_sin, coarse_cos, coarse_sin)
        best = tl.full([BLOCK_N], -2147483648, tl.int32)
        for head in range(GROUP):
            for i in range(n_live):
                query = head * TP + i
                at_q = queries + (first_row + query) * (2 * HALF) + column
                first = tl.load(at_q, mask=column < HALF, other=0.0)[None, :]
                second = tl.load(at_q + HALF, mask=column < HALF, other=0.0)[None, :]
                turned, other = rotate(first, second, cos, sin)
                s = tl.sum(tl.where(turned < 0.0, turned * low_0, turned * high_0), axis=1)
                s += tl.sum(tl.where(other < 0.0, other * low_1, other * high_1), axis=1)
                if MODE == MAX:
                    best = tl.maximum(best, best_of(s[None, :], live[None, :], 0))
                elif MODE == SHARES:
                    one = tl.full([1], 0, tl.int64) + first_row + query
                    logs = log_sum(ends, one, one >= 0, SPLITS, BLOCK_SPLITS)
                    shares = s[None, :] * scale - logs[:, None]
                    best = tl.maximum(best, best_of(shares, live[None, :], 0))
                else:
                    old = tl.max(tl.where(m == query, most, -1.0e30), axis=0)
                    sum_ = tl.sum(tl.where(m == query, total, 0.0), axis=0)
                    now, grown = add_tile(old, sum_, s * scale, live, 0)
                    most = tl.where(m == query, now, most)
                    total = tl.where(m == query, grown, total)
                if MODE == ROWS:
                    tl.store(scores + (first_row + query) * MOST + index, s, mask=live)
        if MODE <= SHARES:
            to = scores + (row.to(tl.int64) * KV_HEADS + kv_head) * MOST + index
            tl.store(to, as_score(best), mask=live)
    if MODE >= ROWS:
        to = ends + ((first_row + m) * SPLITS + split) * 2
        tl.store(to, most, mask=m < n_rows)
        tl.store(to + 1, total, mask=m < n_rows)
