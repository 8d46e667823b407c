"""The memories a worker reads pages from: mapped arenas and disk files of stores on its node, and private
slots for pages that came from elsewhere."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np

from ..core.page_key import PageKey
from .page import Bytes, Checksums, PageGeometry

PRIVATE_SLOTS = 256
"""Page slots per private memory; memory is only taken as slots are used."""
GONE: Bytes = np.zeros(0, np.uint8)
"""In place of a memory that was given back."""


@dataclass(frozen=True, eq=False, slots=True)
class PageHandle:
    """Where a worker finds a page that it holds. Valid until its row is released.

    Leaf i of the page is row `first_leaf_row + i` of `memories[memory]` seen as
    [n_leaf_rows, leaf_nbytes]. checksums: uint64 [n_leaves].
    """

    key: PageKey
    memory: int
    first_leaf_row: int
    checksums: Checksums
    store_id: str


class ClientMemory:
    """`memories`: uint8 [n_bytes] arrays, only ever appended to; `GONE` stands for those of a store that
    died, once nothing points into them. Thread-safe."""

    def __init__(self, geometry: PageGeometry) -> None:
        self.geometry = geometry
        self.memories: list[Bytes] = []
        self._mapped: dict[str, int] = {}
        self._store_of: dict[int, str] = {}
        self._retired: dict[int, float] = {}
        """Of stores that are gone: since when nothing has been known to point into them."""
        self._private: list[int] = []
        self._free: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def index_of(self, name: str) -> int | None:
        """Index of the memory that was added under this name."""
        return self._mapped.get(name)

    def add(self, name: str, slots: Bytes, store_id: str) -> int:
        """A mapped arena or disk file, uint8 [n_slots, page_nbytes]. Returns its index. name: of the
        store's incarnation and which of the two it is."""
        with self._lock:
            if name not in self._mapped:
                self.memories.append(slots.reshape(-1))
                self._mapped[name] = len(self.memories) - 1
                self._store_of[self._mapped[name]] = store_id
            return self._mapped[name]

    def retire(self, store_id: str, kept: Container[int | None] = ()) -> None:
        """The store is gone, or has other memories now: `kept`. A dead store's arena stays in memory for as
        long as someone maps it, so `sweep` gives it back."""
        with self._lock:
            for index, owner in self._store_of.items():
                if owner != store_id:
                    continue
                if index in kept:
                    self._retired.pop(index, None)
                else:
                    self._retired.setdefault(index, float("inf"))

    def sweep(self, in_use: Callable[[], Container[int]], now_s: float, grace_s: float) -> None:
        """Gives back retired memories that no handle has pointed into for grace_s, which is longer than a
        call takes that got its pages before and has made no handle yet. in_use: looks through all handles,
        so it is called only if a memory is retired."""
        if not self._retired:
            return
        used = in_use()
        with self._lock:
            for index, since_s in list(self._retired.items()):
                if index in used:
                    self._retired[index] = float("inf")
                elif since_s > now_s:
                    self._retired[index] = now_s
                elif now_s - since_s >= grace_s:
                    self.memories[index] = GONE
                    del self._retired[index], self._store_of[index]
            self._mapped = {name: i for name, i in self._mapped.items() if i in self._store_of}

    def page(self, memory: int, slot: int) -> Bytes:
        """uint8 [page_nbytes], a view."""
        n_bytes = self.geometry.page_nbytes
        return self.memories[memory][slot * n_bytes : (slot + 1) * n_bytes]

    def page_of(self, handle: PageHandle) -> Bytes:
        """The page of a handle: uint8 [page_nbytes], a view."""
        return self.page(handle.memory, self.slot_of(handle))

    def handle(
        self, key: PageKey, memory: int, slot: int, checksums: Checksums, store_id: str
    ) -> PageHandle:
        return PageHandle(key, memory, slot * self.geometry.n_leaves, checksums, store_id)

    def slot_of(self, handle: PageHandle) -> int:
        return handle.first_leaf_row // self.geometry.n_leaves

    def is_private(self, memory: int) -> bool:
        return memory in self._private

    def take_private(self) -> tuple[int, int]:
        """(memory, slot) of a free private slot; a further private memory is made when needed."""
        with self._lock:
            if not self._free:
                mapped = mmap.mmap(-1, PRIVATE_SLOTS * self.geometry.page_nbytes)
                with contextlib.suppress(OSError):  # first use costs more than the copy otherwise
                    mapped.madvise(mmap.MADV_HUGEPAGE)
                self.memories.append(np.frombuffer(mapped, np.uint8))
                memory = len(self.memories) - 1
                self._private.append(memory)
                self._free = [(memory, slot) for slot in reversed(range(PRIVATE_SLOTS))]
            return self._free.pop()

    def give_back_private(self, memory: int, slot: int) -> None:
        with self._lock:
            self._free.append((memory, slot))

    def n_private_used(self) -> int:
        with self._lock:
            return len(self._private) * PRIVATE_SLOTS - len(self._free)
