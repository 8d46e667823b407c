"""The section `store`: copies, repair, the way of pages, tiers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .section import Section


class StoreConfig(Section):
    """The KV store pool."""

    count: int = Field(default=2, gt=0)
    """Store shards."""
    replicas: int = Field(default=2, gt=0)
    """Copies of each page, on different stores; in different zones and on different nodes if possible."""
    zone: str = ""
    """Where the stores are, as far as one failure reaches. A Ray node's own label
    (`topology.kubernetes.io/zone` or `ray.io/availability-zone`) wins."""
    repair_delay_s: float = Field(default=5.0, ge=0)
    """How long a lost store may take to come back before its pages are copied elsewhere."""
    repair_bytes_per_s: int = Field(default=128 << 20, gt=0)
    """Bytes of pages that each store may copy to others in a second, to repair or to move them."""
    capacity_bytes: int = Field(default=4 << 30, gt=0)
    """Bytes of page slots per store shard."""
    lease_s: float = Field(default=600.0, gt=0)
    """Longest time a page stays pinned for an owner that does not renew."""
    timeout_s: float = Field(default=20.0, gt=0)
    """Deadline of one call to a store, and of one batch of pages from several."""
    hedge: bool = True
    """Ask a replica as well when a store falls silent for longer than it usually does; at most one
    request in ten."""
    write_behind_bytes: int = Field(default=256 << 20, gt=0)
    """Pages of a worker whose store may be under way, in bytes; more make prefill wait."""
    prefetch_bytes: int = Field(default=64 << 20, ge=0)
    """Pages that a worker may fetch for rows that wait to be admitted, in bytes; 0 fetches none."""
    arena_dir: str = "/dev/shm"
    """Directory of the shared-memory arena files."""
    disk_dir: str | None = None
    """Directory of the disk tier's files (`<store id>.pages`, `.index`); none keeps pages in memory
    only. A store that restarts finds the pages of its files again."""
    disk_bytes: int = Field(default=0, ge=0)
    """Bytes of page slots on disk per store shard; needs `disk_dir`."""
    disk_write: Literal["demote", "through"] = "demote"
    """`demote`: pages go to disk when the arena is above its high watermark. `through`: every page
    is also written to disk, behind, so that a restart finds all of them."""
    flush_s: float = Field(default=2.0, ge=0)
    """On a clean end, how long pages of the arena may still be written to free slots on disk."""
    high_watermark: float = Field(default=0.95, gt=0, le=1)
    """Share of the arena's slots in use above which unpinned pages move to disk."""
    low_watermark: float = Field(default=0.85, ge=0, lt=1)
    """Share of the arena's slots in use at which moving to disk stops."""
    promote_pages: int = Field(default=256, ge=0)
    """Pages that one request may copy from disk to the arena before they are read; the others are
    read where they lie."""
    scrub_bytes_per_s: int = Field(default=64 << 20, ge=0)
    """Rate at which held pages are checked in the background; 0 turns it off."""
    scrub_pause_s: float = Field(default=600.0, gt=0)
    """Pause between two rounds of the background check."""
    faults: bool = False
    """For tests: stores take the request `corrupt`, which flips bytes of a page they hold."""

    @model_validator(mode="after")
    def _check_tiers(self) -> StoreConfig:
        if self.disk_dir is None:
            for name, wants in (("disk_bytes", self.disk_bytes), ("disk_write", self.disk_write)):
                if wants not in (0, "demote"):
                    raise ValueError(f"store.{name} ({wants}) needs store.disk_dir")
        elif not self.disk_bytes:
            raise ValueError(f"store.disk_dir ({self.disk_dir}) needs store.disk_bytes")
        if self.low_watermark >= self.high_watermark:
            raise ValueError(
                f"store.low_watermark ({self.low_watermark}) must be below store.high_watermark "
                f"({self.high_watermark})"
            )
        return self
