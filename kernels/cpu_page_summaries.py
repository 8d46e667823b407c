"""Summaries of whole pages from their keys, in numba: `summaries.page_summaries`, a task a page."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu_compile import compiled
from .cpu_pages import KEY, VALUE, address, as_pages, load_row, page_address
from .cpu_pool import POOL
from .cpu_wait import FAILED, leave, take_ticket
from .paged import PagedKV, absent_page

_BOUNDS, _MEAN, _TAIL = range(3)
_KINDS = {"bounds": _BOUNDS, "mean": _MEAN, "tail": _TAIL}


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
    page_tokens, n_of_keys = chunk * per_page, 2 if settings[0] == _BOUNDS else 1
    at_book = address(book)
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        for head in range(out.shape[1]):
            for c in range(per_page):
                first = (first_page + task) * page_tokens + c * chunk
                found = out[task, head, c]
                good = summarise_run(
                    found[:n_of_keys], rows, first, first + chunk, KEY, head, spread, at_book
                )
                if settings[0] == _TAIL:
                    good &= summarise_run(
                        found[1:], rows, first, first + chunk, VALUE, head, spread, at_book
                    )
                if not good:
                    state[FAILED] = 1


@compiled
def summarise_run(out, rows, first, last, side, head, spread, book):
    """Summary of the keys (or values) of tokens [first, last): out [2 (maximum, minimum), D], both drawn
    towards the mean by `spread`, or [1 (mean), D]. rows: [2, D] scratch. False if a page is absent."""
    bounds, head_dim = len(out) == 2, out.shape[1]
    row, total = rows[0], rows[1]
    for token in range(first, last):
        src = page_address(token, side, head, book)
        if src == 0:
            return False
        load_row(address(row), src, token, side, book)
        if token == first:
            for d in range(head_dim):
                total[d] = row[d]
            for i in range(len(out)):
                for d in range(head_dim):
                    out[i, d] = row[d]
            continue
        for d in range(head_dim):
            total[d] += row[d]
        if bounds:
            for d in range(head_dim):
                out[0, d] = row[d] if row[d] > out[0, d] else out[0, d]
                out[1, d] = row[d] if row[d] < out[1, d] else out[1, d]
    share = np.float32(1.0) / np.float32(max(1, last - first))
    for d in range(head_dim):
        mean = total[d] * share
        # a NaN must not hide behind comparisons, which it makes false
        if not bounds or mean != mean:
            for i in range(len(out)):
                out[i, d] = mean
        elif spread != np.float32(1.0):
            out[0, d] = mean + spread * (out[0, d] - mean)
            out[1, d] = mean + spread * (out[1, d] - mean)
    return True
