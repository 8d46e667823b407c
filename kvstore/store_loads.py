"""Requests that read pages: pinned in place for readers of the node, streamed to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..core.page_key import PageKey
from .page import Bytes
from .page_checks import BadCopy, read_checked
from .shard import HeldPage
from .store_core import StoreCore
from .store_requests import Header, keys_of, lease_of, located, text_of
from .transport import Reply


class StoreLoads:
    def __init__(self, core: StoreCore) -> None:
        self._core = core

    def prepare_load(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """Pins pages. `verify` False leaves their check to the reader, who maps them."""
        keys, owner, lease_s = keys_of(header), text_of(header, "owner"), lease_of(header)
        pages = self._pin(keys, owner, lease_s, verify=bool(header.get("verify", True)))
        found = [located(page) if page is not None else None for page in pages]
        return Reply({"incarnation": self._core.incarnation, "pages": found})

    def complete_load(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys, owner = keys_of(header), text_of(header, "owner")
        with self._core.lock:
            self._core.shard.complete_load(keys, owner)
        return Reply({})

    def read(self, header: Header) -> Iterator[Reply]:
        """One reply per key, in order: the page's bytes, or `found` False. Every page read stays
        pinned for the owner until it says complete_load or release, because its bytes are sent
        from the arena itself. A reader that goes away early has released all of them. `passing`: it
        only copies the pages on."""
        passing = bool(header.get("passing", False))
        keys, owner, lease_s = keys_of(header), text_of(header, "owner"), lease_of(header)
        n_left = 0 if passing else self._core.config.promote_pages
        try:
            for key in keys:
                n_left -= self._promote([key], min(n_left, 1))
                page = self._load(key, owner, lease_s, passing)
                checked = None if page is None else self._checked(page, owner, lease_s, passing)
                if checked is None:
                    yield Reply({"found": False})
                else:
                    yield Reply({"found": True, **located(checked[0])}, [checked[1].data])
        except GeneratorExit:
            # its own release may have overtaken the last pin
            with self._core.lock:
                self._core.shard.release(owner)
            raise

    def _pin(
        self, keys: list[PageKey], owner: str, lease_s: float, verify: bool
    ) -> list[HeldPage | None]:
        core = self._core
        self._promote(keys, core.config.promote_pages)
        with core.lock:
            pages = core.shard.prepare_load(keys, owner, core.now(), lease_s, verify=False)
        for i, page in enumerate(pages):
            # a page of the disk of an earlier process has not been seen by anybody yet
            if page is not None and (verify or page.unchecked):
                checked = self._checked(page, owner, lease_s)
                pages[i] = None if checked is None else checked[0]
        return pages

    def _promote(self, keys: Sequence[PageKey], max_pages: int) -> int:
        mover = self._core.mover
        return mover.promote(keys, max_pages) if mover is not None and max_pages else 0

    def _load(
        self, key: PageKey, owner: str, lease_s: float, passing: bool = False
    ) -> HeldPage | None:
        core, now = self._core, self._core.now()
        with core.lock:
            return core.shard.prepare_load([key], owner, now, lease_s, False, passing)[0]

    def _checked(
        self, page: HeldPage, owner: str, lease_s: float, passing: bool = False
    ) -> tuple[HeldPage, Bytes] | None:
        """A page that was pinned for the owner, and its bytes; if they are bad, its other copy, pinned
        instead; None if there is none."""
        core, found = self._core, page
        while True:
            # pinned, so the bytes stay where they are while they are hashed outside the lock
            data = read_checked(core.shard.slots, found, found.slot)
            if not isinstance(data, BadCopy):
                found.unchecked = False
                return found, data
            with core.lock:
                core.shard.complete_load([found.key], owner)
                core.shard.table.bad_copy(found, data.slot, data.reason)
            other = self._load(page.key, owner, lease_s, passing)
            if other is None:
                return None
            found = other
