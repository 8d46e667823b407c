"""What a store says of itself when it is greeted: where its slots can be read and written in place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import FailedPrecondition
from .arena import Arena
from .client_memory import ClientMemory
from .disk import map_disk, write_slot
from .page import Bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Greeting:
    """memory: index of the mapped arena, None if the store is read over the wire. Slots of the arena
    come first in the store's numbering, those of the disk from n_slots on."""

    incarnation: str
    memory: int | None = None
    n_slots: int = 0
    disk_memory: int | None = None
    disk_path: str = ""

    def place(self, slot: int) -> tuple[int | None, int]:
        """Memory, and slot in it, of a slot as the store numbers it."""
        if self.memory is not None and slot >= self.n_slots:
            return self.disk_memory, slot - self.n_slots
        return self.memory, slot

    def fill(self, memory: ClientMemory, slot: int, page: Bytes) -> None:
        """Writes a page into a slot that the store gave. Raises OSError if its disk fails."""
        assert self.memory is not None
        if slot < self.n_slots:
            np.copyto(memory.page(self.memory, slot), page)
        else:
            write_slot(self.disk_path, slot - self.n_slots, page)


def map_store(store_id: str, header: dict[str, Any], memory: ClientMemory) -> Greeting:
    """header: a store's answer to `hello`; it is on this node and of this geometry."""
    incarnation, n_slots = str(header["incarnation"]), int(header["n_slots"])
    disk_path, disk_memory = str(header.get("disk") or ""), None
    arena_memory = memory.index_of(incarnation)
    try:
        if arena_memory is None:
            arena = Arena.open(header["arena"], memory.geometry, n_slots)
            arena_memory = memory.add(incarnation, arena.slots, store_id)
        if disk_path:
            disk_memory = memory.index_of(name := f"{incarnation} {disk_path}")
            if disk_memory is None:
                disk = map_disk(disk_path, memory.geometry, int(header["disk_slots"]))
                disk_memory = memory.add(name, disk, store_id)
    except FailedPrecondition as exc:
        # the same node by name, but another mount of a directory (a container)
        logger.warning("store %s is read over the wire: %s", store_id, exc.message)
        return Greeting(incarnation)
    memory.retire(store_id, kept=(arena_memory, disk_memory))
    return Greeting(incarnation, arena_memory, n_slots, disk_memory, disk_path)
