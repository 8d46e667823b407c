"""Checks held pages, all copies of them, one at a time: in the background at a bounded rate, or when
an operator asks. A bad copy is dropped; readers and the repairer get the page from a replica."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

from ..core.page_key import PageKey
from .pacing import TokenBucket
from .page_checks import BadCopy, read_checked
from .shard import StoreShard

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
BURST_S = 0.05
"""So much of a second's bytes may be read at once."""


class Scrubber:
    """lock guards the shard. bytes_per_s 0: rounds begin only when asked for, at full speed.
    Thread-safe."""

    def __init__(
        self,
        shard: StoreShard,
        lock: AbstractContextManager[bool],
        bytes_per_s: int,
        pause_s: float,
    ) -> None:
        self._shard = shard
        self._lock = lock
        self._bytes_per_s = bytes_per_s
        self._pause_s = pause_s
        self._wake = threading.Event()
        self._closing = False
        self._running = False
        self._n_checked = 0  # in this round
        self._n_bad = 0
        self._n_checked_before = 0
        self._n_bad_before = 0
        self._last_round_s = 0.0
        self._thread: threading.Thread | None = None
        if bytes_per_s:
            self._start_thread()

    def check(self, key: PageKey) -> list[BadCopy]:
        """Checks every copy of a page now; bad ones are dropped. A page not held has none."""
        shard = self._shard
        with self._lock:
            page = shard.begin_check(key)
            copies = [] if page is None else [page.slot, page.backup]
        if page is None:
            return []
        bad: list[BadCopy] = []
        try:
            for slot in copies:
                read = None if slot is None else read_checked(shard.slots, page, slot)
                if isinstance(read, BadCopy):
                    bad.append(read)
        finally:
            with self._lock:
                shard.end_check(page, bad)
        return bad

    def start_round(self) -> None:
        """Begins a round now, unless one is running."""
        with self._lock:
            if self._running or self._closing:
                return
            if self._thread is None:
                self._start_thread()
        self._wake.set()

    def state(self) -> dict[str, Any]:
        """Of the round that is running, else of the last one."""
        return {
            "pages_checked": self._n_checked,
            "bad": self._n_bad,
            "last_round_s": self._last_round_s,
            "running": self._running,
        }

    def totals(self) -> dict[str, int]:
        return {
            "scrub_checked": self._n_checked_before + self._n_checked,
            "scrub_bad": self._n_bad_before + self._n_bad,
        }

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="page-scrubber", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._pause_s if self._bytes_per_s else None)
            if self._closing:
                return
            self._wake.clear()
            try:
                self._round()
            except Exception:
                logger.exception("a round of checks failed; the next one comes")
            self._running = False

    def _round(self) -> None:
        self._n_checked_before += self._n_checked
        self._n_bad_before += self._n_bad
        self._n_checked = self._n_bad = 0
        self._running = True
        started_s = time.monotonic()
        with self._lock:
            keys = self._shard.keys_after(None)
        budget = TokenBucket(self._bytes_per_s, BURST_S) if self._bytes_per_s else None
        for key in keys:
            bad = self.check(key)
            self._n_checked += 1
            self._n_bad += len(bad)
            if budget is not None:
                page_nbytes = self._shard.slots.geometry.page_nbytes
                time.sleep(min(budget.take(page_nbytes, time.monotonic()), 1.0))
            if self._closing:
                return
        self._last_round_s = time.monotonic() - started_s
