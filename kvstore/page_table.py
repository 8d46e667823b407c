"""Which pages a store holds, in which slots, and who makes room. No threads, no clock.

A page is read at one place, its `slot`; a page of the arena may have a second copy on disk, its
`backup`. A slot is never given out while its page is pinned or being moved or checked, even if the
page was dropped meanwhile.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from ..core.errors import StoreFull
from ..core.page_key import PageKey, RecipeFingerprint
from .disk_index import DiskIndex, IndexRow
from .eviction import Choice, EvictionOrder, Where
from .page import Checksums
from .page_slots import PageSlots

logger = logging.getLogger(__name__)

BadReason = Literal["corrupt", "unreadable"]

DISK_PAUSE_S = 5.0
"""After an error the disk takes no new pages for so long."""
COUNTERS = (
    "pages_stored",
    "pages_adopted",
    "duplicate_stores",
    "mismatched_duplicates",
    "evictions",
    "promotions",
    "demotions",
    "spilled",
    "hits_arena",
    "hits_disk",
    "misses",
    "corrupt_detected",
    "corrupt_arena",
    "corrupt_disk",
    "disk_errors",
    "disk_bytes_written",
    "leases_expired",
    "store_full",
)


@dataclass(eq=False, slots=True)
class HeldPage:
    """A page in a slot. `checksums`: uint64 [n_leaves]."""

    key: PageKey
    parent_key: PageKey
    recipe: RecipeFingerprint
    checksums: Checksums
    slot: int
    backup: int | None = None
    n_pins: int = 0
    n_movers: int = 0
    """Moves and checks of its bytes under way; they do not bar readers."""
    dropped: bool = False
    unchecked: bool = False
    """Found on disk at the start and not read since."""


class PageTable:
    """Not thread-safe. write_through: backups serve a restart and are given up last."""

    def __init__(
        self, slots: PageSlots, index: DiskIndex | None = None, write_through: bool = False
    ) -> None:
        self.slots = slots
        self.pages: dict[PageKey, HeldPage] = {}
        self.order = EvictionOrder(slots.n_arena + slots.n_disk)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._index = index
        self._write_through = write_through
        self._backups: dict[int, HeldPage] = {}  # by slot, oldest first
        self._disk_pause_until_s = float("-inf")
        if index is not None:
            self._adopt(index)

    def hold(self, page: HeldPage) -> None:
        """A page whose bytes are in its slot is held from now on."""
        self.pages[page.key] = page
        self.order.add(page.key, page.parent_key)
        if page.slot >= self.slots.n_arena:
            self._index_put(page.slot, page)
        self.settle(page)

    def settle(self, page: HeldPage) -> None:
        """To be called when the page's pins, movers or places have changed."""
        if not page.dropped:
            self.order.place(page.key, self._where(page))
            return
        if not page.n_movers and page.backup is not None:
            self.slots.give_back(page.backup)
            page.backup = None
        if not page.n_movers and not page.n_pins:
            self.slots.give_back(page.slot)

    def drop(self, key: PageKey) -> bool:
        """Forgets a page; its slots are free when nobody uses them any more."""
        page = self.pages.pop(key, None)
        if page is None:
            return False
        page.dropped = True
        self.order.remove(key)
        if page.slot >= self.slots.n_arena:
            self._index_remove(page.slot)
        if page.backup is not None:
            del self._backups[page.backup]
            self._index_remove(page.backup)
        self.settle(page)
        return True

    def add_backup(self, page: HeldPage, slot: int) -> None:
        """A page of the arena has a copy on disk now."""
        page.backup = slot
        self._backups[slot] = page
        self._index_put(slot, page)

    def rise(self, page: HeldPage, slot: int) -> None:
        """A page of the disk has a copy in the arena now, and is read there."""
        page.backup, page.slot, page.unchecked = page.slot, slot, False
        self._backups[page.backup] = page
        self.counters["promotions"] += 1

    def leave_arena(self, page: HeldPage) -> None:
        """A page that nobody uses goes on living in its backup."""
        assert page.backup is not None
        assert not page.n_pins
        assert not page.n_movers
        self.slots.give_back(page.slot)
        del self._backups[page.backup]
        page.slot, page.backup = page.backup, None
        self.counters["demotions"] += 1
        self.settle(page)

    def bad_copy(self, page: HeldPage, slot: int, reason: BadReason = "corrupt") -> None:
        """One of a page's copies has wrong bytes or cannot be read. A backup takes the place of a bad
        page, to be checked when it is used."""
        if page.dropped or slot not in (page.slot, page.backup):
            return
        if reason == "corrupt":
            self.counters["corrupt_detected"] += 1
            self.counters[f"corrupt_{self.slots.tier(slot)}"] += 1
        else:
            self.counters["disk_errors"] += 1
        backup = page.backup
        if slot == backup:
            self._give_up_backup(page)
            return
        if backup is not None:
            del self._backups[backup]
            page.backup = None
        self.drop(page.key)
        if backup is not None:
            rest = (page.parent_key, page.recipe, page.checksums)
            self.hold(HeldPage(page.key, *rest, backup, unchecked=True))

    def slot_for_new(self, now: float) -> int:
        """A free arena slot; else one that its page can leave without loss; else a slot on disk;
        else the slot of the page that is worth least. Raises StoreFull if all are pinned."""
        slot = self.slots.take_arena()
        if slot is None and (key := self.order.next("free")) is not None:
            self.leave_arena(self.pages[key])
            slot = self.slots.take_arena()
        if slot is None and (slot := self.take_disk(now)) is not None:
            self.counters["spilled"] += 1
        # the last resort of the two leaves pages on disk without the ones they build on
        if slot is None and (self._evict("lose_arena") or self._evict("leave")):
            slot = self.slots.take_arena()
        if slot is None:
            self.counters["store_full"] += 1
            of_disk = f" and {self.slots.n_disk} on disk" if self.slots.n_disk else ""
            raise StoreFull(
                f"all {self.slots.n_arena} page slots{of_disk} are pinned or without memory "
                f"({len(self.pages)} pages held); raise store.capacity_bytes"
                f"{' or store.disk_bytes' if of_disk else ''} or run fewer rows"
            )
        return slot

    def take_disk(self, now: float) -> int | None:
        """A free slot on disk, made free if need be; None if there is none or the disk fails."""
        if not self.slots.n_disk or now < self._disk_pause_until_s:
            return None
        try:
            slot = self.slots.take_disk()
            if slot is None and self._make_room_on_disk():
                slot = self.slots.take_disk()
            return slot
        except OSError as exc:
            self.disk_failed(now, exc)
            return None

    def take_free_disk(self, now: float) -> int | None:
        """A slot on disk for which no page has to go."""
        try:
            return self.slots.take_disk()
        except OSError as exc:
            self.disk_failed(now, exc)
            return None

    def disk_failed(self, now: float, exc: OSError) -> None:
        logger.warning("disk tier takes no pages for %.0f s: %s", DISK_PAUSE_S, exc)
        self.counters["disk_errors"] += 1
        self._disk_pause_until_s = now + DISK_PAUSE_S

    def _where(self, page: HeldPage) -> Where:
        if page.n_pins or page.n_movers:
            return "pinned"
        if page.slot >= self.slots.n_arena:
            return "disk"
        return "arena" if page.backup is None else "backed"

    def _make_room_on_disk(self) -> bool:
        if self._write_through:
            return self._evict("lose_disk") or self._reclaim_backup()
        return self._reclaim_backup() or self._evict("lose_disk")

    def _reclaim_backup(self) -> bool:
        for page in self._backups.values():
            if not page.n_movers:
                self._give_up_backup(page)
                return True
        return False

    def _evict(self, choice: Choice) -> bool:
        key = self.order.next(choice)
        if key is None:
            return False
        self.counters["evictions"] += 1
        return self.drop(key)

    def _give_up_backup(self, page: HeldPage) -> None:
        assert page.backup is not None
        del self._backups[page.backup]
        self._index_remove(page.backup)
        self.slots.give_back(page.backup)
        page.backup = None
        self.settle(page)

    def _index_put(self, slot: int, page: HeldPage) -> None:
        if self._index is not None:
            at = slot - self.slots.n_arena
            self._index.put(IndexRow(at, page.key, page.parent_key, page.recipe, page.checksums))

    def _index_remove(self, slot: int) -> None:
        if self._index is not None:
            self._index.remove(slot - self.slots.n_arena)

    def _adopt(self, index: DiskIndex) -> None:
        """Pages of an earlier process. Their bytes are checked when they are first used."""
        n_arena = self.slots.n_arena
        used = []
        for row in index.rows():
            if row.slot >= self.slots.n_disk or row.key in self.pages:
                index.remove(row.slot)
                continue
            content = (row.key, row.parent_key, row.recipe, row.checksums)
            page = HeldPage(*content, n_arena + row.slot, unchecked=True)
            used.append(page.slot)
            self.pages[page.key] = page
            self.order.add(page.key, page.parent_key)
            self.settle(page)
        self.slots.occupy_disk(used)
        self.counters["pages_adopted"] = len(used)
