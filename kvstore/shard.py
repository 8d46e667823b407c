"""One store's pages: what is held where, who pins it and until when. No threads, no clock, no I/O
beside its slots; the caller hands in `now` (monotonic seconds) and serialises the calls.

Life of a page: `prepare_store` gives a slot, the writer copies the bytes, `complete_store` checks
them and makes the page visible. The first completed store of a key wins. `prepare_load` pins a page
and says where it is, `complete_load` or `release` unpins it. A slot is never reused while its page
is pinned, even if the page was dropped meanwhile. Pinned pages are never moved or evicted; the
others go in the order of eviction.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from ..core.errors import LeaseExpired, PageCorrupt
from ..core.page_key import PageKey, RecipeFingerprint
from .arena import Arena
from .disk import DiskTier
from .disk_index import DiskIndex
from .leases import Leases, OpenWrite
from .page import Checksums, has_checksums, page_checksums
from .page_checks import BadCopy
from .page_slots import PageSlots
from .page_table import HeldPage, PageTable
from .tier_moves import TierMoves

__all__ = ["HeldPage", "OpenWrite", "StoreShard"]
ALL_KEYS = 1 << 40


class StoreShard:
    """Pages of one arena and, where there is one, one disk tier. Not thread-safe (see
    store_service.py). high, low: watermarks of the arena, as shares of its slots."""

    def __init__(
        self,
        arena: Arena,
        disk: DiskTier | None = None,
        index: DiskIndex | None = None,
        *,
        high: float = 0.95,
        low: float = 0.85,
        write_through: bool = False,
    ) -> None:
        self.arena = arena
        self.slots = PageSlots(arena, disk)
        self.table = PageTable(self.slots, index, write_through)
        self.moves = TierMoves(self.table, high, low, write_through)
        self._leases = Leases()
        self._next_write_id = 1

    def lookup(self, keys: Iterable[PageKey]) -> list[bool]:
        return [key in self.table.pages for key in keys]

    def prepare_load(
        self,
        keys: Sequence[PageKey],
        owner: str,
        now: float,
        lease_s: float,
        verify: bool = True,
        passing: bool = False,
    ) -> list[HeldPage | None]:
        """Pins the pages that are held, for `owner`. With verify, corrupt pages are dropped.
        passing: the owner only copies them on; neither their rank nor the hit rate changes."""
        self.expire(now)
        found: list[HeldPage | None] = []
        for key in keys:
            page = self.table.pages.get(key)
            if page is not None and verify and not self.is_intact(page):
                self.report_corrupt(key, page.slot)
                page = None
            if page is not None:
                self._pin(page, owner, now, lease_s, passing)
            if passing:
                pass
            elif page is not None:
                self._counters[f"hits_{self.slots.tier(page.slot)}"] += 1
            else:
                self._counters["misses"] += 1
            found.append(page)
        return found

    def complete_load(self, keys: Iterable[PageKey], owner: str) -> None:
        """Unpins single pages of an owner."""
        lease = self._leases.get(owner)
        if lease is None:
            return
        wanted = set(keys)
        for page in [page for page in lease.pages if page.key in wanted]:
            del lease.pages[page]
            self._unpin(page, lease.passing)
        self._leases.forget_if_empty(owner)

    def prepare_store(
        self,
        key: PageKey,
        parent_key: PageKey,
        recipe: RecipeFingerprint,
        checksums: Checksums,
        owner: str,
        now: float,
        lease_s: float,
    ) -> OpenWrite | HeldPage:
        """A slot to write into, or the page if it is held already (then pinned for the owner).

        checksums: those of the bytes that will be written. Raises StoreFull.
        """
        self.expire(now)
        held = self.table.pages.get(key)
        if held is not None:
            self._count_duplicate(held, checksums)
            self._pin(held, owner, now, lease_s)
            return held
        slot = self.table.slot_for_new(now)
        page = HeldPage(key, parent_key, recipe, checksums, slot)
        write = OpenWrite(self._next_write_id, page, owner)
        self._next_write_id += 1
        self._leases.extend(owner, now, lease_s).writes[write.write_id] = write
        return write

    def open_write(self, write_id: int, owner: str) -> OpenWrite:
        """Raises LeaseExpired if there is no such write any more."""
        lease = self._leases.get(owner)
        write = lease.writes.get(write_id) if lease is not None else None
        if write is None:
            raise LeaseExpired(
                f"write {write_id} of {owner} was not completed in time; its slot is free again"
            )
        return write

    def complete_store(
        self,
        write_id: int,
        owner: str,
        now: float,
        lease_s: float,
        actual: Checksums | None = None,
    ) -> HeldPage:
        """Makes the written page visible, pinned for the owner, or returns the one that won.

        actual: checksums of the slot's bytes if the caller computed them already. Raises
        LeaseExpired, and PageCorrupt if the bytes are not those that were announced.
        """
        self.expire(now)
        write = self.open_write(write_id, owner)
        page = write.page
        if actual is None:
            actual = page_checksums(self.slots.read(page.slot), self.slots.geometry)
        self._leases.extend(owner, now, lease_s).writes.pop(write_id)
        bad = np.flatnonzero(actual != page.checksums)
        if len(bad):
            self.slots.give_back(page.slot)
            self._leases.forget_if_empty(owner)
            self._counters["corrupt_detected"] += 1
            raise PageCorrupt(
                f"{len(bad)} of {len(actual)} leaves were not written as announced, "
                f"the first is leaf {bad[0]}; write the page again"
            )
        winner = self.table.pages.get(page.key)
        if winner is not None:
            self.slots.give_back(page.slot)
            self._count_duplicate(winner, page.checksums)
            page = winner
        else:
            self.table.hold(page)
            self.moves.completed(page)
            self._counters["pages_stored"] += 1
        self._pin(page, owner, now, lease_s)
        return page

    def abort_store(self, write_id: int, owner: str) -> None:
        """Gives a slot back unwritten; nothing happens if the write is gone already."""
        lease = self._leases.get(owner)
        write = lease.writes.pop(write_id, None) if lease is not None else None
        if write is not None:
            self.slots.give_back(write.page.slot)
            self._leases.forget_if_empty(owner)

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Makes pages most recent; the first of keys, on which the others build, the most."""
        for key in reversed(keys):
            if key in self.table.order:
                self.table.order.touch(key)

    def drop(self, keys: Iterable[PageKey]) -> int:
        """Forgets pages; a pinned one keeps its slot until it is unpinned. Returns how many."""
        return sum(self.table.drop(key) for key in keys)

    def report_corrupt(self, key: PageKey, slot: int) -> bool:
        """Drops this copy of the page if it is still in that slot."""
        page = self.table.pages.get(key)
        if page is None or slot not in (page.slot, page.backup):
            return False
        self.table.bad_copy(page, slot)
        return True

    def is_intact(self, page: HeldPage) -> bool:
        """Raises OSError if the page is on a disk that fails."""
        return has_checksums(self.slots.read(page.slot), self.slots.geometry, page.checksums)

    def begin_check(self, key: PageKey) -> HeldPage | None:
        """The page, with its copies kept in place until `end_check`, readers or not."""
        page = self.table.pages.get(key)
        if page is not None:
            page.n_movers += 1
            self.table.settle(page)
        return page

    def end_check(self, page: HeldPage, bad: Iterable[BadCopy]) -> None:
        """bad: of its copies, those that are no good."""
        for copy in bad:
            self.table.bad_copy(page, copy.slot, copy.reason)
        page.n_movers -= 1
        self.table.settle(page)

    def has_room(self, key: PageKey) -> bool:
        """Whether a page can be stored, or is, without loss of another."""
        slots = self.slots
        free = slots.n_free_arena or slots.n_free_disk or self.table.order.next("free") is not None
        return key in self.table.pages or bool(free)

    def keys_after(self, after: PageKey | None, limit: int = ALL_KEYS) -> list[PageKey]:
        """Keys of held pages in order, from the one after `after` on."""
        keys = (key for key in self.table.pages if after is None or key > after)
        if limit >= len(self.table.pages):
            return sorted(keys)
        return heapq.nsmallest(limit, keys)

    def renew(self, owner: str, now: float, lease_s: float) -> bool:
        """False if the owner's lease has ended: what it pinned may be gone."""
        self.expire(now)
        if self._leases.get(owner) is None:
            return False
        self._leases.extend(owner, now, lease_s)
        return True

    def release(self, owner: str, prefix: bool = False) -> int:
        """Ends the lease of an owner, or of all whose name starts so. Returns pages unpinned."""
        names = self._leases.named(owner) if prefix else [owner]
        return sum(self._end_lease(name) for name in names)

    def expire(self, now: float) -> int:
        """Ends the leases whose deadline has passed. Returns how many."""
        late = self._leases.late(now)
        for name in late:
            self._end_lease(name)
        self._counters["leases_expired"] += len(late)
        return len(late)

    def find(self, key: PageKey) -> HeldPage | None:
        return self.table.pages.get(key)

    def stats(self) -> dict[str, int]:
        """Slots of a tier are in use (its `pages`) by pages, by writes that are open, and by dropped
        pages while they are pinned; a page with a copy in both tiers uses two."""
        slots, n_bytes = self.slots, self.slots.geometry.page_nbytes
        n_arena, n_disk = slots.n_arena - slots.n_free_arena, slots.n_disk - slots.n_free_disk
        return {
            **self._counters,
            "n_slots": slots.n_arena + slots.n_disk,
            "pages_held": len(self.table.pages),
            "pages_pinned": self.table.order.n_pinned,
            "slots_free": slots.n_free_arena + slots.n_free_disk,
            "writes_open": self._leases.n_writes(),
            "leases": len(self._leases),
            "bytes_held": len(self.table.pages) * n_bytes,
            "arena_slots": slots.n_arena,
            "arena_pages": n_arena,
            "arena_bytes": n_arena * n_bytes,
            "disk_slots": slots.n_disk,
            "disk_pages": n_disk,
            "disk_bytes": n_disk * n_bytes,
            "moves_waiting": self.moves.n_waiting,
        }

    @property
    def _counters(self) -> dict[str, int]:
        return self.table.counters

    def _pin(
        self, page: HeldPage, owner: str, now: float, lease_s: float, passing: bool = False
    ) -> None:
        lease = self._leases.extend(owner, now, lease_s, passing)
        if page in lease.pages:
            return
        lease.pages[page] = None
        page.n_pins += 1
        if not lease.passing:
            # a row reads over the wire under names of its own
            self.table.order.use(page.key, owner.partition("/wire/")[0])
        self.table.settle(page)

    def _unpin(self, page: HeldPage, passing: bool) -> None:
        page.n_pins -= 1
        if not page.n_pins and not page.dropped and not passing:
            self.table.order.touch(page.key)
        self.table.settle(page)

    def _end_lease(self, owner: str) -> int:
        lease = self._leases.pop(owner)
        if lease is None:
            return 0
        # last acquired first: the head of a context, on which the rest builds, stays longest
        for page in reversed(lease.pages):
            self._unpin(page, lease.passing)
        for write in lease.writes.values():
            self.slots.give_back(write.page.slot)
        return len(lease.pages)

    def _count_duplicate(self, held: HeldPage, checksums: Checksums) -> None:
        same = np.array_equal(held.checksums, checksums)
        self._counters["duplicate_stores" if same else "mismatched_duplicates"] += 1
