"""What the requests of a store work on: its pages, their lock, and the threads that move and check them."""

from __future__ import annotations

import threading
from pathlib import Path

from ..core.clock import Clock
from ..core.store_config import StoreConfig
from .arena import Arena, file_stem, sweep
from .disk import LOCK_TIMEOUT_S, DiskTier
from .disk_index import DiskIndex
from .mover import Mover
from .page import PageGeometry
from .scrubber import Scrubber
from .shard import StoreShard


class StoreCore:
    """`lock` guards the shard. Hashing and copying page bytes happen outside of it: the slot of a pinned
    page does not change, and an open write belongs to its owner."""

    def __init__(
        self,
        store_id: str,
        arena_dir: str,
        geometry: PageGeometry,
        capacity_bytes: int,
        config: StoreConfig,
        clock: Clock,
    ) -> None:
        """Raises ConfigError for sizes and directories that cannot be, FailedPrecondition if the disk
        tier is another process's or another model's."""
        self.store_id = store_id
        self.geometry = geometry
        self.config = config
        self.takes_pages = True
        self._closed = False
        self._clock = clock
        sweep(arena_dir)
        self.arena = Arena.create(arena_dir, geometry, capacity_bytes, store_id)
        self.disk: DiskTier | None = None
        index: DiskIndex | None = None
        try:
            if config.disk_dir is not None:
                # absolute: workers are told the path, and may live in another directory
                stem = Path(config.disk_dir).expanduser().absolute() / file_stem(store_id)
                self.disk, index = _open_disk(stem, geometry, config.disk_bytes)
        except BaseException:
            self.arena.close()
            raise
        self.shard = StoreShard(
            self.arena,
            self.disk,
            index,
            high=config.high_watermark,
            low=config.low_watermark,
            write_through=config.disk_write == "through",
        )
        self.lock = threading.Lock()
        self.mover = None if index is None else Mover(self.shard, index, self.lock, clock)
        self.scrubber = Scrubber(
            self.shard, self.lock, config.scrub_bytes_per_s, config.scrub_pause_s
        )

    @property
    def incarnation(self) -> str:
        """Changes with every start: slots named by another incarnation mean nothing here."""
        return self.arena.path.name

    @property
    def capacity_bytes(self) -> int:
        """Of the slots of both tiers."""
        slots = self.shard.slots
        return (slots.n_arena + slots.n_disk) * self.geometry.page_nbytes

    def now(self) -> float:
        return self._clock.monotonic_s()

    def wake_mover(self) -> None:
        """Pages came, or room went."""
        if self.mover is not None:
            self.mover.wake()

    def close(self) -> None:
        """Keeps what it can of the arena on disk (store.flush_s) and removes the arena's name."""
        if self._closed:
            return
        self._closed, self.takes_pages = True, False
        self.scrubber.close()
        if self.mover is not None:
            self.mover.close(self.config.flush_s)
        if self.disk is not None:
            self.disk.close()
        self.arena.close()


def _open_disk(stem: Path, geometry: PageGeometry, n_bytes: int) -> tuple[DiskTier, DiskIndex]:
    """The files of the disk tier, locked. Those of another model's pages are left as they are."""
    disk = DiskTier.open(
        stem.with_suffix(".pages"), geometry, n_bytes, lock_timeout_s=LOCK_TIMEOUT_S
    )
    try:
        index = DiskIndex(stem.with_suffix(".index"), geometry)
        disk.fit()
    except BaseException:
        disk.close()
        raise
    return disk, index
