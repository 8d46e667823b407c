"""Requests that write pages: a slot is given, filled by the writer or from the message, and checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.errors import Draining, InvalidInput, LongreachError, StoreFull
from ..core.page_key import RecipeFingerprint
from .page import checksums_from_wire, page_checksums
from .shard import HeldPage, OpenWrite
from .store_core import StoreCore
from .store_requests import MAX_KEYS, Header, as_key, lease_of, located, number_of, text_of
from .transport import Reply


class StoreWrites:
    def __init__(self, core: StoreCore) -> None:
        self._core = core

    def prepare_store(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`pages`: a list of {key, parent, recipe, checksums}. The reply has for each: a write to
        fill, the page held already, or the error that concerns it alone."""
        pages = header.get("pages")
        if not isinstance(pages, list) or len(pages) > MAX_KEYS:
            raise InvalidInput(f"`pages` must be a list of at most {MAX_KEYS} pages")
        results: list[Header] = []
        for page in pages:
            if not isinstance(page, dict):
                raise InvalidInput(f"an entry of `pages` must be a map, got {page!r:.80}")
            try:
                begun = self._begin({**header, **page})
            except LongreachError as exc:
                results.append({"failed": exc.to_wire()})
                continue
            if isinstance(begun, HeldPage):
                results.append({"held": located(begun)})
            else:
                results.append({"write_id": begun.write_id, "slot": begun.page.slot})
        return Reply({"incarnation": self._core.incarnation, "pages": results})

    def complete_store(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`writes`: write ids. The reply has for each the page that is held now, or its error."""
        owner, lease_s, writes = text_of(header, "owner"), lease_of(header), header.get("writes")
        if not isinstance(writes, list) or not all(isinstance(w, int) for w in writes):
            raise InvalidInput("`writes` must be a list of write ids")
        results: list[Header] = []
        for write_id in writes:
            try:
                results.append({"held": located(self._finish(write_id, owner, lease_s))})
            except LongreachError as exc:
                results.append({"failed": exc.to_wire()})
        return Reply({"incarnation": self._core.incarnation, "pages": results})

    def abort_store(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        write_id, owner = number_of(header, "write_id"), text_of(header, "owner")
        with self._core.lock:
            self._core.shard.abort_store(write_id, owner)
        return Reply({})

    def write(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """prepare, copy and complete in one request, for writers on other nodes. `pin` False leaves
        the page unpinned, `evict` False takes it only into free room."""
        core = self._core
        if len(buffers) != 1 or buffers[0].nbytes != core.geometry.page_nbytes:
            sizes = [buffer.nbytes for buffer in buffers]
            raise InvalidInput(f"write wants one page of {core.geometry.page_nbytes} B: {sizes}")
        begun = self._begin(header)
        if isinstance(begun, HeldPage):
            page, duplicate = begun, True
        else:
            try:
                core.shard.slots.write(begun.page.slot, np.frombuffer(buffers[0], np.uint8))
            except OSError as exc:
                raise self._disk_failed(begun, exc) from exc
            page = self._finish(begun.write_id, begun.owner, lease_of(header))
            duplicate = page is not begun.page
        if not header.get("pin", True):
            with core.lock:
                core.shard.complete_load([page.key], text_of(header, "owner"))
        return Reply({"held": located(page), "duplicate": duplicate})

    def _begin(self, header: Header) -> OpenWrite | HeldPage:
        core, recipe = self._core, header.get("recipe")
        key, parent = as_key(header.get("key")), as_key(header.get("parent"))
        if not isinstance(recipe, bytes):
            raise InvalidInput("`recipe` must be bytes")
        checksums = checksums_from_wire(header.get("checksums"), core.geometry)
        owner, lease_s = text_of(header, "owner"), lease_of(header)
        if not core.takes_pages:
            raise Draining(f"store {core.store_id} is draining and takes no new pages")
        with core.lock:
            if not header.get("evict", True) and not core.shard.has_room(key):
                raise StoreFull(f"store {core.store_id} has no free room for a page not in use")
            begun = core.shard.prepare_store(
                key, parent, RecipeFingerprint(recipe), checksums, owner, core.now(), lease_s
            )
        core.wake_mover()
        return begun

    def _finish(self, write_id: int, owner: str, lease_s: float) -> HeldPage:
        core = self._core
        with core.lock:
            write = core.shard.open_write(write_id, owner)
        try:
            actual = page_checksums(core.shard.slots.read(write.page.slot), core.geometry)
        except OSError as exc:
            raise self._disk_failed(write, exc) from exc
        with core.lock:
            page = core.shard.complete_store(write_id, owner, core.now(), lease_s, actual)
        core.wake_mover()
        return page

    def _disk_failed(self, write: OpenWrite, exc: OSError) -> StoreFull:
        """The slot is free again, and the disk takes no pages for a while."""
        core = self._core
        with core.lock:
            core.shard.abort_store(write.write_id, write.owner)
            core.shard.table.disk_failed(core.now(), exc)
        return StoreFull(f"the disk of store {core.store_id} takes no page: {exc}")
