"""One memory-mapped file cut into page slots; slot i starts at byte i * page_nbytes.

A store creates its file under a new name each time it starts, so the file of a dead store is never
overwritten while workers still read it: their mapping outlives the name. The owner keeps the file
locked for as long as it lives; the lock dies with it, which is how `sweep` knows what to remove
(process ids are reused and mean nothing in another container).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from pathlib import Path

import numpy as np

from ..core.errors import ConfigError, FailedPrecondition
from .page import Bytes, PageGeometry

_PREFIX = "longreach-arena"


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def file_stem(name: str) -> str:
    """A store's id as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def sweep(arena_dir: str | Path) -> list[str]:
    """Removes arena files whose owner is dead. Returns their names."""
    removed = []
    for path in Path(arena_dir).glob(f"{_PREFIX}.*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _try_lock(fd):
                    path.unlink()
                    removed.append(path.name)
            finally:
                os.close(fd)
    return removed


class Arena:
    """Page slots in a mapped file. `slots`: uint8 [n_slots, page_nbytes]."""

    def __init__(self, path: Path, geometry: PageGeometry, fd: int, slots: Bytes) -> None:
        self.path = path
        self.geometry = geometry
        self.slots = slots
        self._fd = fd
        self._owned = fd >= 0
        self._reserved = np.zeros(len(slots), bool)

    @property
    def n_slots(self) -> int:
        return len(self.slots)

    @classmethod
    def create(
        cls, arena_dir: str | Path, geometry: PageGeometry, capacity_bytes: int, owner: str
    ) -> Arena:
        """A new file of capacity_bytes // page_nbytes slots; memory is taken as slots are used.

        Raises ConfigError if not even one page fits or the directory cannot be written.
        """
        n_slots = capacity_bytes // geometry.page_nbytes
        if n_slots < 1:
            raise ConfigError(
                f"store.capacity_bytes ({capacity_bytes}) holds no page of "
                f"{geometry.page_nbytes} bytes",
                path="store.capacity_bytes",
            )
        name = f"{_PREFIX}.{file_stem(owner)[:64]}.{os.getpid()}.{secrets.token_hex(4)}"
        path = Path(arena_dir) / name
        # made under a temporary name and locked before it gets its own, so that no sweep of
        # another process finds it unlocked
        hidden = path.with_name(f".{name}")
        try:
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            _try_lock(fd)
            os.ftruncate(fd, n_slots * geometry.page_nbytes)
            os.rename(hidden, path)
        except OSError as exc:
            raise ConfigError(
                f"store.arena_dir {str(arena_dir)!r}: {exc}", path="store.arena_dir"
            ) from exc
        mapped = mmap.mmap(fd, n_slots * geometry.page_nbytes)
        return cls(path, geometry, fd, _as_slots(mapped, n_slots, geometry))

    @classmethod
    def open(
        cls, path: str | Path, geometry: PageGeometry, n_slots: int, readonly: bool = False
    ) -> Arena:
        """Maps a file that another store owns. Raises FailedPrecondition if it is not there or
        has another size (then it belongs to another machine or incarnation)."""
        n_bytes = n_slots * geometry.page_nbytes
        try:
            fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_NOFOLLOW)
            try:
                size = os.fstat(fd).st_size
                if size != n_bytes:
                    raise FailedPrecondition(f"{path} has {size} bytes, not {n_bytes}")
                access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
                mapped = mmap.mmap(fd, n_bytes, access=access)
            finally:
                os.close(fd)
        except OSError as exc:
            raise FailedPrecondition(f"cannot map {path}: {exc}") from exc
        return cls(Path(path), geometry, -1, _as_slots(mapped, n_slots, geometry))

    def reserve(self, slot: int) -> bool:
        """Takes memory for a slot; False if there is none left. Without this the first write to a
        full tmpfs would kill the process by SIGBUS."""
        if self._reserved[slot] or not hasattr(os, "posix_fallocate"):
            return True
        n_bytes = self.geometry.page_nbytes
        try:
            os.posix_fallocate(self._fd, slot * n_bytes, n_bytes)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.ENOMEM):
                return False
            raise
        self._reserved[slot] = True
        return True

    def close(self) -> None:
        """The owner removes the name and the lock. Mappings, ours and others', stay readable."""
        if self._owned:
            self._owned = False
            self.path.unlink(missing_ok=True)
            os.close(self._fd)


def _as_slots(mapped: mmap.mmap, n_slots: int, geometry: PageGeometry) -> Bytes:
    return np.frombuffer(mapped, np.uint8).reshape(n_slots, geometry.page_nbytes)
