"""Summaries of whole pages from their keys, in numba: `summaries.page_summaries`, a task a page."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu_compile import compiled
from .cpu_pages import KEY, VALUE, address, as_pages, load_row, row_address
from .cpu_pool import POOL
from .cpu_wait import FAILED, leave, take_ticket
from .paged import PagedKV, absent_page

_KINDS = {"bounds": 0, "mean": 1, "tail": 2}


def page_summaries(
    kind: str, chunk: int, spread: float, view: PagedKV, first_page: int, last_page: int
) -> Tensor | None:
    """float32 [n_pages, Hkv, chunks of a page, S, D], of a tail [n_pages, Hkv, 2, chunks, D]; chunk divides
    page_tokens, all tokens of the pages are appended. None where this path does not apply."""
    pages = as_pages(view)
    if pages is None or view.page_tokens % chunk:
        return None
    n_pages, per_page = last_page - first_page, view.page_tokens // chunk
    n_values = 1 if kind == "mean" else 2
    # one layout inside: [page, head, chunk, value, D]
    out = torch.empty(n_pages, view.n_kv_heads, per_page, n_values, view.head_dim)
    settings = np.array([_KINDS[kind], first_page, chunk, per_page], dtype=np.int64)
    if n_pages:
        with POOL.lock:
            rows = POOL.scratch("page-summaries", (2, view.head_dim))
            arguments = (out.numpy(), settings, np.float32(spread), pages.book)
            if POOL.run(_worker, arguments, n_pages, (rows,)):
                raise absent_page(view)
    return out.transpose(2, 3).contiguous() if kind == "tail" else out


@compiled
def _worker(state, n_tasks, out, settings, spread, book, rows):
    first_page, chunk, per_page = settings[1], settings[2], settings[3]
    at_book = address(book)
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        for head in range(out.shape[1]):
            for c in range(per_page):
                if not _one(out[task, head, c], settings[0], first_page + task, c * chunk, chunk, head,
                            spread, at_book, rows):  # fmt: skip
                    state[FAILED] = 1


@compiled
def _one(out, kind, page, first, chunk, head, spread, book, rows):
    """One summary, out [values, D]; rows: scratch for a stored row and a sum. False if the page is absent."""
    head_dim = out.shape[1]
    row, total = rows[0], rows[1]
    share = np.float32(1.0) / np.float32(chunk)
    for side in range(2 if kind == 2 else 1):
        for d in range(head_dim):
            total[d] = 0.0
        for token in range(first, first + chunk):
            src = row_address(page, token, VALUE if side == 1 else KEY, head, book)
            if src == 0:
                return False
            load_row(address(row), src, book)
            for d in range(head_dim):
                total[d] += row[d]
            if kind == 0 and token == first:
                for d in range(head_dim):
                    out[0, d] = row[d]
                    out[1, d] = row[d]
            elif kind == 0:
                for d in range(head_dim):
                    out[0, d] = row[d] if row[d] > out[0, d] else out[0, d]
                    out[1, d] = row[d] if row[d] < out[1, d] else out[1, d]
        if kind != 0:
            for d in range(head_dim):
                out[side, d] = total[d] * share
        else:
            for d in range(head_dim):
                mean = total[d] * share
                if spread != np.float32(1.0):
                    out[0, d] = mean + spread * (out[0, d] - mean)
                    out[1, d] = mean + spread * (out[1, d] - mean)
                if mean != mean:
                    # a NaN or two infinities: nothing may hide them
                    out[0, d] = mean
                    out[1, d] = mean
    return True
