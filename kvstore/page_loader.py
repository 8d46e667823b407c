"""Fetching pages: from the nearest copy first, every leaf checked, bad copies reported, then the
next replica."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from ..core.errors import LongreachError, StoreUnreachable
from ..core.page_key import PageKey, RecipeFingerprint
from .client_memory import ClientMemory, PageHandle
from .client_rows import PrivatePages, Row, RowTable
from .page import Checksums, page_checksums
from .store_link import Copy, StoreLink
from .store_pool import Counters, StorePool

logger = logging.getLogger(__name__)

SEARCH_WIDTH = 8
"""Stores asked for a page, in its order of preference, before it counts as gone."""


class PageLoader:
    """Thread-safe; must not be called from the executor that it is given."""

    def __init__(
        self,
        pool: StorePool,
        memory: ClientMemory,
        rows: RowTable,
        private: PrivatePages,
        counters: Counters,
        recipe: RecipeFingerprint,
        lease_s: float,
        executor: Executor,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._rows = rows
        self._private = private
        self._counters = counters
        self._recipe = recipe
        self._lease_s = lease_s
        self._executor = executor
        self._wire_numbers = itertools.count(1)

    def lookup(self, keys: Sequence[PageKey]) -> list[bool]:
        """Whether any live store holds each page."""
        links = self._pool.live()
        held = np.zeros(len(keys), bool)
        for future in [self._executor.submit(link.lookup, keys) for link in links.values()]:
            try:
                held |= np.asarray(future.result(), bool)
            except StoreUnreachable as exc:
                logger.info("lookup goes on without a store: %s", exc.message)
        return [bool(h) for h in held]

    def load(self, keys: Sequence[PageKey], row: Row) -> dict[PageKey, PageHandle]:
        """Pins and checks pages for a row. Keys without a good copy are left out."""
        missing = list(dict.fromkeys(keys))
        found = self._from_private(missing, row)
        missing = [key for key in missing if key not in found]
        links = self._greeted_links() if missing else {}
        ranks = {key: self._near_first(self._pool.rank(key, links)) for key in missing}
        tried_in_vain: set[PageKey] = set()
        for attempt in range(min(len(links), SEARCH_WIDTH)):
            by_link: dict[StoreLink, list[PageKey]] = {}
            for key in missing:
                by_link.setdefault(ranks[key][attempt], []).append(key)
            futures = {
                link: self._executor.submit(self._load_from, link, part, row)
                for link, part in by_link.items()
            }
            for link, future in futures.items():
                handles, bad = future.result()
                n_after_failure = len(tried_in_vain.intersection(handles))
                self._counters.add(replica_reads=n_after_failure)
                tried_in_vain.update(bad)
                found.update(handles)
                logger.debug("%d of %d pages from %s", len(handles), len(by_link[link]), link)
            missing = [key for key in missing if key not in found]
            if not missing:
                break
        return found

    def fetch_private(self, link: StoreLink, key: PageKey, row: Row) -> PageHandle | None:
        """One page of one store over the wire; None if it has no good copy."""
        return self._load_wire(link, [key], row)[0].get(key)

    def verify(self, memory: int, slot: int, checksums: Checksums) -> bool:
        actual = page_checksums(self._memory.page(memory, slot), self._memory.geometry)
        return bool(np.array_equal(actual, checksums))

    def _greeted_links(self) -> dict[str, StoreLink]:
        """Live stores; those not met before are greeted, to know which are on this node."""
        links = self._pool.live_or_all()
        new = [link for link in links.values() if not link.greeted]
        for future in [self._executor.submit(link.greet) for link in new]:
            try:
                future.result()
            except LongreachError as exc:
                logger.warning("a store did not answer the greeting: %s", exc.message)
        return self._pool.live_or_all() if new else links

    def _near_first(self, ranked: list[StoreLink]) -> list[StoreLink]:
        return sorted(ranked, key=lambda link: not link.near)

    def _from_private(self, keys: Sequence[PageKey], row: Row) -> dict[PageKey, PageHandle]:
        found = {}
        for key in keys:
            handle = self._private.share(key, row.owner)
            if handle is None:
                continue
            if self.verify(handle.memory, self._memory.slot_of(handle), handle.checksums):
                self._rows.note(row, handle, None)
                found[key] = handle
            else:
                self._counters.add(corrupt_detected=1)
                self._private.spoil(handle)
        return found

    def _load_from(
        self, link: StoreLink, keys: list[PageKey], row: Row
    ) -> tuple[dict[PageKey, PageHandle], list[PageKey]]:
        """Good pages, and the keys whose copy was bad or could not be reached."""
        try:
            if link.mapped:
                return self._load_mapped(link, keys, row)
            return self._load_wire(link, keys, row)
        except LongreachError as exc:
            logger.warning("pages are taken from elsewhere: %s", exc.message)
            return {}, keys

    def _load_mapped(
        self, link: StoreLink, keys: list[PageKey], row: Row
    ) -> tuple[dict[PageKey, PageHandle], list[PageKey]]:
        # noted before the answer: a pin whose answer is lost is released with the row
        self._rows.note_pin(row, link)
        copies = link.prepare_load(keys, row.owner, self._lease_s)
        found: dict[PageKey, PageHandle] = {}
        bad: list[PageKey] = []
        for key, copy in zip(keys, copies, strict=True):
            if copy is None:
                continue
            if copy.memory is None:  # it restarted and is now read over the wire
                return self._load_wire(link, keys, row)
            if self._good(link, key, copy, copy.memory, copy.slot):
                handle = self._memory.handle(
                    key, copy.memory, copy.slot, copy.checksums, link.store_id
                )
                self._rows.note(row, handle, link)
                found[key] = handle
            else:
                bad.append(key)
        n_bytes = (len(found) + len(bad)) * self._memory.geometry.page_nbytes
        self._counters.add(bytes_read_inplace=n_bytes)
        return found, bad

    def _load_wire(
        self, link: StoreLink, keys: list[PageKey], row: Row
    ) -> tuple[dict[PageKey, PageHandle], list[PageKey]]:
        """Copies pages into private slots; the store's pins end when all have arrived."""
        found: dict[PageKey, PageHandle] = {}
        bad: list[PageKey] = []
        owner = f"{row.owner}/wire/{next(self._wire_numbers)}"
        try:
            for key, copy, page in link.read(keys, owner, self._lease_s):
                self._counters.add(bytes_read_wire=page.nbytes)
                memory, slot = self._memory.take_private()
                good = page.nbytes == self._memory.geometry.page_nbytes
                if good:
                    np.copyto(self._memory.page(memory, slot), np.frombuffer(page, np.uint8))
                if not good or not self._good(link, key, copy, memory, slot):
                    self._memory.give_back_private(memory, slot)
                    bad.append(key)
                    continue
                handle = self._private.keep(
                    key, memory, slot, copy.checksums, link.store_id, row.owner
                )
                self._rows.note(row, handle, None)
                found[key] = handle
        except StoreUnreachable as exc:
            logger.warning("pages are taken from elsewhere: %s", exc.message)
            bad += [key for key in keys if key not in found and key not in bad]
        finally:
            self._pool.release([link], owner)
        return found, bad

    def _good(self, link: StoreLink, key: PageKey, copy: Copy, memory: int, slot: int) -> bool:
        if copy.recipe == self._recipe and self.verify(memory, slot, copy.checksums):
            return True
        self._counters.add(corrupt_detected=1)
        logger.warning("store %s has a corrupt copy of %s", link.store_id, key.hex()[:16])
        try:
            link.report_corrupt(key, copy.slot)
        except LongreachError as exc:
            logger.warning("the corrupt copy could not be reported: %s", exc.message)
        return False
