"""Summaries of runs of keys, over UNROTATED keys (DESIGN 1.2): for the bounds and mean scorers, and
for the estimate of what attention leaves out.

Ready summaries lie in tables with one slot per page, found through the row's list of slots, so rows
that share pages share them. A chunk longer than a page lies in the slot of its last page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .gpu_pages import DevicePages
from .paged import RAW, PagedKV, gather_blocks

try:
    from . import cpu_page_summaries
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_page_summaries = None  # type: ignore[assignment]

SummaryKind = Literal["bounds", "mean", "tail", "bookmark"]
TableName = tuple[SummaryKind, int, float]
"""(kind, tokens per summary, spread of bounds). Bookmarks are made by the model: here they only lie in
the slots of their pages."""
PIECE_TOKENS = 1 << 16
"""Tokens summarised at once: bounds the float32 copy of their keys."""


@dataclass(frozen=True)
class Summaries:
    """Ready summaries of one row in one layer."""

    tables: Mapping[TableName, Tensor]
    """bounds: [n_slots, Hkv, per page, 2 (maximum, minimum), D]; mean: [n_slots, Hkv, per page, 1, D], a
    bookmark like the mean of a page;
    tail: [n_slots, Hkv, 2 (mean K, mean V), per page, D], which is a memory of `PagedKV`. Contiguous,
    float32 or 16 bit."""
    slots: np.ndarray
    """int64 [n_pages or more]: slot of each leading page."""
    n_pages: int
    """Leading pages whose slots are filled."""
    page_tokens: int

    @property
    def n_tokens(self) -> int:
        return self.n_pages * self.page_tokens


def tables_of(policy: LayerPolicy) -> tuple[TableName, ...]:
    """What a policy's stages and tail read, coarse to fine."""
    names: list[TableName] = []
    for stage in policy.stages:
        if stage.reads_summaries:
            names.append(table_of(stage))
    if policy.tail:
        names.append(tail_table(policy.tail))
    return tuple(dict.fromkeys(names))


def table_of(stage: Stage) -> TableName:
    """The table of a stage that scores summaries."""
    if stage.scorer == "mean":
        return ("mean", stage.chunk, 1.0)
    return ("bounds", stage.chunk, stage.spread)


def bookmark_table(page_tokens: int) -> TableName:
    return ("bookmark", page_tokens, 1.0)


def tail_table(tail: int) -> TableName:
    return ("tail", tail, 1.0)


