"""The slots of both tiers under one numbering: those of the arena first, then those of the disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from .arena import Arena
from .disk import DiskTier
from .page import Bytes, PageGeometry

Tier = Literal["arena", "disk"]


class _FreeSlots:
    """Numbers 0 … n-1 of which some are taken; those never used cost nothing."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._fresh = 0  # from here on none was ever used
        self._back: list[int] = []

    def __len__(self) -> int:
        return len(self._back) + self._n - self._fresh

    def occupy(self, slots: Iterable[int]) -> None:
        """These are in use from the start."""
        used = set(slots)
        self._fresh = max(used, default=-1) + 1
        self._back = [slot for slot in reversed(range(self._fresh)) if slot not in used]

    def pop(self) -> int | None:
        if self._back:
            return self._back.pop()
        if self._fresh == self._n:
            return None
        self._fresh += 1
        return self._fresh - 1

    def push(self, slot: int) -> None:
        self._back.append(slot)

    def push_last(self, slot: int) -> None:
        """To be tried after all others that came back."""
        self._back.insert(0, slot)


class PageSlots:
    """Not thread-safe, except for `read` and `write` of slots that the caller holds."""

    def __init__(self, arena: Arena, disk: DiskTier | None = None) -> None:
        self.arena = arena
        self.disk = disk
        self.n_arena = arena.n_slots
        self.n_disk = disk.n_slots if disk is not None else 0
        self._free_arena = _FreeSlots(self.n_arena)
        self._free_disk = _FreeSlots(self.n_disk)

    @property
    def geometry(self) -> PageGeometry:
        return self.arena.geometry

    @property
    def n_free_arena(self) -> int:
        return len(self._free_arena)

    @property
    def n_free_disk(self) -> int:
        return len(self._free_disk)

    def tier(self, slot: int) -> Tier:
        return "arena" if slot < self.n_arena else "disk"

    def take_arena(self) -> int | None:
        """A free slot that has memory."""
        slot = self._free_arena.pop()
        if slot is None or self.arena.reserve(slot):
            return slot
        self._free_arena.push_last(slot)  # others may have their memory already
        return None

    def take_disk(self) -> int | None:
        """A free slot that has space. Raises OSError if the disk fails."""
        if self.disk is None or (index := self._free_disk.pop()) is None:
            return None
        has_space = False
        try:
            has_space = self.disk.reserve(index)
        finally:
            if not has_space:
                self._free_disk.push_last(index)
        return self.n_arena + index if has_space else None

    def occupy_disk(self, slots: Iterable[int]) -> None:
        """Slots (of this numbering) that hold pages from before."""
        self._free_disk.occupy(slot - self.n_arena for slot in slots)

    def give_back(self, slot: int) -> None:
        if slot < self.n_arena:
            self._free_arena.push(slot)
        else:
            self._free_disk.push(slot - self.n_arena)

    def read(self, slot: int) -> Bytes:
        """uint8 [page_nbytes]: of the arena a view, of the disk a copy. Raises OSError."""
        if slot < self.n_arena:
            view: Bytes = self.arena.slots[slot]
            return view
        page = np.empty(self.geometry.page_nbytes, np.uint8)
        self._disk().read_into(slot - self.n_arena, page)
        return page

    def copy(self, source: int, target: int) -> None:
        """The bytes of one slot into another. Raises OSError."""
        if target < self.n_arena and source >= self.n_arena:
            self._disk().read_into(source - self.n_arena, self.arena.slots[target])
        else:
            self.write(target, self.read(source))

    def write(self, slot: int, page: Bytes) -> None:
        """page: uint8 [page_nbytes]. Raises OSError."""
        if slot < self.n_arena:
            np.copyto(self.arena.slots[slot], page)
        else:
            self._disk().write(slot - self.n_arena, page)

    def _disk(self) -> DiskTier:
        assert self.disk is not None, "a slot of the disk where there is none"
        return self.disk
