"""The binary-search scorer on the device: `score._search`, one descent per query head and chunk
(InfiniteHiP Alg 2 and 3, `reference/infinitehip.md` section 3.4).

A probe reads single keys through the pages' addresses. Where every key of a side stands at one distance
(select_rope relative) the queries are turned once for each side and keys are used as they are stored; else
keys are turned by their distance from the row's first query.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .gpu_pages import KIND, DeviceAngles, DevicePages, DeviceScratch
from .triton_common import load_halves, rotate, turn_of
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
    open_list,
    page_arguments,
    start_of,
    streaming_base,
)
from .triton_summaries import key_rows

TILE = 32
"""Chunks of one tile."""


def search_scores(
    queries: Tensor,
    lists: StageLists,
    stage: Stage,
    policy: LayerPolicy,
    pages: DevicePages,
    angles: DeviceAngles,
    scale: float,
    scratch: DeviceScratch,
    *,
    page_row: Tensor | None = None,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor | None]:
    """Raw scores float32 [R, H, most] of the chunks of every list that must be scored, and for reduce
    softmax the ends [R, H, splits, 2] of each head's softmax, see `triton_lists.log_sum`.

    queries: of `turn_queries`; precision: of products of several queries, "ieee" or "tf32".
    """
    n_rows, n_heads, sides, n_pooled, head_dim = queries.shape
    splits = lists.splits(TILE)
    scores = scratch.take("select.scores", (n_rows, n_heads, lists.most))
    softmax = policy.reduce == "softmax"
    ends = scratch.take("select.ends", (n_rows, n_heads, splits, 2)) if softmax else None
    _search_kernel[(splits, n_heads, n_rows)](
        queries, scores, scores if ends is None else ends, lists.q_start,
        lists.q_start if lists.n_queries is None else lists.n_queries, lists.fresh, lists.starts,
        lists.n_starts, lists.offset, *page_arguments(pages, page_row), *angles.tables, scale,
        LEAST=lists.least, SOFTMAX=softmax, PAPER=stage.variant == "paper",
        LEVELS=(stage.chunk - 1).bit_length(), SPAN=lists.span, STYLE=STYLES[policy.select_rope],
        N_HEADS=n_heads, GROUP=n_heads // pages.n_kv_heads, STRIDE=stage.query_stride, TP=n_pooled,
        SIDES=sides, PAGE_TOKENS=pages.page_tokens, HALF=head_dim // 2, ROW_BYTES=pages.row_bytes,
        KIND=KIND[pages.kv_dtype], HAS_ROWS=page_row is not None,
        HAS_COUNT=lists.n_queries is not None, BLOCK_N=TILE,
        BLOCK_T=max(16, triton.next_power_of_2(n_pooled)), BLOCK_HALF=half_block(head_dim),
        SPLITS=splits, PRECISION=precision, num_warps=4, **lists.constants,
    )  # fmt: skip
    return scores, ends


@triton.jit
def _probe(
    token, start, live, distance, first, second, some, ids, keys, column, fine_cos, fine_sin,
    coarse_cos, coarse_sin, STYLE: tl.constexpr, TP: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    HALF: tl.constexpr, ROW_BYTES: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best product of the queries (halves first and second: [BLOCK_HALF] of one, or [BLOCK_T, BLOCK_HALF])
    with the keys of tokens [N], as numbers of `ordered`. distance: of the chunks' first tokens."""
    rows = key_rows(token, live, ids, keys, PAGE_TOKENS, ROW_BYTES)
    key, other = load_halves(rows, live, column, HALF, KIND)
    if STYLE != FIXED:
        if STYLE >= STREAMING:
            distance = distance - (token - start)
        cos, sin = turn_of(
            -distance, live, column, HALF, fine_cos, fine_sin, coarse_cos, coarse_sin
        )
        key, other = rotate(key, other, cos, sin)
    if TP == 1:
        s = tl.sum(key * first[None, :] + other * second[None, :], axis=1)
        return best_of(s[None, :], live[None, :], 0)
    else:
        s = tl.dot(first, tl.trans(key), input_precision=PRECISION)
        s = tl.dot(second, tl.trans(other), s, input_precision=PRECISION)
        return best_of(s, some[:, None] & live[None, :], 0)


