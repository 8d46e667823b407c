"""The thread shell around the job book: starts rows, journals their tokens, writes their ends.

Order of truth: the journal first, then the book, then whoever watches. A crash between two of
them leaves the journal ahead, and the next start reads the journal.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from ..core.clock import Clock, SystemClock
from ..core.config import Config
from ..core.errors import (
    AlreadyEnded,
    Cancelled,
    Draining,
    LongreachError,
    ResourceExhausted,
    WorkerLost,
)
from . import job_events as events
from .contexts import ContextStore
from .job_events import JobRow
from .jobs import JobBook
from .journal import Journal
from .metrics import Metrics
from .preparer import Preparer
from .progress import JobProgress, RowProgress, Snapshot
from .records import RowEnd
from .results import error_line
from .row import JobState, RowState
from .row_runner import Ended, Left, RowRunner
from .worker_pool import CancelSwitch, WorkerPool

log = logging.getLogger("longreach.dispatch")
TICK_S = 0.2
MAX_THREADS = 256
_STOP_WAIT_S = 5.0


class Dispatcher:
    """Runs the rows of accepted jobs. Thread-safe."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        contexts: ContextStore,
        preparer: Preparer,
        pool: WorkerPool,
        metrics: Metrics,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._contexts = contexts
        self._pool = pool
        self._metrics = metrics
        self._clock = clock or SystemClock()
        self._runner = RowRunner(config, journal, preparer, pool, metrics, self._clock)
        self._book = JobBook(config.gateway.max_attempts)
        self._progress: dict[str, JobProgress] = {}
        self._custom_ids: dict[str, str] = {}
        self._last_error: dict[str, LongreachError] = {}
        self._switches: dict[str, CancelSwitch] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._n_changes = 0
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="row")
        self._n_slots = 0
        self._draining = False
        self._stopped = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="dispatch", daemon=True)

    def start(self) -> None:
        """Take up every job of the journal that has not ended, then run."""
        for job_id in self._journal.recover():
            self._take_up(job_id)
        self._count_slots()
        self._ticker.start()

    def accepted(self, job_id: str) -> None:
        """A job is durable in the journal: run it."""
        self._take_up(job_id)
        self._notify()

    def cancel(self, job_id: str) -> None:
        """Raises NotFound or AlreadyEnded."""
        record = self._journal.job(job_id)
        if record.state.ended:
            raise AlreadyEnded(f"job '{job_id}' is {record.state.value} already", job_id=job_id)
        self._apply(events.JobCancelled(job_id))

    @property
    def n_open_rows(self) -> int:
        return self._book.n_open

    @property
    def n_running_rows(self) -> int:
        return self._book.n_running

    @property
    def draining(self) -> bool:
        return self._draining

    def check_accepting(self) -> None:
        """Raises Draining."""
        if self._draining or self._stopped.is_set():
            raise Draining("the gateway is shutting down; submit again when it is back")

    def snapshot(self, job_id: str) -> Snapshot | None:
        """How far an open job is; None once it has ended."""
        with self._lock:
            progress = self._progress.get(job_id)
            return progress.snapshot(self._clock.monotonic_s()) if progress else None

    def wait_change(self, seen: int, timeout_s: float) -> int:
        """Wait until a row or a job has changed state since `seen`; the new count.

        Raises Draining when the dispatcher stops.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._n_changes != seen or self._stopped.is_set(), timeout_s
            )
            if self._stopped.is_set():
                raise Draining("the gateway has stopped; connect again when it is back")
            return self._n_changes

    @property
    def n_changes(self) -> int:
        return self._n_changes

    def drain(self, timeout_s: float) -> int:
        """Start no further row, wait for those that run; how many still run then."""
        self._draining = True
        self._apply(events.Drained())
        deadline_s = self._clock.monotonic_s() + timeout_s
        with self._changed:
            while self._book.n_running:
                left_s = deadline_s - self._clock.monotonic_s()
                if left_s <= 0 or self._stopped.is_set():
                    break
                self._changed.wait(min(left_s, TICK_S))
        return self._book.n_running

    def stop(self) -> None:
        """Leave running rows to the journal, with their tokens."""
        self._draining = True
        self._stopped.set()
        self._notify()
        with self._lock:
            switches = list(self._switches.values())
        for switch in switches:
            switch.cancel(abandon=True)
        if self._ticker.is_alive():
            self._ticker.join(timeout=_STOP_WAIT_S)
        self._threads.shutdown(wait=False, cancel_futures=True)
        deadline_s = self._clock.monotonic_s() + _STOP_WAIT_S
        while self._switches and self._clock.monotonic_s() < deadline_s:
            threading.Event().wait(0.02)

    # the book's shell

    def _take_up(self, job_id: str) -> None:
        record = self._journal.job(job_id)
        rows = tuple(
            JobRow(row.row_id, row.custom_id, row.max_tokens, row.size_bytes, row.group)
            for row in self._journal.open_rows(job_id)
        )
        with self._lock:
            self._progress[job_id] = JobProgress(rows)
            self._custom_ids.update({row.row_id: row.custom_id for row in rows})
            self._apply(
                events.JobAccepted(
                    job_id,
                    rows,
                    n_done=record.counts[RowState.DONE],
                    cancelling=record.state == JobState.CANCELLING,
                    started=record.started_s > 0,
                )
            )

    def _apply(self, event: events.Event) -> None:
        with self._lock:
            actions = self._book.handle(event, self._clock.monotonic_s())
            ends = [action for action in actions if isinstance(action, events.EndRow)]
            if ends:
                try:
                    self._write_ends(ends)
                except Exception:  # open in the journal still: the next start runs them
                    log.exception("%d rows could not be ended", len(ends))
            for action in actions:
                self._carry_out(action)
        if actions:
            self._notify()

    def _carry_out(self, action: events.Action) -> None:
        """Never raises: the actions after this one must be carried out too."""
        try:
            match action:
                case events.StartRow(row_id, attempt):
                    self._start_row(row_id, attempt)
                case events.StopRow(row_id):
                    if row_id in self._switches:
                        self._switches[row_id].cancel()
                case events.RequeueRow(row_id):
                    self._journal.requeue_row(row_id)
                case events.SetJobState(job_id, state):
                    self._set_job_state(job_id, state)
        except Exception:
            log.exception("%s", action)

    def _write_ends(self, ends: list[events.EndRow]) -> None:
        rows = []
        for end in ends:
            if end.state == RowState.CANCELLED:
                error: LongreachError = Cancelled("the job was cancelled before the row ended")
            else:
                last = self._last_error.get(end.row_id)
                why = last.message if last else "unknown"
                kind = type(last) if last else WorkerLost
                error = kind(
                    f"given up after {end.n_losses} attempts without progress; the last one: {why}"
                )
                self._metrics.failed("batch", error.reason)
            line = error_line(end.row_id, self._custom_ids[end.row_id], error)
            rows.append(RowEnd(end.row_id, end.state, line, error.reason))
        self._journal.end_rows(rows)
        for end in ends:
            self._forget(end.row_id)

    def _set_job_state(self, job_id: str, state: JobState) -> None:
        self._journal.set_job_state(job_id, state)
        if state.ended:
            self._progress.pop(job_id, None)
            self._contexts.drop_unused(job_id)
            log.info("job %s is %s", job_id, state.value)

    def _start_row(self, row_id: str, attempt: int) -> None:
        if self._stopped.is_set():
            return
        switch = self._switches[row_id] = CancelSwitch()
        shown = self._progress[_job_of(row_id)].start(row_id, attempt)
        self._threads.submit(self._run_row, row_id, shown, switch)

    def _forget(self, row_id: str) -> None:
        self._custom_ids.pop(row_id, None)
        self._last_error.pop(row_id, None)
        self._progress[_job_of(row_id)].end(row_id)

    def _notify(self) -> None:
        with self._changed:
            self._n_changes += 1
            self._changed.notify_all()

    def _tick(self) -> None:
        while not self._stopped.wait(TICK_S):
            try:
                self._count_slots()
                self._apply(events.Tick())
                self._sample()
            except Exception:  # the loop must outlive a full disk or a wiring in trouble
                log.exception("dispatch")

    def _count_slots(self) -> None:
        """Two batches per worker: rows of one context are there together, few are bound early."""
        n_slots = min(MAX_THREADS, self._pool.n_live() * 2 * self._config.worker.max_rows)
        if n_slots != self._n_slots:
            self._n_slots = n_slots
            self._apply(events.SlotsChanged(n_slots))

    def _sample(self) -> None:
        with self._lock:
            for progress in self._progress.values():
                progress.sample(self._clock.monotonic_s())

    def _run_row(self, row_id: str, shown: RowProgress, switch: CancelSwitch) -> None:
        custom_id = self._custom_ids[row_id]
        outcome = self._runner.run(row_id, custom_id, shown, switch, self._note_progress)
        with self._lock:
            self._switches.pop(row_id, None)
            if isinstance(outcome, Left):
                return
            if isinstance(outcome, Ended):
                self._forget(row_id)
                self._apply(events.RowEnded(row_id, outcome.state))
                return
            self._last_error[row_id] = outcome.error
            self._progress[_job_of(row_id)].lose(row_id)
            full = isinstance(outcome.error, ResourceExhausted)
            self._apply(events.RowLost(row_id, full=full))

    def _note_progress(self, row_id: str, score: int) -> None:
        with self._lock:
            self._book.note_progress(row_id, score)


def _job_of(row_id: str) -> str:
    return row_id.rpartition(".")[0]
