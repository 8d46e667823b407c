"""Writing pages behind the computation: replicas in order of preference."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from ..core.errors import LongreachError, PageCorrupt, StoreUnreachable
from ..core.page_key import PageKey, RecipeFingerprint
from .client_memory import ClientMemory, PageHandle
from .client_rows import PrivatePages, Row, RowTable
from .page import Bytes, Checksums, page_checksums
from .page_loader import PageLoader
from .store_link import Copy, StoreLink
from .store_pool import Counters, StorePool

logger = logging.getLogger(__name__)


class PageStorer:
    """Thread-safe."""

    def __init__(
        self,
        pool: StorePool,
        memory: ClientMemory,
        rows: RowTable,
        private: PrivatePages,
        loader: PageLoader,
        counters: Counters,
        recipe: RecipeFingerprint,
        replicas: int,
        lease_s: float,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._rows = rows
        self._private = private
        self._loader = loader
        self._counters = counters
        self._recipe = recipe
        self._replicas = replicas
        self._lease_s = lease_s

    def store(self, key: PageKey, parent_key: PageKey, page: Bytes, row: Row) -> PageHandle:
        """Returns when min(replicas, live stores) hold the page; stores that are full or fail in
        the middle are replaced by the next in order. The stores themselves see to copies that are
        missing then (repairer.py). Raises the last store's error if none took it."""
        announced = page_checksums(page, self._memory.geometry)
        copies = list(self._replicate(key, parent_key, announced, page, row))
        mapped = [(link, copy) for link, copy in copies if copy.memory is not None]
        if mapped:
            link, copy = mapped[0]
            assert copy.memory is not None
            handle = self._memory.handle(key, copy.memory, copy.slot, copy.checksums, link.store_id)
            self._rows.note(row, handle, link)
        else:
            handle = self._keep_private(key, page, *copies[0], row)
        short = len(copies) < self._replicas
        self._counters.add(pages_stored=1, pages_under_replicated=int(short))
        return handle

    def _replicate(
        self, key: PageKey, parent_key: PageKey, checksums: Checksums, page: Bytes, row: Row
    ) -> Iterator[tuple[StoreLink, Copy]]:
        """Yields each store that holds the page now; all copies have the bytes that won.

        The stores are asked one after the other, in the key's own order, so that of two writers
        with different bytes the one that was first at the first store wins at all of them. A page
        that only a later store has is taken from there.
        """
        ranked = self._pool.rank(key, self._pool.live_or_all())
        held = self._held_elsewhere(key, ranked[1 : self._replicas + 1], row)
        if held is not None and not np.array_equal(held.checksums, checksums):
            self._counters.add(mismatched_duplicates=1)
            page, checksums = self._memory.page_of(held), held.checksums
        n_copies, error = 0, None
        for link in ranked:
            if n_copies == self._replicas:
                break
            self._rows.note_pin(row, link)
            try:
                copy = self._store_at(link, key, parent_key, checksums, page, row)
            except LongreachError as exc:
                logger.warning("page %s is stored elsewhere: %s", key.hex()[:16], exc.message)
                error = exc
                continue
            if not np.array_equal(copy.checksums, checksums):
                self._counters.add(mismatched_duplicates=1)
                winner = self._bytes_at(link, key, copy, row)
                if winner is None:
                    continue
                page, checksums = winner, copy.checksums
            elif copy.duplicate:
                self._counters.add(duplicate_stores=1)
            else:
                self._counters.add(bytes_written=page.nbytes)
            n_copies += 1
            yield link, copy
        if not n_copies:
            raise error or StoreUnreachable(f"no store for page {key.hex()[:16]} is known")

    def _held_elsewhere(self, key: PageKey, links: list[StoreLink], row: Row) -> PageHandle | None:
        """The page as a later store in its order has it: its first store may be the one that
        joined last."""
        for link in links:
            try:
                if link.lookup([key])[0]:
                    return self._loader.load([key], row).get(key)
            except StoreUnreachable as exc:
                logger.info("not asked whether it holds a page: %s", exc.message)
        return None

    def _store_at(
        self,
        link: StoreLink,
        key: PageKey,
        parent_key: PageKey,
        checksums: Checksums,
        page: Bytes,
        row: Row,
    ) -> Copy:
        arguments = (key, parent_key, self._recipe, checksums, page, row.owner, self._lease_s)
        try:
            return link.store(*arguments)
        except PageCorrupt:  # damaged on the way: once more
            self._counters.add(corrupt_detected=1)
        try:
            return link.store(*arguments)
        except PageCorrupt:
            self._counters.add(corrupt_detected=1)
            raise

    def _bytes_at(self, link: StoreLink, key: PageKey, copy: Copy, row: Row) -> Bytes | None:
        """The bytes of the copy that won; None if they are corrupt or cannot be reached."""
        if copy.memory is None:
            handle = self._loader.fetch_private(link, key, row)
            if handle is None:
                return None
            return self._memory.page_of(handle)
        if self._loader.verify(copy.memory, copy.slot, copy.checksums):
            return self._memory.page(copy.memory, copy.slot)
        link.report_corrupt(key)
        return None

    def _keep_private(
        self, key: PageKey, page: Bytes, link: StoreLink, copy: Copy, row: Row
    ) -> PageHandle:
        """No store of this node took it: the worker reads it from a slot of its own. If another
        writer's bytes won, `_bytes_at` has brought them here already."""
        handle = self._private.share(key, row.owner)
        if handle is None:
            memory, slot = self._memory.take_private()
            np.copyto(self._memory.page(memory, slot), page)
            handle = self._private.keep(key, memory, slot, copy.checksums, link.store_id, row.owner)
        self._rows.note(row, handle, None)
        return handle
