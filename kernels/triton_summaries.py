"""Page summaries made on the device: what `summaries.page_summaries` and `put` do, in one kernel.

Tables are those of `summaries.py` with one slot per page id. A program makes one summary of one KV head
from the stored keys; nothing but the summary is written.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_pages import KIND, DevicePages
from .summaries import TableName, pages_of, per_page_of, table_shape
from .triton_common import load_halves, warps_of
from .triton_lists import half_block, page_arguments

RUN = 32
"""Tokens read at once, at most."""


def summarise_decoded(
    pages: DevicePages,
    tables: Mapping[TableName, Tensor],
    position: Tensor,
    page_row: Tensor | None = None,
) -> None:
    """The summaries that each row's newest token completes; in every step, for every layer.

    position: int64 [R], of the token that was just stored, -1 = empty place. page_row: int32 [R], the row
    of pages.pages, None = the same. Rows whose token completes nothing leave the tables as they are.
    Raises ValueError if a table does not fit the pages.
    """
    for name, table in tables.items():
        n = per_page_of(name[1], pages.page_tokens)
        _launch(pages, name, table, position, page_row, 0, 0, position.shape[0] * n)


def summarise_range(
    pages: DevicePages,
    tables: Mapping[TableName, Tensor],
    row: int,
    first_page: int,
    last_page: int,
) -> None:
    """The summaries that pages [first_page, last_page) of one row of pages.pages complete. All their
    tokens are stored, and those of the pages before if a summary is longer than a page.

    Raises ValueError if a table does not fit the pages.
    """
    for name, table in tables.items():
        step = pages_of(name[1], pages.page_tokens)
        first, last = first_page // step, last_page // step
        n = (last - first) * per_page_of(name[1], pages.page_tokens)
        if n > 0:
            _launch(pages, name, table, None, None, row, first * step * pages.page_tokens, n)


def _launch(
    pages: DevicePages,
    name: TableName,
    table: Tensor,
    position: Tensor | None,
    page_row: Tensor | None,
    row: int,
    first_token: int,
    n_programs: int,
) -> None:
    kind, chunk, spread = name
    check_table(name, table, pages)
    block_half = half_block(pages.head_dim)
    run = min(RUN, triton.next_power_of_2(chunk))
    _summarise_kernel[(n_programs, pages.n_kv_heads)](
        table, *page_arguments(pages, page_row),
        pages.pages if position is None else position, row, first_token,
        DECODE=position is not None, HAS_ROWS=page_row is not None,
        WHAT={"bounds": 0, "mean": 1, "tail": 2}[kind], SPREAD=spread, CHUNK=chunk,
        PER_PAGE=per_page_of(chunk, pages.page_tokens), PAGE_TOKENS=pages.page_tokens,
        HALF=pages.head_dim // 2, BLOCK_HALF=block_half, RUN=run, ROW_BYTES=pages.row_bytes,
        KIND=KIND[pages.kv_dtype], num_warps=warps_of(run * block_half * 2),
    )  # fmt: skip


def check_table(name: TableName, table: Tensor, pages: DevicePages) -> None:
    """Raises ValueError unless a table is one of `summaries.py`, contiguous, with float elements."""
    want = table_shape(name, table.shape[0], pages.n_kv_heads, pages.page_tokens, pages.head_dim)
    if tuple(table.shape) != want or not table.is_contiguous():
        raise ValueError(f"table {name} must be contiguous {list(want)}, got {list(table.shape)}")
    if table.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"table {name} must be float32 or 16 bit, got {table.dtype}")


@triton.jit
def key_rows(token, live, ids, address, PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Byte addresses int64 [N] of the stored keys of tokens. ids: where the row's page ids begin; address:
    where the KV head's addresses begin."""
    page = tl.load(ids + token // PAGE_TOKENS, mask=live, other=0).to(tl.int64)
    leaf = tl.load(address + page, mask=live, other=0)
    return leaf + (token % PAGE_TOKENS).to(tl.int64) * ROW_BYTES


@triton.jit
def summarise_run(
    start, size, ids, address, side_bytes, column, SPREAD: tl.constexpr, RUN: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """Summary of tokens [start, start + size), size > 0: six [BLOCK_HALF], the halves of the means, of the
    maxima and of the minima (both drawn towards the mean by the spread). side_bytes: 0 for keys."""
    total_0 = tl.zeros_like(column).to(tl.float32)
    total_1 = total_0
    high_0, high_1 = total_0 - float("inf"), total_0 - float("inf")
    low_0, low_1 = total_0 + float("inf"), total_0 + float("inf")
    for done in range(0, size, RUN):
        token = done + tl.arange(0, RUN)
        live = token < size
        row = key_rows(start + token, live, ids, address, PAGE_TOKENS, ROW_BYTES) + side_bytes
        first, second = load_halves(row, live, column, HALF, KIND)
        total_0 += tl.sum(first, axis=0)
        total_1 += tl.sum(second, axis=0)
        if BOUNDS:
            mask = live[:, None]
            high_0 = tl.maximum(high_0, tl.max(tl.where(mask, first, float("-inf")), axis=0))
            high_1 = tl.maximum(high_1, tl.max(tl.where(mask, second, float("-inf")), axis=0))
            low_0 = tl.minimum(low_0, tl.min(tl.where(mask, first, float("inf")), axis=0))
            low_1 = tl.minimum(low_1, tl.min(tl.where(mask, second, float("inf")), axis=0))
    mean_0, mean_1 = total_0 / size, total_1 / size
    if BOUNDS:
        if SPREAD != 1.0:
            high_0, high_1 = (
                mean_0 + SPREAD * (high_0 - mean_0),
                mean_1 + SPREAD * (high_1 - mean_1),
            )
            low_0, low_1 = mean_0 + SPREAD * (low_0 - mean_0), mean_1 + SPREAD * (low_1 - mean_1)
        # maxima lose a NaN, sums do not
        high_0 = tl.where(mean_0 != mean_0, mean_0, high_0)
        high_1 = tl.where(mean_1 != mean_1, mean_1, high_1)
        low_0 = tl.where(mean_0 != mean_0, mean_0, low_0)
        low_1 = tl.where(mean_1 != mean_1, mean_1, low_1)
    return mean_0, mean_1, high_0, high_1, low_0, low_1


@triton.jit
def _put(at, first, second, column, HALF: tl.constexpr):
    mask = column < HALF
    kind = at.dtype.element_ty
    tl.store(at + column, first.to(kind), mask=mask)
    tl.store(at + HALF + column, second.to(kind), mask=mask)


@triton.jit(do_not_specialize=["row", "first_token"])
def _summarise_kernel(
    table, address, n_ids, pages, n_pages, page_row, position, row, first_token,
    DECODE: tl.constexpr, HAS_ROWS: tl.constexpr, WHAT: tl.constexpr, SPREAD: tl.constexpr,
    CHUNK: tl.constexpr, PER_PAGE: tl.constexpr, PAGE_TOKENS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, RUN: tl.constexpr, ROW_BYTES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Program (summary, KV head). DECODE: summaries of a row are PER_PAGE programs, made if its token ends
    a page (or the chunk, if that is longer)."""
    program, kv_head = tl.program_id(0), tl.program_id(1)
    span: tl.constexpr = CHUNK * PER_PAGE
    if DECODE:
        row = program // PER_PAGE
        end = tl.load(position + row).to(tl.int32) + 1
        if (end <= 0) | (end % span != 0):
            return
        start = end - span + (program % PER_PAGE) * CHUNK
        if HAS_ROWS:
            row = tl.load(page_row + row)
    else:
        start = first_token + program * CHUNK
    column = tl.arange(0, BLOCK_HALF)
    ids = pages + row.to(tl.int64) * n_pages
    mine = address + kv_head.to(tl.int64) * n_ids
    last_page = (start + CHUNK - 1) // PAGE_TOKENS
    slot = tl.load(ids + last_page).to(tl.int64) * tl.num_programs(1) + kv_head
    entry = (start - last_page * PAGE_TOKENS) // CHUNK if PER_PAGE > 1 else 0
    mean_0, mean_1, high_0, high_1, low_0, low_1 = summarise_run(
        start, CHUNK, ids, mine, 0, column, SPREAD, RUN, PAGE_TOKENS, ROW_BYTES, HALF, KIND, WHAT == 0
    )  # fmt: skip
    if WHAT == 0:
        at = table + (slot * PER_PAGE + entry) * (4 * HALF)
        _put(at, high_0, high_1, column, HALF)
        _put(at + 2 * HALF, low_0, low_1, column, HALF)
    elif WHAT == 1:
        _put(table + (slot * PER_PAGE + entry) * (2 * HALF), mean_0, mean_1, column, HALF)
    else:
        value_0, value_1, _, _, _, _ = summarise_run(
            start, CHUNK, ids, mine, PAGE_TOKENS * ROW_BYTES, column, SPREAD, RUN, PAGE_TOKENS,
            ROW_BYTES, HALF, KIND, False
        )  # fmt: skip
        at = table + (slot * 2 * PER_PAGE + entry) * (2 * HALF)
        _put(at, mean_0, mean_1, column, HALF)
        _put(at + PER_PAGE * (2 * HALF), value_0, value_1, column, HALF)
