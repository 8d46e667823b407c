"""One store's pages: what is held where, who pins it and until when. No threads, no clock, no I/O
beside its arena; the caller hands in `now` (monotonic seconds) and serialises the calls.

Life of a page: `prepare_store` gives a slot, the writer copies the bytes, `complete_store` checks
them and makes the page visible. The first completed store of a key wins. `prepare_load` pins a page
and says where it is, `complete_load` or `release` unpins it. A slot is never reused while its page
is pinned, even if the page was dropped meanwhile. Pinned pages are never evicted; the others go
least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import LeaseExpired, PageCorrupt, StoreFull
from ..core.page_key import PageKey, RecipeFingerprint
from .arena import Arena
from .page import Checksums, page_checksums


@dataclass(eq=False, slots=True)
class HeldPage:
    """A page in a slot. `checksums`: uint64 [n_leaves]."""

    key: PageKey
    parent_key: PageKey
    recipe: RecipeFingerprint
    checksums: Checksums
    slot: int
    n_pins: int = 0
    dropped: bool = False


@dataclass(eq=False, slots=True)
class OpenWrite:
    """A slot between prepare_store and complete_store."""

    write_id: int
    page: HeldPage
    owner: str


@dataclass(eq=False, slots=True)
class _Lease:
    """All that one owner pins, with one deadline: renewing it is one operation."""

    deadline_s: float
    pages: dict[int, HeldPage] = field(default_factory=dict)  # by slot, in order of acquisition
    writes: dict[int, OpenWrite] = field(default_factory=dict)


class StoreShard:
    """Pages of one arena. Not thread-safe (see store_service.py)."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._pages: dict[PageKey, HeldPage] = {}
        self._evictable: OrderedDict[PageKey, HeldPage] = OrderedDict()
        self._free_slots = list(range(arena.n_slots - 1, -1, -1))
        self._leases: dict[str, _Lease] = {}
        self._next_write_id = 1
        self._counters = dict.fromkeys(
            (
                "pages_stored",
                "duplicate_stores",
                "mismatched_duplicates",
                "evictions",
                "corrupt_detected",
                "leases_expired",
                "store_full",
            ),
            0,
        )

    def lookup(self, keys: Iterable[PageKey]) -> list[bool]:
        return [key in self._pages for key in keys]

    def prepare_load(
        self,
        keys: Sequence[PageKey],
        owner: str,
        now: float,
        lease_s: float,
        verify: bool = True,
    ) -> list[HeldPage | None]:
        """Pins the pages that are held, for `owner`. With verify, corrupt pages are dropped."""
        self.expire(now)
        found: list[HeldPage | None] = []
        for key in keys:
            page = self._pages.get(key)
            if page is not None and verify and not self.is_intact(page):
                self.report_corrupt(key, page.slot)
                page = None
            if page is not None:
                self._pin(page, self._lease(owner, now, lease_s))
            found.append(page)
        return found

    def complete_load(self, keys: Iterable[PageKey], owner: str) -> None:
        """Unpins single pages of an owner."""
        lease = self._leases.get(owner)
        if lease is None:
            return
        wanted = set(keys)
        for page in [page for page in lease.pages.values() if page.key in wanted]:
            del lease.pages[page.slot]
            self._unpin(page)
        self._forget_if_empty(owner)

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
        held = self._pages.get(key)
        if held is not None:
            self._count_duplicate(held, checksums)
            self._pin(held, self._lease(owner, now, lease_s))
            return held
        slot = self._take_slot()
        page = HeldPage(key, parent_key, recipe, checksums, slot)
        write = OpenWrite(self._next_write_id, page, owner)
        self._next_write_id += 1
        self._lease(owner, now, lease_s).writes[write.write_id] = write
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
        del self._leases[owner].writes[write_id]
        page = write.page
        if actual is None:
            actual = page_checksums(self.arena.slots[page.slot], self.arena.geometry)
        bad = np.flatnonzero(actual != page.checksums)
        if len(bad):
            self._free_slots.append(page.slot)
            self._forget_if_empty(owner)
            self._counters["corrupt_detected"] += 1
            raise PageCorrupt(
                f"{len(bad)} of {len(actual)} leaves were not written as announced, "
                f"the first is leaf {bad[0]}; write the page again"
            )
        winner = self._pages.get(page.key)
        if winner is not None:
            self._free_slots.append(page.slot)
            self._count_duplicate(winner, page.checksums)
            page = winner
        else:
            self._pages[page.key] = page
            self._counters["pages_stored"] += 1
        self._pin(page, self._lease(owner, now, lease_s))
        return page

    def abort_store(self, write_id: int, owner: str) -> None:
        """Gives a slot back unwritten; nothing happens if the write is gone already."""
        lease = self._leases.get(owner)
        write = lease.writes.pop(write_id, None) if lease is not None else None
        if write is not None:
            self._free_slots.append(write.page.slot)
            self._forget_if_empty(owner)

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Makes pages most recent; the first of keys, on which the others build, the most."""
        for key in reversed(keys):
            if key in self._evictable:
                self._evictable.move_to_end(key)

    def drop(self, keys: Iterable[PageKey]) -> int:
        """Forgets pages; a pinned one keeps its slot until it is unpinned. Returns how many."""
        n_dropped = 0
        for key in keys:
            page = self._pages.pop(key, None)
            if page is None:
                continue
            n_dropped += 1
            page.dropped = True
            self._evictable.pop(key, None)
            if not page.n_pins:
                self._free_slots.append(page.slot)
        return n_dropped

    def report_corrupt(self, key: PageKey, slot: int) -> bool:
        """Drops the page if it is still the one in that slot."""
        page = self._pages.get(key)
        if page is None or page.slot != slot:
            return False
        self._counters["corrupt_detected"] += 1
        self.drop([key])
        return True

    def is_intact(self, page: HeldPage) -> bool:
        actual = page_checksums(self.arena.slots[page.slot], self.arena.geometry)
        return bool(np.array_equal(actual, page.checksums))

    def renew(self, owner: str, now: float, lease_s: float) -> bool:
        """False if the owner's lease has ended: what it pinned may be gone."""
        self.expire(now)
        lease = self._leases.get(owner)
        if lease is None:
            return False
        lease.deadline_s = max(lease.deadline_s, now + lease_s)
        return True

    def release(self, owner: str, prefix: bool = False) -> int:
        """Ends the lease of an owner, or of all whose name starts so. Returns pages unpinned."""
        names = [n for n in self._leases if n.startswith(owner)] if prefix else [owner]
        return sum(self._end_lease(name) for name in names)

    def expire(self, now: float) -> int:
        """Ends the leases whose deadline has passed. Returns how many."""
        late = [name for name, lease in self._leases.items() if lease.deadline_s <= now]
        for name in late:
            self._end_lease(name)
        self._counters["leases_expired"] += len(late)
        return len(late)

    def find(self, key: PageKey) -> HeldPage | None:
        return self._pages.get(key)

    def stats(self) -> dict[str, int]:
        return {
            **self._counters,
            "n_slots": self.arena.n_slots,
            "pages_held": len(self._pages),
            "pages_pinned": len(self._pages) - len(self._evictable),
            "slots_free": len(self._free_slots),
            "writes_open": sum(len(lease.writes) for lease in self._leases.values()),
            "leases": len(self._leases),
            "bytes_held": len(self._pages) * self.arena.geometry.page_nbytes,
        }

    def _lease(self, owner: str, now: float, lease_s: float) -> _Lease:
        lease = self._leases.get(owner)
        if lease is None:
            lease = self._leases[owner] = _Lease(now + lease_s)
        lease.deadline_s = max(lease.deadline_s, now + lease_s)
        return lease

    def _pin(self, page: HeldPage, lease: _Lease) -> None:
        if page.slot not in lease.pages:
            lease.pages[page.slot] = page
            page.n_pins += 1
            self._evictable.pop(page.key, None)

    def _unpin(self, page: HeldPage) -> None:
        page.n_pins -= 1
        if page.n_pins:
            return
        if page.dropped:
            self._free_slots.append(page.slot)
        else:
            self._evictable[page.key] = page

    def _end_lease(self, owner: str) -> int:
        lease = self._leases.pop(owner, None)
        if lease is None:
            return 0
        # last acquired first: the head of a context, on which the rest builds, stays longest
        for page in reversed(lease.pages.values()):
            self._unpin(page)
        self._free_slots += [write.page.slot for write in lease.writes.values()]
        return len(lease.pages)

    def _forget_if_empty(self, owner: str) -> None:
        lease = self._leases.get(owner)
        if lease is not None and not lease.pages and not lease.writes:
            del self._leases[owner]

    def _take_slot(self) -> int:
        if self._free_slots:
            slot = self._free_slots.pop()
            if self.arena.reserve(slot):
                return slot
            self._free_slots.insert(0, slot)  # tried last: others may have their memory already
        if self._evictable:
            _, page = self._evictable.popitem(last=False)
            del self._pages[page.key]
            self._counters["evictions"] += 1
            return page.slot
        self._counters["store_full"] += 1
        raise StoreFull(
            f"all {self.arena.n_slots} page slots are pinned or without memory "
            f"({len(self._pages)} pages held); raise store.capacity_bytes or run fewer rows"
        )

    def _count_duplicate(self, held: HeldPage, checksums: Checksums) -> None:
        same = np.array_equal(held.checksums, checksums)
        self._counters["duplicate_stores" if same else "mismatched_duplicates"] += 1
