"""Tables of page summaries, one slot per page, shared by all rows that share the page."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..kernels.ops import (
    PagedKV,
    Summaries,
    TableName,
    empty_table,
    fill_table,
    put_summaries,
)
from .memory import huge_zeros


class SummaryPool:
    """Slots are numbers of the caller's choice, as are their versions: a slot that is given to another
    page gets another version, and what was filled in for the former no longer counts."""

    def __init__(self, names: Sequence[tuple[TableName, ...]], page_tokens: int) -> None:
        self.names = tuple(names)
        """Per layer, the tables it has."""
        self._page_tokens = page_tokens
        self._tables: list[dict[TableName, Tensor]] = [{} for _ in names]
        self._filled = [np.zeros(0, dtype=np.int64) for _ in names]
        self._n_slots = 64

    def reserve(self, n_slots: int) -> None:
        """So many slots will be used: tables grow to that when they are filled next, not when the last
        of them is, which may be a decode step that all rows wait for."""
        self._n_slots = max(self._n_slots, n_slots)

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for tables in self._tables for t in tables.values())

    def n_ready(self, layer: int, slots: np.ndarray, versions: np.ndarray) -> int:
        """How many of these leading slots are filled in for these versions."""
        self._grow(layer, slots)
        missing = np.flatnonzero(self._filled[layer][slots] != versions + 1)
        return int(missing[0]) if len(missing) else len(slots)

    def fill(
        self,
        layer: int,
        view: PagedKV,
        slots: np.ndarray,
        versions: np.ndarray,
        first: int,
        last: int,
    ) -> None:
        """Make the summaries of the row's pages [first, last) from their keys."""
        self._grow(layer, slots)
        for name in self.names[layer]:
            table = self._table(layer, name, functools.partial(empty_table, name, view, 0))
            fill_table(table, name, view, slots, first, last)
        self.mark(layer, slots[first:last], versions[first:last])

    def put(
        self, layer: int, name: TableName, slots: np.ndarray, first_page: int, rows: Tensor
    ) -> None:
        """What `page_summaries` made of the pages from first_page on; it counts once `mark` was called
        for them."""
        self._grow(layer, slots)
        table = self._table(layer, name, lambda: rows)
        put_summaries(table, name, slots, first_page, rows, self._page_tokens)

    def _table(self, layer: int, name: TableName, like: Callable[[], Tensor]) -> Tensor:
        """With room for all slots of the layer; `like`: makes summaries of the kind it holds."""
        table = self._tables[layer].get(name)
        n_slots = len(self._filled[layer])
        if table is None or len(table) < n_slots:
            kind = like()
            grown = huge_zeros((n_slots, *kind.shape[1:]), kind.dtype)
            if table is not None:
                grown[: len(table)] = table
            self._tables[layer][name] = table = grown
        return table

    def mark(self, layer: int, slots: np.ndarray, versions: np.ndarray) -> None:
        self._grow(layer, slots)
        self._filled[layer][slots] = versions + 1

    def forget(self, layer: int, slots: np.ndarray) -> None:
        """What was made of these pages was wrong."""
        self._grow(layer, slots)
        self._filled[layer][slots] = 0

    def summaries(self, layer: int, slots: np.ndarray, n_pages: int) -> Summaries:
        return Summaries(self._tables[layer], slots, n_pages, self._page_tokens)

    def bookmarks(self, layer: int) -> np.ndarray:
        """Keys float32 [n_slots, Hkv, D] in all slots of the layer's one table."""
        (name,) = self.names[layer]
        return self._tables[layer][name].numpy()[:, :, 0, 0]

    def _grow(self, layer: int, slots: np.ndarray) -> None:
        filled, n_slots = self._filled[layer], int(slots.max(initial=-1)) + 1
        if n_slots > len(filled):
            self._filled[layer] = np.zeros(
                max(n_slots, 2 * len(filled), self._n_slots), dtype=np.int64
            )
            self._filled[layer][: len(filled)] = filled
