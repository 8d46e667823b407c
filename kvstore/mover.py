"""Moves pages between arena and disk, in a thread of the store, and writes the disk's index behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager

from ..core.clock import Clock
from ..core.page_key import PageKey
from .disk_index import DiskIndex
from .page_checks import BadCopy, read_checked
from .shard import StoreShard
from .tier_moves import Move

logger = logging.getLogger(__name__)

IDLE_S = 0.5
INDEX_EVERY_S = 0.1
"""Changes of the index are gathered for so long."""
CLOSE_TIMEOUT_S = 10.0


class Mover:
    """lock guards the shard; pages are copied outside of it. Thread-safe."""

    def __init__(
        self,
        shard: StoreShard,
        index: DiskIndex,
        lock: AbstractContextManager[bool],
        clock: Clock,
    ) -> None:
        self._shard = shard
        self._index = index
        self._lock = lock
        self._clock = clock
        self._index_at_s = 0.0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="page-mover", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be something to move."""
        self._wake.set()

    def promote(self, keys: Iterable[PageKey], max_pages: int) -> int:
        """Copies pages of the disk to the arena before they are pinned, as far as there is room.
        Returns how many were copied."""
        with self._lock:
            rising = self._shard.moves.rising(keys, max_pages)
        n_copied = 0
        for key in rising:
            with self._lock:
                move = self._shard.moves.begin_up(key)
            if move is not None:
                self._make(move)
                n_copied += 1
        return n_copied

    def close(self, flush_s: float) -> None:
        """Ends the thread, writes pages of the arena to free slots on disk for at most flush_s, the
        most valuable first, and then the index."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        deadline_s = time.monotonic() + flush_s
        with self._lock:
            keys, at = self._shard.table.order.most_valuable_first(), 0
        while time.monotonic() < deadline_s:
            with self._lock:
                move, at = self._shard.moves.next_flush(self._clock.monotonic_s(), keys, at)
            if move is None:
                break
            self._make(move)
        self._write_index()
        self._index.close()

    def _run(self) -> None:
        while not self._closing:
            try:
                self._move_down()
                if time.monotonic() >= self._index_at_s + INDEX_EVERY_S:
                    self._write_index()
            except Exception:
                logger.exception("moving pages failed; it goes on")
            self._wake.wait(INDEX_EVERY_S if self._index.n_pending() else IDLE_S)
            self._wake.clear()

    def _move_down(self) -> None:
        while not self._closing:
            with self._lock:
                move = self._shard.moves.next_down(self._clock.monotonic_s())
            if move is None:
                return
            self._make(move)
            if time.monotonic() >= self._index_at_s + INDEX_EVERY_S:
                self._write_index()

    def _make(self, move: Move) -> None:
        """Copies the page; what is copied has been checked."""
        shard, bad, error = self._shard, None, None
        data = read_checked(shard.slots, move.page, move.source)
        if isinstance(data, BadCopy):
            bad = data
        else:
            try:
                shard.slots.write(move.target, data)
            except OSError as exc:
                error = exc
        with self._lock:
            if bad is not None:
                shard.table.bad_copy(move.page, bad.slot, bad.reason)
            if error is not None:
                shard.table.disk_failed(self._clock.monotonic_s(), error)
            shard.moves.finish(move, copied=bad is None and error is None)

    def _write_index(self) -> None:
        self._index_at_s = time.monotonic()
        try:
            self._index.flush()
        except OSError as exc:
            with self._lock:
                self._shard.table.disk_failed(self._clock.monotonic_s(), exc)
