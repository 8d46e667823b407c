"""Where a row's pages are and how they get there: reuse, room for new ones, write-behind.

One object per engine, used by its thread alone. Where bytes lie on the device is its memory's
(`page_memory.py`); this is the shell that talks to the store.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import (
    BankTooSmall,
    DeadlineExceeded,
    LongreachError,
    ResourceExhausted,
    StoreFull,
)
from ..core.page_key import ROOT_KEY, PageKey, RecipeFingerprint, page_keys, private_recipe
from ..kvstore.page import PageGeometry
from ..kvstore.page_client import PageClient, PageHandle
from .page_list import PageList
from .page_memory import PageMemory
from .row import Row

_log = logging.getLogger(__name__)
STORE_RETRY_S = 2.0
"""Pause before a page that no store took is offered again."""


@dataclass
class _Write:
    page_id: int
    key: PageKey
    parent: PageKey
    future: Future[PageHandle]
    generation: int
    retry_at_s: float | None = None
    failure: BaseException | None = None


class PageFlow:
    """Pages of all rows of one worker. `client` None keeps everything on the device (tests, no store)."""

    def __init__(
        self,
        geometry: PageGeometry,
        memory: PageMemory,
        recipe: RecipeFingerprint,
        client: PageClient | None,
        store_timeout_s: float,
    ) -> None:
        self.geometry = geometry
        self.memory = memory
        self.pages = memory.pages
        self._recipe = recipe
        self._client = client
        self._store_timeout_s = store_timeout_s
        self._writes: list[_Write] = []
        self._claims: dict[PageKey, Row] = {}
        self._generation = np.zeros(0, dtype=np.int64)
        self._drop_when_written: set[PageKey] = set()
        self.write_beside: Callable[[], int] = lambda: 0
        """Goes on with what else is written behind; returns how much is left."""

    # --- opening and closing rows ---------------------------------------------------------------

    def open(self, row: Row) -> PageKey | None:
        """Give the row every leading page that exists, here or in the store.

        Returns None when the row can go on, or the key of a page that another row is computing now:
        then the row holds nothing and should wait for it.
        """
        keys = row.keys
        row.n_unreadable_pages = 0
        n_here = 0
        while n_here < len(keys):
            page_id = self.pages.page_of_key.get(keys[n_here])
            if page_id is None or not self.pages.complete[page_id]:
                break
            n_here += 1
        if n_here < len(keys) and keys[n_here] in self._claims:
            return keys[n_here]
        row.page_ids = PageList([self.pages.page_of_key[key] for key in keys[:n_here]])
        for page_id in row.page_ids:
            self.pages.retain(page_id)
        if self._client is not None and n_here < len(keys):
            started = time.monotonic()
            for key, handle in self._acquire_leading(row, keys[n_here:]):
                page_id = self.pages.new(key, row.lease)
                self.renew(page_id)
                self.pages.set_home(page_id, handle)
                row.page_ids.append(page_id)
                self.memory.adopt(page_id)
            row.stats.seconds_store += time.monotonic() - started
        row.n_existing_pages = len(row.page_ids)
        self._claims.update((key, row) for key in keys[row.n_existing_pages :])
        return None

    def _acquire_leading(
        self, row: Row, keys: Sequence[PageKey]
    ) -> list[tuple[PageKey, PageHandle]]:
        assert self._client is not None
        held = self._client.lookup(keys)
        n_held = held.index(False) if False in held else len(held)
        if not n_held:
            return []
        handles = self._client.acquire(keys[:n_held], row.lease)
        # a page behind a missing one is of no use: its prefix must be computed first
        n_good = handles.index(None) if None in handles else len(handles)
        row.n_unreadable_pages = n_held - n_good
        if not n_good:
            self._client.release(row.lease)
        return [(h.key, h) for h in handles[:n_good] if h is not None]

    def prefetch(self, row: Row) -> None:
        """A row waits for its admission: bring its leading pages near meanwhile. Once per row."""
        if self._client is None or row.prefetched:
            return
        row.prefetched = True
        self._client.prefetch([key for key in row.keys if key not in self.pages.page_of_key])

    def is_settled(self, key: PageKey) -> bool:
        """Whether a page that a row waits for is complete, or nobody computes it any more."""
        return key not in self._claims

    def close(self, row: Row) -> None:
        """The row lets go of its pages; private ones are dropped from the store."""
        self.memory.close(row)
        for key in row.keys[row.n_existing_pages :]:
            if self._claims.get(key) is row:
                del self._claims[key]
        forgotten, released = [], []
        for page_id in row.page_ids:
            gone, ended = self.pages.let_go(page_id)
            if gone:
                forgotten.append(page_id)
                self.renew(page_id)
            if ended is not None:
                released.append(ended)
        # at once: other rows wait for the end of one that has thousands of pages
        self.memory.forget(np.array(forgotten, dtype=np.int64))
        if self._client is not None:
            for group in released:
                self._client.release(group)
        row.page_ids = PageList()
        if self._client is not None and row.private_keys:
            # a page that is still being written would outlive a drop that overtakes it
            writing = {write.key for write in self._writes}.intersection(row.private_keys)
            self._drop_when_written |= writing
            self._client.drop([key for key in row.private_keys if key not in writing])
        row.private_keys = []

    def renew(self, page_id: int) -> None:
        """A page number is reused: writes started for its former page no longer concern it."""
        if page_id >= len(self._generation):
            grown = np.zeros(max(page_id + 1, 2 * len(self._generation)), dtype=np.int64)
            grown[: len(self._generation)] = self._generation
            self._generation = grown
        self._generation[page_id] += 1

    def versions_of(self, row: Row) -> np.ndarray:
        """How often each page number of the row has been given to a page, int64 [n_pages]."""
        return self._generation[row.page_ids.array]  # type: ignore[no-any-return]

    def lose(self, page_id: int) -> None:
        """Make a page unknown, so that the next row to open computes it again."""
        key = self.pages.keys[page_id]
        if key is not None and self.pages.page_of_key.get(key) == page_id:
            del self.pages.page_of_key[key]

    # --- writing --------------------------------------------------------------------------------

    def reserve(self, row: Row, end: int) -> None:
        """Page numbers, and room for tokens up to `end`. Waits for the store if the bank is full."""
        page_tokens = self.geometry.page_tokens
        while len(row.page_ids) * page_tokens < end:
            page_index = len(row.page_ids)
            key = row.keys[page_index] if page_index < len(row.keys) else None
            page_id = self.pages.new(key, row.lease)
            self.renew(page_id)
            try:
                self.with_room(row, functools.partial(self.memory.place, page_id))
            except BaseException:
                _, ended = self.pages.let_go(page_id)
                if ended is not None and self._client is not None:
                    self._client.release(ended)
                raise
            row.page_ids.append(page_id)

    def reserve_early(self, row: Row, end: int) -> None:
        """`reserve` for tokens that may come, if that leaves the bank room to work."""
        if self.memory.may_pin():
            self.reserve(row, end)

    def with_room(self, row: Row, act: Callable[[], Any]) -> Any:
        """Do what takes room on the device, waiting for pages under way to the store while there is none."""
        deadline = time.monotonic() + self._store_timeout_s
        while True:
            try:
                return act()
            except BankTooSmall:
                if not self._writes:
                    raise
                started = time.monotonic()
                if started > deadline:
                    raise self._no_room() from None
                running = [w.future for w in self._writes if not w.future.done()]
                if running:
                    wait(running, timeout=1.0, return_when="FIRST_COMPLETED")
                else:
                    time.sleep(0.05)
                row.stats.seconds_store += time.monotonic() - started
                self.poll()

    def _no_room(self) -> LongreachError:
        """Why the bank stayed full. Full stores are said to be full: the row then waits its turn until others
        have let go of their pages, which a missed deadline would count against it."""
        full = [w.failure for w in self._writes if isinstance(w.failure, ResourceExhausted)]
        waited = (
            f"after {self._store_timeout_s} s {len(self._writes)} pages still wait for the store"
        )
        if full:
            return StoreFull(f"{waited}: {full[0].message}")
        return DeadlineExceeded(f"no bank slot became free: {waited}")

    def complete(self, row: Row, start: int, end: int) -> None:
        """Pages that filled up with tokens start … end in all layers go to the store, behind us."""
        page_tokens = self.geometry.page_tokens
        started = time.monotonic()
        for page_index in range(start // page_tokens, end // page_tokens):
            page_id = row.page_ids[page_index]
            if self.pages.complete[page_id]:
                continue
            key, parent = self._name(row, page_index)
            self.pages.complete[page_id] = True
            self._claims.pop(key, None)
            if self._client is None:
                continue
            row.stats.bytes_device_to_store += self.geometry.page_nbytes
            self._store(page_id, key, parent)
        row.stats.seconds_store += time.monotonic() - started

    def _store(self, page_id: int, key: PageKey, parent: PageKey) -> None:
        assert self._client is not None
        page = self.memory.page_bytes(page_id)
        future = self._client.store(key, parent, page, self.pages.group_of(page_id))
        generation = int(self._generation[page_id])
        self._writes.append(_Write(page_id, key, parent, future, generation))

    def _name(self, row: Row, page_index: int) -> tuple[PageKey, PageKey]:
        """Key and parent key of a full page; pages with answer tokens belong to their row alone."""
        parent = ROOT_KEY
        if page_index:
            parent = self.pages.keys[row.page_ids[page_index - 1]] or ROOT_KEY
        if page_index < len(row.keys):
            return row.keys[page_index], parent
        page_tokens = self.geometry.page_tokens
        first, last = page_index * page_tokens, (page_index + 1) * page_tokens
        sequence = [*row.request.prompt[first:last].tolist()]
        n_answer_before = max(0, first - row.n_prompt)
        sequence += row.tokens[n_answer_before : n_answer_before + page_tokens - len(sequence)]
        recipe = private_recipe(self._recipe, row.row_id)
        key = page_keys(sequence, recipe, page_tokens, parent)[0]
        self.pages.set_key(row.page_ids[page_index], key)
        row.private_keys.append(key)
        return key, parent

    def poll(self) -> None:
        """Take note of writes that ended: a safe page may leave the device; a failed one is tried
        again a little later, and stays on the device until then."""
        self._poll_pages()
        self.write_beside()

    def _poll_pages(self) -> None:
        ended = [w for w in self._writes if w.future.done()]
        self._writes = [w for w in self._writes if not w.future.done()]
        for write in ended:
            if write.key in self._drop_when_written and self._client is not None:
                self._drop_when_written.discard(write.key)
                self._client.drop([write.key])
            if self._generation[write.page_id] != write.generation:
                continue  # its row ended meanwhile, and its lease group with it
            failure = write.failure = write.future.exception()
            if failure is None:
                self._settle(write)
                continue
            now = time.monotonic()
            if write.retry_at_s is None:
                _log.warning("page %s is not stored yet: %s", write.key.hex()[:12], failure)
                write.retry_at_s = now + STORE_RETRY_S
            if now < write.retry_at_s:
                self._writes.append(write)
            else:
                self._store(write.page_id, write.key, write.parent)

    def _settle(self, write: _Write) -> None:
        self.pages.set_home(write.page_id, write.future.result())
        self.memory.mark_safe(write.page_id)

    def lost_leases(self) -> set[int]:
        """Pages whose lease a store ended: their bytes may be another page's by now."""
        if self._client is None:
            return set()
        lost = {group for group in self.pages.groups if self._client.lost(group)}
        if not lost:
            return set()
        ids = range(len(self.pages.keys))
        return {i for i in ids if self.pages.users[i] > 0 and self.pages.group_of(i) in lost}

    def is_writing(self, keys: Sequence[PageKey]) -> bool:
        """Whether any of these pages is still under way to the store."""
        return not {write.key for write in self._writes}.isdisjoint(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every write under way has ended; False if the time ran out."""
        deadline = time.monotonic() + timeout_s
        wait([w.future for w in self._writes], timeout=timeout_s)
        self._poll_pages()
        while (n_beside := self.write_beside()) and time.monotonic() < deadline:
            time.sleep(0.002)
        return not self._writes and not n_beside
