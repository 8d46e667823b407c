"""One attempt of one batch row, start to end: prepare, stream, journal. Runs in the row's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.clock import Clock
from ..core.config import Config
from ..core.errors import Cancelled, InvalidInput, LongreachError, WorkerLost, as_longreach_error
from .journal import Journal
from .metrics import Metrics
from .preparer import Prepared, Preparer
from .progress import RowProgress
from .records import RowEnd
from .results import Outcome, answer_line, error_line
from .row import RowSpec, RowState
from .worker_pool import Assigned, CancelSwitch, NewToken, Progress, WorkerPool, can_retry

log = logging.getLogger("longreach.dispatch")


@dataclass(frozen=True)
class Ended:
    """The row's end is in the journal."""

    state: RowState


@dataclass(frozen=True)
class Lost:
    """No answer, for a reason that another attempt may not meet."""

    error: LongreachError


@dataclass(frozen=True)
class Left:
    """The row was abandoned: the journal keeps it, with its tokens, for the next start."""


class RowRunner:
    """Thread-safe: many rows run at once, each in its own call."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        preparer: Preparer,
        pool: WorkerPool,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self._journal = journal
        self._preparer = preparer
        self._pool = pool
        self._metrics = metrics
        self._clock = clock

    def run(
        self,
        row_id: str,
        custom_id: str,
        shown: RowProgress,
        switch: CancelSwitch,
        note: Callable[[str, int], None],
    ) -> Ended | Lost | Left:
        """Never raises. `shown` is kept up to date; note(row_id, score) follows each step ahead.

        After switch.cancel() the row ends as CANCELLED, unless it is abandoned.
        """
        try:
            return self._attempt(row_id, shown, switch, note)
        except Exception as exc:
            if not isinstance(exc, LongreachError):
                log.exception("row %s", row_id)
            error = as_longreach_error(exc)
        if switch.abandoned:
            return Left()
        if not switch.is_set() and can_retry(error):
            log.warning("row %s is routed again: %s", row_id, error)
            self._metrics.lost(error.reason)
            return Lost(error)
        return self._end_without_answer(row_id, custom_id, error, cancelled=switch.is_set())

    def _attempt(
        self,
        row_id: str,
        shown: RowProgress,
        switch: CancelSwitch,
        note: Callable[[str, int], None],
    ) -> Ended:
        started_s = self._clock.monotonic_s()
        self._journal.start_row(row_id)
        spec = self._journal.spec(row_id)
        tokens = self._journal.tokens.read(row_id)
        shown.decoded = len(tokens)
        switch.check()
        prepared = self._preparer.prepare(spec, row_id)
        shown.total = prepared.n_prompt_tokens
        outcome = self._stream(row_id, spec, prepared, tokens, shown, switch, note)
        line = answer_line(
            row_id=row_id,
            custom_id=spec.custom_id,
            kind=spec.kind,
            model=spec.model or self._config.model.name,
            created_s=self._clock.wall_s(),
            n_prompt_tokens=prepared.n_prompt_tokens,
            outcome=outcome,
        )
        end = RowEnd(
            row_id,
            RowState.DONE,
            line,
            prompt_tokens=prepared.n_prompt_tokens,
            reused_tokens=int(outcome.stats.get("tokens_reused", 0)),
            decoded_tokens=outcome.n_tokens,
        )
        self._journal.end_row(end)
        self._metrics.answered("batch", outcome, self._clock.monotonic_s() - started_s)
        return Ended(RowState.DONE)

    def _stream(
        self,
        row_id: str,
        spec: RowSpec,
        prepared: Prepared,
        tokens: Sequence[int],
        shown: RowProgress,
        switch: CancelSwitch,
        note: Callable[[str, int], None],
    ) -> Outcome:
        # a row with tokens had its whole prompt in place, also before a restart of the gateway
        n_before = prepared.n_prompt_tokens if tokens else shown.prefilled_before
        events = self._pool.run(row_id, prepared, spec.sampling, tokens, switch, n_before)
        for event in events:
            match event:
                case Assigned(worker_id):
                    shown.worker_id = worker_id
                case Progress():
                    shown.phase = event.phase
                    shown.prefilled = event.prefilled
                    shown.reused = event.reused
                case NewToken():
                    self._journal.tokens.append(row_id, event.index, event.token_id)
                    shown.phase = "decode"
                    shown.decoded = event.index + 1
                case Outcome():
                    return event
            note(row_id, shown.prefilled + shown.decoded)
        raise WorkerLost(f"row {row_id}: no answer came")

    def _end_without_answer(
        self, row_id: str, custom_id: str, error: LongreachError, *, cancelled: bool
    ) -> Ended | Lost:
        state = RowState.CANCELLED if cancelled else RowState.FAILED
        if cancelled:
            error = Cancelled("the job was cancelled while the row ran")
        else:
            self._metrics.failed("batch", error.reason)
        if isinstance(error, InvalidInput):
            error.details.setdefault("line", int(row_id.rpartition(".")[2]))
        line = error_line(row_id, custom_id, error)
        try:
            self._journal.end_row(RowEnd(row_id, state, line, error.reason))
        except Exception as exc:  # a full disk, for instance: the row is tried again later
            log.exception("row %s", row_id)
            return Lost(as_longreach_error(exc))
        return Ended(state)
