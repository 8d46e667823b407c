"""Bookmarks of a worker's pages and rows (RetroLM): made as pages are, taken from the store, or made again
from stored keys and values.

Keys lie in tables with one slot per page, shared by all rows that share the page. Queries belong to rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InternalError, NumericalError
from ..core.stage import LayerPolicy
from ..kernels.ops import (
    bookmark_table,
    choose_pages,
    gather_tokens,
    keeps_all_pages,
    whole_pages,
)
from .ask_ahead import Answer, AskAhead, Query
from .bookmark_store import BookmarkStore
from .bookmarks import Bookmarks, BookmarkStates
from .model import ModelAdapter
from .page_reader import PageReader
from .retriever_client import Question
from .row import Row
from .scheduler import refresh_level
from .summary_index import SummaryIndex
from .summary_pool import SummaryPool

Show = Callable[[int], None]
"""Makes the block of a position the row's open one; see `CpuMemory.show`."""
PIECE_PAGES = 128
"""Bookmarks made together from stored pages: enough for the products, few enough for the cache."""


class BookmarkIndex:
    """For the engine's one thread."""

    def __init__(
        self,
        bookmarks: Bookmarks,
        model: ModelAdapter,
        policies: Sequence[LayerPolicy],
        reader: PageReader,
        versions_of: Callable[[Row], np.ndarray],
        summaries: SummaryIndex,
    ) -> None:
        self.bookmarks = bookmarks
        self.rope = model.rope
        self._model = model
        self._policies = policies
        self._reader = reader
        self._versions_of = versions_of
        self._summaries = summaries
        self.page_tokens = reader.geometry.page_tokens
        selecting = [p.by_bookmark or p.in_prefill.by_bookmark for p in policies]
        self.layers = tuple(np.flatnonzero(selecting).tolist())
        """Layers whose pages bookmarks choose, in prefill or decode."""
        self.in_prefill = any(p.in_prefill.by_bookmark for p in policies)
        self._decoding = [i for i in self.layers if policies[i].by_bookmark]
        self._refresh = min((policies[i].stages[0].refresh for i in self._decoding), default=1)
        self.n_layers = self.layers[-1] + 1
        """Layers that a bookmark passes; in the last its key and query alone are wanted."""
        self._name = bookmark_table(self.page_tokens)
        names = [(self._name,) if selects else () for selects in selecting]
        self._pool = SummaryPool(names, self.page_tokens)
        self.store: BookmarkStore | None = None
        """Where keys are kept beside pages; none without stores."""
        self.ahead: AskAhead | None = None
        """Where decode's choices are asked for ahead; none if each waits for its own."""
        self._log_scale, self._nearness = bookmarks.log_scale.tolist(), bookmarks.nearness.tolist()

    def reserve(self, n_pages: int) -> None:
        """Page numbers below this will be in use."""
        self._pool.reserve(n_pages)

    def close(self, row: Row) -> None:
        if self.store is not None:
            self.store.close(row)
        if self.ahead is not None:
            self.ahead.close(row)

    # --- keys of pages --------------------------------------------------------------------------

    def bring_up(self, row: Row, n_pages: int) -> bool:
        """A turn's worth of the keys of the row's first n_pages pages, all of them complete, that are not
        here: taken from the store, or made by one forward of one token per page. True once all are here."""
        first = self._n_ready(row, n_pages)
        if first >= n_pages:
            return True
        if self.store is not None and (taken := self.store.take(row, first, n_pages)):
            for pages, keys in taken:
                row.stats.bookmarks_taken += len(pages)
                for layer, of_layer in zip(self.layers, torch.from_numpy(keys), strict=True):
                    self.put(layer, row, pages, of_layer)
            return self._n_ready(row, n_pages) >= n_pages
        stop = min(first + PIECE_PAGES, n_pages)
        if self.store is not None:
            stop = min(stop, self.store.groups.pages_of(first // self.store.groups.n_pages).stop)
        pages = range(first, stop)
        ends = [(page + 1) * self.page_tokens - 1 for page in pages]
        made = self.run([(row, at) for at in ends]).keys
        for layer in self.layers:
            self.put(layer, row, pages, made[layer])
        self.made(row, pages)
        return pages.stop >= n_pages

    def _n_ready(self, row: Row, n_pages: int) -> int:
        # a pass marks layers in ascending order, so what the last one has all have
        last, slots = self.layers[-1], row.page_ids.array
        return self._pool.n_ready(last, slots[:n_pages], self._versions_of(row)[:n_pages])

    def made(self, row: Row, pages: range) -> None:
        """The keys of these pages, and those of all before them, are here: full groups go to the store."""
        row.stats.bookmarks_made += len(pages)
        if self.store is None:
            return
        for group in self.store.groups.ended_by(pages):
            if self.store.is_named(row, group):
                of_group = self.store.groups.pages_of(group)
                slots = row.page_ids.array[of_group.start : of_group.stop]
                keys = [self._pool.bookmarks(layer)[slots] for layer in self.layers]
                self.store.put(row, group, np.stack(keys))

    def put(self, layer: int, row: Row, pages: range, keys: Tensor) -> None:
        """The pages have these keys [n, Hkv, D] in a layer that selects; layers in ascending order."""
        slots = row.page_ids.array
        rows = keys[:, :, None, None].contiguous()
        self._pool.put(layer, self._name, slots, pages.start, rows)
        at = slice(pages.start, pages.stop)
        self._pool.mark(layer, slots[at], self._versions_of(row)[at])

    # --- queries --------------------------------------------------------------------------------

    def refresh(self, rows: Sequence[Row]) -> None:
        """Before a decode step: whatever its selections need of bookmarks.

        A layer that is due at position p takes the query of the bookmark behind the latest token before
        p at whose end an interval begins, or behind the prompt: a function of position, whoever runs it
        and when. Intervals are the shortest of all layers.
        """
        wanted = []
        due = [(row, self._due(row)) for row in rows]
        for row, layers in due:
            if layers:
                while not self.bring_up(row, row.n_done // self.page_tokens):
                    pass  # pages that decode completed: never many
            at = max(row.n_prompt, row.n_done // self._refresh * self._refresh)
            if self._decoding and (row.bookmark is None or row.bookmark[0] != at):
                wanted.append((row, at))  # now: a block that is full is not kept as it was appended
        if wanted:
            queries = self.run([(row, at - 1) for row, at in wanted]).queries
            for i, (row, at) in enumerate(wanted):
                row.bookmark = (at, queries[:, i])
        if self.ahead is not None:
            self.ahead.ask((row, layer) for row, layers in due for layer in layers)

    def _due(self, row: Row) -> list[int]:
        """Layers that choose pages anew with the row's next token."""
        n_layers = len(self._policies)
        return [
            layer
            for layer in self._decoding
            if row.selections[layer] is None
            or not refresh_level(
                self._policies[layer].refreshes, row.n_done, layer, n_layers, False
            )
        ]

    def choose(
        self, layer: int, row: Row, query: Tensor, q_start: int, policy: LayerPolicy
    ) -> Tensor:
        """Pages that leave the first stage for queries at q_start: starts int64 [Hsel, n]. query [H, D]."""
        if self.ahead is not None and q_start >= row.n_prompt:
            return self.ahead.take(layer, row, q_start)
        found = self._choice(Query(layer, row, query, q_start), policy)
        if not isinstance(found, Question):
            return found
        assert self._summaries.retrievers is not None
        return self._summaries.retrievers.choose(found)

    def begin(self, queries: Sequence[Query]) -> list[Answer]:
        """Choices of decode's first stages: those made here are there at once."""
        found = [self._choice(query, self._policies[query.layer]) for query in queries]
        there = [one for one in found if isinstance(one, Question)]
        answers: Iterator[Answer] = iter(())
        if there:
            assert self._summaries.retrievers is not None
            answers = iter(self._summaries.retrievers.ask(there))
        return [next(answers) if isinstance(one, Question) else _Here(one) for one in found]

    def _choice(self, asked: Query, policy: LayerPolicy) -> Tensor | Question:
        """The pages, or what to ask a retriever for them."""
        layer, row, query, q_start = asked.layer, asked.row, asked.query, asked.q_start
        pages = whole_pages(q_start, policy)
        first, last = pages.start // self.page_tokens, -(-pages.stop // self.page_tokens)
        if keeps_all_pages(q_start, policy):
            shape = self.bookmarks.shape
            none = np.zeros((0, shape.n_kv_heads, shape.head_dim), dtype=np.float32)
            return choose_pages(query, none, q_start, policy)
        slots = row.page_ids.array[:last]
        n_ready = self._pool.n_ready(layer, slots, self._versions_of(row)[:last])
        if n_ready < last:
            raise InternalError(f"bookmarks of {n_ready} of {last} pages are here: bring them up")
        weights = (self._log_scale[layer], self._nearness[layer])
        if not self._summaries.chooses_there(layer, policy):
            keys = self._pool.bookmarks(layer)
            return choose_pages(query, keys, q_start, policy, *weights, slots[first:])

        def keys_of(begin: int, end: int) -> np.ndarray:
            keys: np.ndarray = self._pool.bookmarks(layer)[slots[begin:end]]
            return keys

        return Question(layer, row, query, q_start, weights, last, keys_of)

    # --- the forward pass -----------------------------------------------------------------------

    def run(self, at: Sequence[tuple[Row, int]]) -> BookmarkStates:
        """Bookmarks behind the rows' tokens at these positions, whose keys and values are stored.

        Raises PageLost if those are gone, NumericalError if a bookmark is not finite.
        """
        by_row: list[tuple[Row, list[int]]] = []
        for row, position in at:
            if not by_row or by_row[-1][0] is not row:
                by_row.append((row, []))
            by_row[-1][1].append(position)

        def pages(layer: int) -> tuple[Tensor, Tensor]:
            read = [self._checked(layer, row, np.array(p)) for row, p in by_row]
            keys, values = zip(*read, strict=True)
            return torch.cat(keys), torch.cat(values)

        n_tokens = torch.tensor([min(self.page_tokens, p + 1) for _, p in at])
        states = self._model.bookmarks(self.bookmarks, pages, n_tokens, self.n_layers)
        finite = states.queries.isfinite().flatten(2).all(dim=2).all(dim=0)
        if not bool(finite.all()):
            row, position = at[int(finite.logical_not().nonzero()[0])]
            raise NumericalError(
                f"row {row.row_id}: the bookmark behind position {position} is not finite; "
                "retriever.weights do not fit this model",
                row_id=row.row_id,
            )
        return states

    def _checked(self, layer: int, row: Row, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        while True:
            read = self.read(layer, row, positions)
            if not self._reader.mend_in_place(layer, row):
                return read

    def read(
        self, layer: int, row: Row, positions: np.ndarray, show: Show | None = None
    ) -> tuple[Tensor, Tensor]:
        """K and V [n, Hkv, page_tokens, D] of the tokens that end at these positions; zeros before the
        text's start. The caller sees to `mend_in_place`.

        A format that rounds blocks: full ones are read as they were rounded, the one that a bookmark stands
        in as it was appended. show: makes that the open block, where it may be another (prefill).
        """
        block_tokens = self._reader.geometry.block_tokens
        inside = (positions + 1) % block_tokens != 0
        groups = np.where(inside, positions // block_tokens, -1)
        edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(positions)]
        parts = []
        for first, last in itertools.pairwise(edges):
            here = int(positions[first]) if inside[first] else None
            if show is not None and here is not None:
                show(here)
            parts.append(self._read(layer, row, positions[first:last], here))
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys), torch.cat(values)

    def _read(
        self, layer: int, row: Row, positions: np.ndarray, inside: int | None
    ) -> tuple[Tensor, Tensor]:
        ids = positions[:, None] + np.arange(1 - self.page_tokens, 1)
        view = self._reader.selection_view(layer, row, int(positions.max()) + 1, inside)
        flat = torch.from_numpy(ids.reshape(-1))
        shape = (len(positions), self.page_tokens)
        keys, values = (
            gather_tokens(view, flat, which).unflatten(1, shape).transpose(0, 1)
            for which in ("k", "v")  # type: ignore[arg-type]
        )
        pages = np.unique(ids[:, [0, -1]].clip(min=0) // self.page_tokens)
        self._reader.note_in_place(layer, row, pages)
        return keys, values


@dataclass(frozen=True, eq=False)
class _Here:
    """An answer that nobody has to be asked for."""

    pages: Tensor

    def result(self, timeout_s: float) -> Tensor:
        return self.pages
