"""Finding pages: what this client has already, then a fetch by plan from the stores (page_fetch.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import wait

import numpy as np

from ..core.errors import LongreachError, StoreUnreachable
from ..core.page_key import PageKey
from .client_memory import PageHandle
from .client_rows import Row
from .page import Checksums, has_checksums
from .page_fetch import Fetch
from .page_share import FetchParts
from .store_link import HELLO_TIMEOUT_S, StoreLink

logger = logging.getLogger(__name__)


class PageLoader:
    """Thread-safe; must not be called from the executor of its parts."""

    def __init__(self, parts: FetchParts, replicas: int, timeout_s: float) -> None:
        self._parts = parts
        self._replicas = replicas
        self._timeout_s = timeout_s

    def lookup(self, keys: Sequence[PageKey]) -> list[bool]:
        """Whether any live store holds each page."""
        links = self._parts.pool.live()
        held = np.zeros(len(keys), bool)
        submit = self._parts.executor.submit
        for future in [submit(link.lookup, keys) for link in links.values()]:
            try:
                held |= np.asarray(future.result(), bool)
            except StoreUnreachable as exc:
                logger.info("lookup goes on without a store: %s", exc.message)
        return [bool(h) for h in held]

    def load(
        self,
        keys: Sequence[PageKey],
        row: Row,
        timeout_s: float | None = None,
        *,
        cancellable: bool = False,
        check: bool = True,
    ) -> dict[PageKey, PageHandle]:
        """Pins and checks pages for a row, those needed first in front, within one deadline. Keys
        without a good copy are left out.

        cancellable: the row's release ends it with Cancelled. check False: see Fetch.
        """
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        wanted = list(dict.fromkeys(keys))
        found = self._from_private(wanted, row)
        wanted = [key for key in wanted if key not in found]
        if not wanted:
            return found
        links = self._greeted_links(deadline_s)
        ranks = {
            key: [link.store_id for link in self._parts.pool.rank(key, links)] for key in wanted
        }
        fetch = Fetch(
            self._parts,
            wanted,
            ranks,
            links,
            row,
            deadline_s,
            n_replicas=self._replicas,
            check=check,
        )
        self._run(fetch, row, found, cancellable)
        return found

    def fetch_private(self, link: StoreLink, key: PageKey, row: Row) -> PageHandle | None:
        """One page of one store; None if it has no good copy."""
        deadline_s = time.monotonic() + self._timeout_s
        ranks, links = {key: [link.store_id]}, {link.store_id: link}
        return Fetch(self._parts, [key], ranks, links, row, deadline_s).run().get(key)

    def verify(self, memory: int, slot: int, checksums: Checksums) -> bool:
        pages = self._parts.memory
        return has_checksums(pages.page(memory, slot), pages.geometry, checksums)

    def _run(
        self, fetch: Fetch, row: Row, found: dict[PageKey, PageHandle], cancellable: bool
    ) -> None:
        if not cancellable:
            found.update(fetch.run())
            return
        self._parts.rows.on_release(row, fetch.cancel)
        try:
            found.update(fetch.run())
        finally:
            self._parts.rows.forget_hook(row, fetch.cancel)

    def _greeted_links(self, deadline_s: float) -> dict[str, StoreLink]:
        """Live stores; those not met before are greeted, to know which are on this node. One that does
        not answer the greeting in time is left out as long as there are others."""
        pool = self._parts.pool
        links = pool.live_or_all()
        new = [link for link in links.values() if not link.greeted]
        if not new:
            return links
        timeout_s = min(HELLO_TIMEOUT_S, max(deadline_s - time.monotonic(), 0.0) / 2)
        futures = [self._parts.executor.submit(_greet, link) for link in new]
        wait(futures, timeout=timeout_s)
        links = pool.live_or_all()
        return {i: link for i, link in links.items() if link.greeted} or links

    def _from_private(self, keys: Sequence[PageKey], row: Row) -> dict[PageKey, PageHandle]:
        parts = self._parts
        found = {}
        for key in keys:
            handle = parts.private.share(key, row.owner)
            if handle is None:
                continue
            if self.verify(handle.memory, parts.memory.slot_of(handle), handle.checksums):
                parts.rows.note(row, handle, None)
                found[key] = handle
            else:
                parts.counters.add(corrupt_detected=1, failed_load_corrupt_private=1)
                parts.private.spoil(handle)
        return found


def _greet(link: StoreLink) -> None:
    try:
        link.greet()
    except LongreachError as exc:
        logger.warning("a store did not answer the greeting: %s", exc.message)
