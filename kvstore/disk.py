"""One regular file of page slots: slot i at byte i * page_nbytes, sparse until slots are used.

Readers on the node map it, writers there use `write_slot`: an I/O error of a write is an exception
then, and no write can hit the mapping. Space is taken slot by slot before a slot is given out, so
that a full disk is an error and not a signal in the middle of a copy. The owner keeps the file
locked for as long as it lives.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from ..core.errors import ConfigError, FailedPrecondition
from .page import Bytes, PageGeometry

LOCK_TIMEOUT_S = 5.0
"""The process before this one may still be ending."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAP_NORESERVE = 0x4000


class DiskHook(Protocol):
    """For fault injection: may sleep, or raise OSError."""

    def before_write(self, slot: int) -> None: ...

    def before_read(self, slot: int) -> None: ...


class DiskTier:
    """The slots of one store's file, as its owner uses them."""

    def __init__(self, path: Path, geometry: PageGeometry, n_slots: int, fd: int) -> None:
        self.path = path
        self.geometry = geometry
        self.n_slots = n_slots
        self.hook: DiskHook | None = None
        self._fd = fd
        self._has_space = np.zeros(n_slots, bool)

    @classmethod
    def open(
        cls, path: Path, geometry: PageGeometry, disk_bytes: int, lock_timeout_s: float
    ) -> DiskTier:
        """The file, made if need be and locked. Its length is left to `fit`: whoever finds that it is
        another model's leaves it as it was.

        Raises ConfigError if not even one page fits or the directory cannot be written,
        FailedPrecondition if another process has the file for longer than lock_timeout_s.
        """
        n_slots = disk_bytes // geometry.page_nbytes
        if n_slots < 1:
            raise ConfigError(
                f"store.disk_bytes ({disk_bytes}) holds no page of {geometry.page_nbytes} bytes",
                path="store.disk_bytes",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(
                f"store.disk_dir {str(path.parent)!r}: {exc}", path="store.disk_dir"
            ) from exc
        try:
            _lock(fd, path, lock_timeout_s)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, geometry, n_slots, fd)

    def fit(self) -> None:
        """Makes the file as long as its slots, without taking space. What a truncated file has lost
        reads as zeros then, which no checksum allows. Raises ConfigError."""
        try:
            # workers that mapped a longer file belong to another configuration and have ended
            os.ftruncate(self._fd, self.n_slots * self.geometry.page_nbytes)
        except OSError as exc:
            raise ConfigError(f"store.disk_dir: {self.path}: {exc}", path="store.disk_dir") from exc

    def reserve(self, slot: int) -> bool:
        """Takes space for a slot; False if the disk is full. Raises OSError if it fails."""
        if self._has_space[slot]:
            return True
        n_bytes = self.geometry.page_nbytes
        try:
            if self.hook is not None:
                self.hook.before_write(slot)
            os.posix_fallocate(self._fd, slot * n_bytes, n_bytes)
        except OSError as exc:
            if exc.errno in _FULL:
                return False
            raise
        self._has_space[slot] = True
        return True

    def write(self, slot: int, page: Bytes) -> None:
        """page: uint8 [page_nbytes]. Raises OSError."""
        if self.hook is not None:
            self.hook.before_write(slot)
        _write(self._fd, slot, page)

    def read_into(self, slot: int, out: Bytes) -> None:
        """Not through a mapping: there an error of the disk would end the process.

        out: uint8 [page_nbytes]. Raises OSError.
        """
        if self.hook is not None:
            self.hook.before_read(slot)
        n_read, at = 0, slot * out.nbytes
        while n_read < out.nbytes:
            n = os.preadv(self._fd, [out.data[n_read:]], at + n_read)
            if not n:
                raise OSError(errno.EIO, f"{self.path} ends at byte {at + n_read}")
            n_read += n

    def close(self) -> None:
        """Gives up the lock; the file stays. Mappings of others stay readable."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def map_disk(path: str | Path, geometry: PageGeometry, n_slots: int) -> Bytes:
    """A store's file as another process of its node reads it: uint8 [n_slots, page_nbytes].

    Raises FailedPrecondition if it is not there or has another size.
    """
    n_bytes = n_slots * geometry.page_nbytes
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size != n_bytes:
                raise FailedPrecondition(f"{path} has {size} bytes, not {n_bytes}")
            # private and writable, not read-only: tensor libraries refuse or warn of memory that
            # they could not write. A stray write would stay in this process; nobody makes one
            mapped = mmap.mmap(fd, n_bytes, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
        finally:
            os.close(fd)
    except OSError as exc:
        raise FailedPrecondition(f"cannot map {path}: {exc}") from exc
    return np.frombuffer(mapped, np.uint8).reshape(n_slots, geometry.page_nbytes)


def write_slot(path: str | Path, slot: int, page: Bytes) -> None:
    """A writer on the node fills the slot that the store gave it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _write(fd, slot, page)
    finally:
        os.close(fd)


def _write(fd: int, slot: int, page: Bytes) -> None:
    n_written, at = 0, slot * page.nbytes
    while n_written < page.nbytes:
        n_written += os.pwrite(fd, page.data[n_written:], at + n_written)


def _lock(fd: int, path: Path, timeout_s: float) -> None:
    def try_lock() -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    locking = Retrying(
        retry=retry_if_result(lambda locked: not locked),
        stop=stop_after_delay(timeout_s),
        wait=wait_fixed(0.1),
    )
    try:
        locking(try_lock)
    except RetryError:
        raise FailedPrecondition(
            f"{path} belongs to another store process that is alive; end it, or give this store "
            "another store.disk_dir"
        ) from None
