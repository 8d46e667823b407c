"""What happens to jobs and rows, and what the job book wants done about it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from .row import JobState, RowState


@dataclass(frozen=True)
class JobRow:
    """A row that has not ended. Rows of one `group` share a context."""

    row_id: str
    custom_id: str = ""
    max_tokens: int = 0
    size_bytes: int = 0
    group: str = ""


@dataclass(frozen=True)
class JobAccepted:
    """`n_done` rows were answered and `cancelled` asked before (a gateway that was restarted)."""

    job_id: str
    rows: tuple[JobRow, ...]
    n_done: int = 0
    cancelling: bool = False
    started: bool = False


@dataclass(frozen=True)
class JobCancelled:
    """Raises AlreadyEnded or NotFound where it cannot be done."""

    job_id: str


@dataclass(frozen=True)
class RowEnded:
    row_id: str
    state: RowState


@dataclass(frozen=True)
class RowLost:
    """The attempt ended without an answer, for a reason that another attempt may not meet.

    `full`: something had no room. That counts against the row only if nothing else runs, whose
    end could make room.
    """

    row_id: str
    full: bool = False


@dataclass(frozen=True)
class SlotsChanged:
    """How many rows may run at once; 0 while no worker lives."""

    n_slots: int


@dataclass(frozen=True)
class Drained:
    """No further row is started."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = JobAccepted | JobCancelled | RowEnded | RowLost | SlotsChanged | Drained | Tick


@dataclass(frozen=True)
class StartRow:
    row_id: str
    attempt: int


@dataclass(frozen=True)
class StopRow:
    """Cancel a row that runs; RowEnded follows when it has stopped."""

    row_id: str


@dataclass(frozen=True)
class RequeueRow:
    """Note that the row waits again."""

    row_id: str


@dataclass(frozen=True)
class EndRow:
    """The book decided the end of a row that does not run: CANCELLED, or FAILED after losses."""

    row_id: str
    state: RowState
    n_losses: int = 0


@dataclass(frozen=True)
class SetJobState:
    job_id: str
    state: JobState


Action = StartRow | StopRow | RequeueRow | EndRow | SetJobState
