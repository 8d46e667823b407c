"""How far a job is, how fast it goes and when it ends. Pure: time is handed in."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .job_events import JobRow

WINDOW_S = 10.0
ETA_WINDOW_S = 60.0
_SAMPLE_S = 0.25
BYTES_PER_TOKEN = 4.0
"""Guess for a prompt that has not been tokenized yet (English text)."""
DECODE_WEIGHT = 8.0
"""Prompt tokens that are prefilled in the time of one decoded token, until measured."""
SHARED_TOKENS = 64
"""Prompt tokens computed for a row besides the context that it shares with others of the job."""


class RateMeter:
    """Growth per second of a cumulative value over the last `window_s` seconds."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, value: float) -> None:
        samples = self._samples
        if len(samples) > 1 and now_s - samples[-2][0] < _SAMPLE_S:
            samples.pop()
        samples.append((now_s, value))
        while len(samples) > 2 and samples[1][0] <= now_s - self._window_s:
            samples.popleft()

    def rate(self, now_s: float) -> float:
        if not self._samples or now_s <= self._samples[0][0]:
            return 0.0
        return (self._samples[-1][1] - self._samples[0][1]) / (now_s - self._samples[0][0])


@dataclass
class RowProgress:
    """A row that runs, as a watcher sees it. Counts are tokens."""

    row_id: str
    custom_id: str
    max_tokens: int
    attempt: int = 0
    worker_id: str = ""
    phase: str = "queued"
    prefilled: int = 0
    reused: int = 0
    total: int = 0
    decoded: int = 0
    prefilled_before: int = 0
    """Prompt tokens that an attempt before this one had in place."""


@dataclass(frozen=True)
class Snapshot:
    """What one job shows at one moment; eta_s is negative while unknown."""

    active: tuple[RowProgress, ...]
    prefilled_tokens: int
    decoded_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    eta_s: float


class JobProgress:
    """Counts of one open job. Not thread-safe."""

    def __init__(self, rows: Sequence[JobRow]) -> None:
        self._active: dict[str, RowProgress] = {}
        self._work: dict[str, tuple[float, int]] = {}
        self._prefilled_before: dict[str, int] = {}
        # a shared context is work of its group: any row of it may be the one that computes it
        self._contexts: dict[str, float] = {}
        self._context_share: dict[str, float] = {}
        sizes = Counter(row.group for row in rows)
        for row in rows:
            fresh = row.size_bytes / BYTES_PER_TOKEN
            if row.group and sizes[row.group] > 1:
                self._contexts[row.group] = max(fresh, self._contexts.get(row.group, 0.0))
                fresh = SHARED_TOKENS
            self._work[row.row_id] = (fresh, row.max_tokens)
        self._specs = {row.row_id: row for row in rows}
        self._prefilled_ended = 0
        self._computed_ended = 0
        self._decoded_ended = 0
        self._n_ended = 0
        self._work_ended = 0.0
        self._prefill_rate = RateMeter()
        self._decode_rate = RateMeter()
        self._work_rate = RateMeter(ETA_WINDOW_S)

    def start(self, row_id: str, attempt: int) -> RowProgress:
        """A row begins an attempt; what is answered is kept up to date by the row's thread."""
        spec = self._specs[row_id]
        row = RowProgress(row_id, spec.custom_id, spec.max_tokens, attempt)
        row.prefilled_before = self._prefilled_before.get(row_id, 0)
        self._active[row_id] = row
        return row

    def lose(self, row_id: str) -> None:
        """The attempt is over without an end; its tokens are kept elsewhere."""
        row = self._active.pop(row_id, None)
        if row is not None:
            self._prefilled_before[row_id] = max(row.prefilled, row.prefilled_before)

    def end(self, row_id: str) -> None:
        row = self._active.pop(row_id, None)
        self._prefilled_before.pop(row_id, None)
        fresh, max_tokens = self._work.pop(row_id, (0.0, 0))
        self._n_ended += 1
        if row is not None:
            self._note_context(row)
            self._prefilled_ended += row.prefilled
            self._computed_ended += row.prefilled - row.reused
            self._decoded_ended += row.decoded
            max_tokens = row.decoded
        self._work_ended += fresh + DECODE_WEIGHT * max_tokens

    def sample(self, now_s: float) -> None:
        """Note where the job is now; rates come from what was noted."""
        active = self._active.values()
        for row in active:
            self._note_context(row)
        computed = self._computed_ended + sum(row.prefilled - row.reused for row in active)
        self._prefill_rate.add(now_s, computed)
        self._decode_rate.add(now_s, self._decoded_ended + sum(row.decoded for row in active))
        done = self._work_ended + sum(self._done(row) for row in active)
        done += sum(self._contexts[group] * share for group, share in self._context_share.items())
        self._work_rate.add(now_s, done)

    def snapshot(self, now_s: float) -> Snapshot:
        self.sample(now_s)
        active = tuple(replace(row) for row in self._active.values())
        rate = self._work_rate.rate(now_s)
        left = self._left()
        eta_s = left / rate if rate > 0 else (0.0 if left <= 0 else -1.0)
        return Snapshot(
            active,
            self._prefilled_ended + sum(row.prefilled for row in active),
            self._decoded_ended + sum(row.decoded for row in active),
            max(0.0, self._prefill_rate.rate(now_s)),
            max(0.0, self._decode_rate.rate(now_s)),
            eta_s,
        )

    def _note_context(self, row: RowProgress) -> None:
        group = self._specs[row.row_id].group
        if group in self._contexts:
            share = max(_share(row), self._context_share.get(group, 0.0))
            self._context_share[group] = share

    def _done(self, row: RowProgress) -> float:
        fresh, _ = self._work.get(row.row_id, (0.0, 0))
        return fresh * _share(row) + DECODE_WEIGHT * row.decoded

    def _left(self) -> float:
        # rows rarely use all of max_tokens: what ended rows used is the better guess
        typical = self._decoded_ended / self._n_ended if self._n_ended else None
        waiting = {self._specs[row_id].group for row_id in self._work}
        left = sum(
            work * (1 - self._context_share.get(group, 0.0))
            for group, work in self._contexts.items()
            if group in waiting
        )
        for row_id, (fresh, max_tokens) in self._work.items():
            expected = max_tokens if typical is None else min(max_tokens, typical)
            row = self._active.get(row_id)
            if row is None:
                left += fresh + DECODE_WEIGHT * expected
                continue
            left += fresh * (1 - _share(row)) + DECODE_WEIGHT * max(1.0, expected - row.decoded)
        return left


def _share(row: RowProgress) -> float:
    return row.prefilled / row.total if row.total else 0.0