def per_page_of(chunk: int, page_tokens: int) -> int:
    """Summaries in the slot of one page."""
    return max(1, page_tokens // chunk)


def pages_of(chunk: int, page_tokens: int) -> int:
    """Pages of one summary, if it is longer than a page; else 1."""
    return max(1, chunk // page_tokens)


def table_shape(
    name: TableName, n_slots: int, n_kv_heads: int, page_tokens: int, head_dim: int
) -> tuple[int, ...]:
    kind, chunk, _ = name
    n = per_page_of(chunk, page_tokens)
    if kind == "tail":
        return (n_slots, n_kv_heads, 2, n, head_dim)
    return (n_slots, n_kv_heads, n, 2 if kind == "bounds" else 1, head_dim)


def table_dtype(kind: SummaryKind, kv_dtype: torch.dtype) -> torch.dtype:
    """Bounds of 16-bit keys are 16-bit numbers; means are rounded only where many are read."""
    if kind == "mean" or kv_dtype == torch.float32:
        return torch.float32
    return kv_dtype if kv_dtype == torch.bfloat16 else torch.float16


def summarise(kind: SummaryKind, keys: Tensor, sizes: Tensor, spread: float = 1.0) -> Tensor:
    """Summaries of runs of keys (or of values, for their means).

    keys: [Hkv, n, chunk, D] float32, of which the first sizes [Hkv, n] of each run count.
    Returns [Hkv, n, 2, D] (maximum, minimum, both drawn towards the mean if spread is less than 1) for
    "bounds", else the mean [Hkv, n, 1, D]. Runs of size 0 give zeros.
    """
    counted = (torch.arange(keys.shape[2]) < sizes[..., None])[..., None]
    total = keys.masked_fill(~counted, 0.0).sum(dim=2)
    mean = (total / sizes.clamp(min=1)[..., None])[:, :, None]
    if kind != "bounds":
        return mean
    low = keys.masked_fill(~counted, torch.inf).amin(dim=2)
    high = keys.masked_fill(~counted, -torch.inf).amax(dim=2)
    both = torch.stack((high, low), dim=2)
    if spread != 1.0:
        both = mean + spread * (both - mean)
    return both.masked_fill((sizes == 0)[..., None, None], 0.0)


def chunk_summaries(name: TableName, view: PagedKV, starts: Tensor, end: int) -> Tensor:
    """Summaries of the chunks at starts [Hkv, n] (-1 = padding), each cut at token `end`, from their
    keys: [Hkv, n, 2 or 1, D]."""
    kind, chunk, spread = name
    sizes = (end - starts).clamp(min=0, max=chunk).masked_fill(starts < 0, 0)
    keys = gather_blocks(view, starts, chunk).unflatten(1, (-1, chunk))
    return summarise(kind, keys, sizes, spread)


def page_summaries(name: TableName, view: PagedKV, first_page: int, last_page: int) -> Tensor:
    """Summaries that pages [first_page, last_page) complete, ready to be `put` into slots.

    Returns float32 [n, Hkv, ...] as `table_shape` says: one for each page, or for each last page of a chunk
    that is longer.
    """
    kind, chunk, spread = name
    page_tokens, n_heads = view.page_tokens, view.n_kv_heads
    if cpu_page_summaries is not None and last_page * page_tokens <= view.n_tokens:
        made: Tensor | None = cpu_page_summaries.page_summaries(
            kind, chunk, spread, view, first_page, last_page
        )
        if made is not None:
            return made
    step = pages_of(chunk, page_tokens)
    # the chunks whose last page is among these
    first, last = (page // step * step * page_tokens for page in (first_page, last_page))
    starts = torch.arange(first, last, chunk).expand(n_heads, -1)
    rows = chunk_summaries(name, view, starts, view.n_tokens)
    if kind == "tail":
        values = gather_blocks(view, starts, chunk, "v").unflatten(1, (-1, chunk))
        rows = torch.cat((rows, values.mean(dim=2, keepdim=True)), dim=2)
    by_page: Tensor = rows.unflatten(1, (-1, per_page_of(chunk, page_tokens))).transpose(0, 1)
    return (by_page.transpose(2, 3) if kind == "tail" else by_page).contiguous()


def put(
    table: Tensor,
    name: TableName,
    slots: np.ndarray,
    first_page: int,
    rows: Tensor,
    page_tokens: int,
) -> None:
    """Store what `page_summaries` made of pages from first_page on; slots: of the row's pages."""
    step = pages_of(name[1], page_tokens)
    last_of_chunk = first_page // step * step + step - 1
    pages = last_of_chunk + step * np.arange(len(rows))
    # copied in numpy: torch wakes its threads for it, which then spin beside our own
    raw = RAW[table.dtype]
    table.view(raw).numpy()[slots[pages]] = rows.to(table.dtype).view(raw).numpy()


def pieces(
    name: TableName, first_page: int, last_page: int, page_tokens: int
) -> Iterator[tuple[int, int]]:
    """Ranges of pages to summarise one after the other: PIECE_TOKENS at once, whole chunks."""
    step = pages_of(name[1], page_tokens)
    n_pages = max(step, PIECE_TOKENS // page_tokens // step * step)
    edges = [first_page, *range(first_page // step * step + n_pages, last_page, n_pages), last_page]
    return itertools.pairwise(edges)


def fill_table(
    table: Tensor,
    name: TableName,
    view: PagedKV,
    slots: np.ndarray,
    first_page: int,
    last_page: int,
) -> None:
    """Summarise the row's pages [first_page, last_page) from their keys into their slots."""
    for first, last in pieces(name, first_page, last_page, view.page_tokens):
        rows = page_summaries(name, view, first, last)
        put(table, name, slots, first, rows, view.page_tokens)


def empty_table(
    name: TableName, view: PagedKV | DevicePages, n_slots: int, device: torch.device | str = "cpu"
) -> Tensor:
    """A table for summaries of keys like the view's."""
    shape = table_shape(name, n_slots, view.n_kv_heads, view.page_tokens, view.head_dim)
    return torch.zeros(shape, dtype=table_dtype(name[0], view.kv_dtype), device=device)


def summarise_pages(view: PagedKV, policy: LayerPolicy, n_pages: int | None = None) -> Summaries:
    """All summaries that a policy reads, of a view's full pages: for tests and benchmarks."""
    n_pages = view.n_tokens // view.page_tokens if n_pages is None else n_pages
    slots = np.arange(n_pages)
    tables = {name: empty_table(name, view, n_pages) for name in tables_of(policy)}
    for name, table in tables.items():
        fill_table(table, name, view, slots, 0, n_pages)
    return Summaries(tables, slots, n_pages, view.page_tokens)


def check_tables(names: Iterable[TableName], page_tokens: int, sink: int) -> str | None:
    """Why summaries of these sizes cannot lie in pages' slots; None if they can."""
    for kind, chunk, _ in names:
        if (page_tokens % chunk and chunk % page_tokens) or sink % chunk:
            return (
                f"{kind} summaries of {chunk} tokens: they must divide page_tokens ({page_tokens}) or be "
                f"a multiple of it, and divide sink ({sink})"
            )
    return None
