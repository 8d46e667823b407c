"""How fast and how soon again: a budget of bytes per second, and pauses that grow. Pure: whoever asks
brings the time."""

from __future__ import annotations


class TokenBucket:
    """Bytes per second, of which up to `burst_s` seconds' worth may be saved."""

    def __init__(self, bytes_per_s: float, burst_s: float = 0.25) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst = bytes_per_s * burst_s
        self._left = self._burst
        self._at_s: float | None = None

    def take(self, n_bytes: int, now_s: float) -> float:
        """Spends bytes; returns the seconds to wait before they may be used. What is larger than the
        burst is lent and paid off by waiting."""
        if self._at_s is not None:
            earned = max(0.0, now_s - self._at_s) * self._bytes_per_s
            self._left = min(self._burst, self._left + earned)
        self._at_s = now_s
        self._left -= n_bytes
        return max(0.0, -self._left / self._bytes_per_s)


class Backoff:
    """A pause after each failure in a row by the same name, twice as long each time."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._pauses: dict[str, tuple[float, float]] = {}  # name -> length, end

    def ready(self, name: str, now_s: float) -> bool:
        return now_s >= self._pauses.get(name, (0.0, now_s))[1]

    def failed(self, name: str, now_s: float) -> float:
        """Returns the seconds of the pause that begins."""
        last_s = self._pauses.get(name, (0.0, 0.0))[0]
        pause_s = min(self._longest_s, 2 * last_s or self._first_s)
        self._pauses[name] = (pause_s, now_s + pause_s)
        return pause_s

    def worked(self, name: str) -> None:
        self._pauses.pop(name, None)

    def clear(self) -> None:
        self._pauses.clear()
