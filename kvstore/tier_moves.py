"""Pages between arena and disk: what moves next, and what has become of a move. No I/O, no threads.

A move is begun and finished under the caller's lock and copied outside of it. A page on the move
can be read where it is; it changes its place only if nobody pinned it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.page_key import PageKey
from .page_table import HeldPage, PageTable


@dataclass(frozen=True, eq=False, slots=True)
class Move:
    """Copy a page from slot to slot. `demote`: it shall leave the arena; `back_up`: it stays."""

    page: HeldPage
    source: int
    target: int
    kind: Literal["demote", "back_up", "promote"]


class TierMoves:
    """high, low: shares of the arena's slots at which demoting begins and ends."""

    def __init__(self, table: PageTable, high: float, low: float, write_through: bool) -> None:
        self._table = table
        self._high = int(table.slots.n_arena * high)
        self._low = int(table.slots.n_arena * low)
        self._write_through = write_through
        self._demoting = False
        self._waiting: dict[PageKey, None] = {}  # to be backed up, in order

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def completed(self, page: HeldPage) -> None:
        """A new page is held."""
        in_arena = page.slot < self._table.slots.n_arena
        if self._write_through and self._table.slots.n_disk and in_arena:
            self._waiting[page.key] = None

    def next_down(self, now: float) -> Move | None:
        """The next copy from arena to disk; None if there is nothing to do now."""
        if not self._table.slots.n_disk:
            return None
        return self._next_backup(now) or self._next_demotion(now)

    def next_flush(self, now: float, keys: Sequence[PageKey], at: int) -> tuple[Move | None, int]:
        """The next copy of a page from keys[at:] into a free slot, and where to go on."""
        for i in range(at, len(keys)):
            page = self._table.pages.get(keys[i])
            if page is None or not self._can_back_up(page):
                continue
            slot = self._table.take_free_disk(now)
            return (self._begin(page, slot, "back_up") if slot is not None else None), i + 1
        return None, len(keys)

    def rising(self, keys: Iterable[PageKey], max_pages: int) -> list[PageKey]:
        """Pages that are worth copying up before they are pinned, as far as there is room."""
        n_arena = self._table.slots.n_arena
        found: list[PageKey] = []
        n_most = min(max_pages, self._high - self._n_used())
        for key in keys:
            if len(found) >= n_most:
                break
            page = self._table.pages.get(key)
            if page is not None and page.slot >= n_arena and not page.n_pins:
                found.append(key)
        return found

    def begin_up(self, key: PageKey) -> Move | None:
        """Copy a page of the disk to the arena, if it may and there is room."""
        page, slots = self._table.pages.get(key), self._table.slots
        if page is None or page.slot < slots.n_arena or page.n_pins or page.n_movers:
            return None
        if self._n_used() >= self._high:
            return None
        slot = slots.take_arena()
        return self._begin(page, slot, "promote") if slot is not None else None

    def finish(self, move: Move, copied: bool) -> None:
        """copied: the target has the page's bytes, checked."""
        page, table = move.page, self._table
        page.n_movers -= 1
        alone = not page.n_pins and not page.n_movers and not page.dropped
        if not copied or page.dropped:
            table.slots.give_back(move.target)
        elif move.kind == "promote":
            if alone:
                table.rise(page, move.target)
            else:
                table.slots.give_back(move.target)
        else:
            table.counters["disk_bytes_written"] += table.slots.geometry.page_nbytes
            table.add_backup(page, move.target)
            if move.kind == "demote" and alone:
                table.leave_arena(page)
        table.settle(page)

    def _begin(
        self, page: HeldPage, target: int, kind: Literal["demote", "back_up", "promote"]
    ) -> Move:
        page.n_movers += 1
        self._table.settle(page)
        return Move(page, page.slot, target, kind)

    def _can_back_up(self, page: HeldPage) -> bool:
        in_arena = page.slot < self._table.slots.n_arena
        return in_arena and page.backup is None and not page.n_movers

    def _next_backup(self, now: float) -> Move | None:
        while self._waiting:
            key = next(iter(self._waiting))
            page = self._table.pages.get(key)
            if page is None or page.backup is not None or page.slot >= self._table.slots.n_arena:
                del self._waiting[key]
                continue
            # else it waits: its bytes are being checked, or the disk takes none now
            if page.n_movers or (slot := self._table.take_disk(now)) is None:
                return None
            del self._waiting[key]
            return self._begin(page, slot, "back_up")
        return None

    def _next_demotion(self, now: float) -> Move | None:
        if self._write_through:
            return None  # pages with a backup leave when their slot is needed
        if self._n_used() > self._high:
            self._demoting = True
        while self._demoting:
            if self._n_used() <= self._low:
                self._demoting = False
                break
            key = self._table.order.next("leave")
            if key is None:
                break
            page = self._table.pages[key]
            if page.backup is not None:
                self._table.leave_arena(page)
                continue
            slot = self._table.take_disk(now)
            if slot is None:
                break
            return self._begin(page, slot, "demote")
        return None

    def _n_used(self) -> int:
        return self._table.slots.n_arena - self._table.slots.n_free_arena
