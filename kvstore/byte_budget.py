"""A bound on bytes that are under way."""

from __future__ import annotations

import threading


class ByteBudget:
    """Thread-safe. One taker always fits into an empty budget, however large it is."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used = 0
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        return self._used

    def take(self, n_bytes: int, timeout_s: float) -> bool:
        """Waits for room; False if there was none in time. Pair with `give_back`."""
        with self._changed:
            room = self._changed.wait_for(
                lambda: not self._used or self._used + n_bytes <= self.limit_bytes, timeout_s
            )
            if room:
                self._used += n_bytes
            return room

    def give_back(self, n_bytes: int) -> None:
        with self._changed:
            self._used -= n_bytes
            self._changed.notify_all()