@triton.jit(do_not_specialize=["offset"])
def _search_kernel(
    queries, scores, ends, q_start, n_queries, fresh, starts, n_starts, offset, address, n_ids, pages,
    n_pages, page_row, fine_cos, fine_sin, coarse_cos, coarse_sin, scale, LEAST: tl.constexpr,
    SOFTMAX: tl.constexpr, PAPER: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr,
    STYLE: tl.constexpr, N_HEADS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr,
    TP: tl.constexpr, SIDES: tl.constexpr, PAGE_TOKENS: tl.constexpr, HALF: tl.constexpr,
    ROW_BYTES: tl.constexpr, KIND: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr, OVERLAP: tl.constexpr,
    CHUNK: tl.constexpr, REFRESH: tl.constexpr, LISTS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Program (split, query head, row)."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    which = head * LISTS // N_HEADS
    position, end, n = open_list(
        row, which, q_start, fresh, n_starts, offset, FIRST, SINK, OVERLAP, CHUNK, REFRESH, LISTS, MOST
    )  # fmt: skip
    if n <= LEAST:
        return
    mine = starts + (row * LISTS + which) * MOST
    page_at = tl.load(page_row + row) if HAS_ROWS else row
    ids = pages + page_at.to(tl.int64) * n_pages
    keys = address + (head // GROUP).to(tl.int64) * n_ids
    column = tl.arange(0, BLOCK_HALF)
    some = tl.arange(0, BLOCK_T) < TP
    if HAS_COUNT:
        some = tl.arange(0, BLOCK_T) < (tl.load(n_queries + row) + STRIDE - 1) // STRIDE
    at_q = queries + (row.to(tl.int64) * N_HEADS + head) * (SIDES * TP * 2 * HALF)
    if TP == 1:
        at_q = at_q + column
        mask = column < HALF
    else:
        at_q = at_q + (tl.arange(0, BLOCK_T) * (2 * HALF))[:, None] + column[None, :]
        mask = some[:, None] & (column < HALF)[None, :]
    left_0 = tl.load(at_q, mask=mask, other=0.0)
    left_1 = tl.load(at_q + HALF, mask=mask, other=0.0)
    right_0, right_1 = left_0, left_1
    if SIDES == 2:
        right_0 = tl.load(at_q + TP * 2 * HALF, mask=mask, other=0.0)
        right_1 = tl.load(at_q + (TP * 2 + 1) * HALF, mask=mask, other=0.0)
    base = 0
    if STYLE == STREAMING:
        base = streaming_base(n, end, mine, FIRST, SINK, CHUNK)
    most, total = tl.full([1], -1.0e30, tl.float32), tl.zeros([1], tl.float32)
    for tile in range(split, (n + BLOCK_N - 1) // BLOCK_N, SPLITS):
        index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = index < n
        start = start_of(index, live, mine, FIRST, SINK, CHUNK)
        distance = distance_of(
            index, start, position, n, end, base, STYLE, OVERLAP, CHUNK, SPAN, False
        )
        left, right = start, tl.minimum(start + CHUNK, end)
        single = live & (right - left <= 1)
        best = tl.full([BLOCK_N], -2147483648, tl.int32)
        for _level in range(LEVELS):
            split_up = live & (right - left > 1)
            middle = (left + right) // 2
            if PAPER:
                probe_0, probe_1 = left, middle
            else:
                probe_0, probe_1 = (left + middle) // 2, (middle + right) // 2
            on_left = _probe(
                probe_0, start, split_up, distance, left_0, left_1, some, ids, keys, column, fine_cos,
                fine_sin, coarse_cos, coarse_sin, STYLE, TP, PAGE_TOKENS, HALF, ROW_BYTES, KIND,
                PRECISION
            )  # fmt: skip
            on_right = _probe(
                probe_1, start, split_up, distance, right_0, right_1, some, ids, keys, column, fine_cos,
                fine_sin, coarse_cos, coarse_sin, STYLE, TP, PAGE_TOKENS, HALF, ROW_BYTES, KIND,
                PRECISION
            )  # fmt: skip
            best = tl.maximum(best, tl.maximum(on_left, on_right))
            # as scores: nothing is larger than what is no number
            go_left = as_score(on_left) > as_score(on_right)
            left = tl.where(split_up & (go_left == 0), middle, left)
            right = tl.where(split_up & go_left, middle, right)
        # the last token scores; a chunk of one token has no other
        last = live if PAPER else single
        final = _probe(
            left, start, last, distance, right_0, right_1, some, ids, keys, column, fine_cos, fine_sin,
            coarse_cos, coarse_sin, STYLE, TP, PAGE_TOKENS, HALF, ROW_BYTES, KIND, PRECISION
        )  # fmt: skip
        s = as_score(tl.where(last, final, best))
        tl.store(scores + (row.to(tl.int64) * N_HEADS + head) * MOST + index, s, mask=live)
        if SOFTMAX:
            most, total = add_tile(most, total, (s * scale)[None, :], live[None, :], 1)
    if SOFTMAX:
        to = ends + ((row.to(tl.int64) * N_HEADS + head) * SPLITS + split) * 2 + tl.arange(0, 1)
        tl.store(to, most)
        tl.store(to + 1, total)
