"""The job book: which row runs next, what a loss means, when a job has ended. Pure, no I/O.

    queued --StartRow--> running --RowEnded--> done | failed | cancelled
       ^                    |
       +-----RowLost--------+     (with a growing pause; alone after losses without progress)

A row that takes its worker down must not take its companions with it: a row that lost its worker
twice without getting further is a suspect, and suspects run alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..core.errors import AlreadyEnded, NotFound
from .job_events import (
    Action,
    Drained,
    EndRow,
    Event,
    JobAccepted,
    JobCancelled,
    JobRow,
    RequeueRow,
    RowEnded,
    RowLost,
    SetJobState,
    SlotsChanged,
    StartRow,
    StopRow,
    Tick,
)
from .row import JobState, RowState

SUSPECT_LOSSES = 2
"""Losses in succession without progress after which a row runs alone."""
SUSPECT_PATIENCE_S = 60.0
"""Longest time that suspects wait for others before nothing else is started."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0
PARKED_S = 2.0
"""Pause of a row that found no room while others run."""


def pause_s(n_losses: int) -> float:
    """Pause before a row is routed again: doubles with each loss."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(10, max(0, n_losses - 1)))


@dataclass
class _Row:
    spec: JobRow
    job: _Job
    attempt: int = 0
    n_losses: int = 0
    """Losses since the row last got further."""
    score: int = 0
    not_before_s: float = 0.0
    suspect_since_s: float = 0.0


@dataclass
class _Job:
    job_id: str
    order: int
    n_open: int
    n_done: int = 0
    started: bool = False
    cancelling: bool = False
    queued: deque[str] = field(default_factory=deque)
    n_running: int = 0


class JobBook:
    """Knows every row that has not ended. Feed it events, carry out its actions in order."""

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._jobs: dict[str, _Job] = {}
        self._rows: dict[str, _Row] = {}
        self._running: set[str] = set()
        self._paused: list[str] = []
        self._suspects: deque[str] = deque()
        self._n_slots = 0
        self._n_accepted = 0
        self._draining = False

    @property
    def n_open(self) -> int:
        return len(self._rows)

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> frozenset[str]:
        return frozenset(self._running)

    def job_of(self, row_id: str) -> str | None:
        row = self._rows.get(row_id)
        return row.job.job_id if row else None

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """now_s: monotonic seconds. Events about rows that have ended are without effect."""
        actions: list[Action] = []
        match event:
            case JobAccepted():
                self._accept(event, actions)
            case JobCancelled(job_id):
                self._cancel(job_id, actions)
            case RowEnded(row_id, state):
                self._end(row_id, state, actions)
            case RowLost(row_id, full):
                self._lose(row_id, full, now_s, actions)
            case SlotsChanged(n_slots):
                self._n_slots = n_slots
            case Drained():
                self._draining = True
            case Tick():
                pass
        self._fill(now_s, actions)
        return actions

    def note_progress(self, row_id: str, score: int) -> None:
        """`score` grows when the row gets further: prompt tokens prefilled plus tokens made.

        Beside `handle`, since it comes with every token and never leads to an action.
        """
        row = self._rows.get(row_id)
        if row is not None and score > row.score:
            row.score = score
            row.n_losses = 0

    def _accept(self, event: JobAccepted, actions: list[Action]) -> None:
        job = _Job(
            event.job_id,
            self._n_accepted,
            len(event.rows),
            event.n_done,
            event.started,
            event.cancelling,
        )
        self._n_accepted += 1
        self._jobs[job.job_id] = job
        for spec in event.rows:
            self._rows[spec.row_id] = _Row(spec, job)
            job.queued.append(spec.row_id)
        if job.cancelling:
            self._drop_waiting(job, actions)
        self._finish_if_over(job, actions)

    def _cancel(self, job_id: str, actions: list[Action]) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(f"no open job '{job_id}'", job_id=job_id)
        if job.cancelling:
            raise AlreadyEnded(f"job '{job_id}' is being cancelled already", job_id=job_id)
        job.cancelling = True
        actions.append(SetJobState(job_id, JobState.CANCELLING))
        self._drop_waiting(job, actions)
        actions += [
            StopRow(row_id) for row_id in sorted(self._running) if self._rows[row_id].job is job
        ]
        self._finish_if_over(job, actions)

    def _drop_waiting(self, job: _Job, actions: list[Action]) -> None:
        waiting = [
            row_id
            for row_id, row in self._rows.items()
            if row.job is job and row_id not in self._running
        ]
        gone = set(waiting)
        job.queued.clear()
        self._paused = [row_id for row_id in self._paused if row_id not in gone]
        self._suspects = deque(row_id for row_id in self._suspects if row_id not in gone)
        for row_id in waiting:
            actions.append(EndRow(row_id, RowState.CANCELLED))
            self._count_end(row_id, RowState.CANCELLED)

    def _end(self, row_id: str, state: RowState, actions: list[Action]) -> None:
        if row_id not in self._running:
            return
        job = self._rows[row_id].job
        self._leave_running(row_id)
        self._count_end(row_id, state)
        self._finish_if_over(job, actions)

    def _lose(self, row_id: str, full: bool, now_s: float, actions: list[Action]) -> None:
        if row_id not in self._running:
            return
        row = self._rows[row_id]
        self._leave_running(row_id)
        parked = full and bool(self._running)
        row.n_losses += not parked
        over = RowState.CANCELLED if row.job.cancelling else RowState.FAILED
        if row.job.cancelling or row.n_losses >= self._max_attempts:
            actions.append(EndRow(row_id, over, row.n_losses))
            self._count_end(row_id, over)
            self._finish_if_over(row.job, actions)
            return
        actions.append(RequeueRow(row_id))
        row.not_before_s = now_s + (PARKED_S if parked else pause_s(row.n_losses))
        if row.n_losses >= SUSPECT_LOSSES:
            row.suspect_since_s = now_s
            self._suspects.append(row_id)
        else:
            self._paused.append(row_id)

    def _leave_running(self, row_id: str) -> None:
        self._running.discard(row_id)
        self._rows[row_id].job.n_running -= 1

    def _count_end(self, row_id: str, state: RowState) -> None:
        job = self._rows.pop(row_id).job
        job.n_open -= 1
        job.n_done += state == RowState.DONE

    def _finish_if_over(self, job: _Job, actions: list[Action]) -> None:
        if job.n_open or job.job_id not in self._jobs:
            return
        if job.cancelling:
            state = JobState.CANCELLED
        else:
            state = JobState.COMPLETED if job.n_done else JobState.FAILED
        del self._jobs[job.job_id]
        actions.append(SetJobState(job.job_id, state))

    def _fill(self, now_s: float, actions: list[Action]) -> None:
        if self._draining:
            return
        # rows that were lost go first: they hold pages and tokens already
        ready = [r for r in self._paused if self._rows[r].not_before_s <= now_s]
        while len(self._running) < self._n_slots and not self._hold_for_suspects(now_s):
            row_id = ready.pop(0) if ready else self._next_queued()
            if row_id is None:
                break
            if row_id in self._paused:
                self._paused.remove(row_id)
            self._start(row_id, actions)
        if self._suspects and not self._running and self._n_slots:
            row_id = self._suspects[0]
            if self._rows[row_id].not_before_s <= now_s:
                self._suspects.popleft()
                self._start(row_id, actions)

    def _hold_for_suspects(self, now_s: float) -> bool:
        """True while a suspect runs, or has waited so long that the others must make room."""
        if any(self._rows[r].n_losses >= SUSPECT_LOSSES for r in self._running):
            return True
        return bool(self._suspects) and (
            now_s - self._rows[self._suspects[0]].suspect_since_s > SUSPECT_PATIENCE_S
        )

    def _next_queued(self) -> str | None:
        """The job with the fewest running rows goes first, the older one on a tie: a small job
        does not wait for a large one, and rows of one job keep their order in the file."""
        waiting = [job for job in self._jobs.values() if job.queued]
        if not waiting:
            return None
        return min(waiting, key=lambda job: (job.n_running, job.order)).queued.popleft()

    def _start(self, row_id: str, actions: list[Action]) -> None:
        row = self._rows[row_id]
        if not row.job.started:
            row.job.started = True
            actions.append(SetJobState(row.job.job_id, JobState.RUNNING))
        row.attempt += 1
        row.job.n_running += 1
        self._running.add(row_id)
        actions.append(StartRow(row_id, row.attempt))
