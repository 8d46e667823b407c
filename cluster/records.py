"""What is written to the journal and read from it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from .row import JobState, RowSpec, RowState


@dataclass(frozen=True)
class NewRow:
    """A row to be journaled: open with a spec, or ended at once with an error line."""

    line: int
    custom_id: str
    spec: RowSpec | None
    size_bytes: int = 0
    error: str = ""
    result: str = ""


@dataclass(frozen=True)
class RowEnd:
    """The end of a row and its result line."""

    row_id: str
    state: RowState
    result: str
    error: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    decoded_tokens: int = 0


@dataclass(frozen=True)
class JobRecord:
    """A job and its counts."""

    job_id: str
    name: str
    state: JobState
    idempotency_key: str
    created_s: float
    started_s: float
    ended_s: float
    counts: dict[RowState, int]
    prompt_tokens: int
    reused_tokens: int
    decoded_tokens: int
    ended_decoded_tokens: int
    """Of these, tokens of rows that have ended."""


@dataclass(frozen=True)
class OpenRow:
    """A row that has not ended, as the job book needs it."""

    row_id: str
    line: int
    custom_id: str
    max_tokens: int
    size_bytes: int
    n_tokens: int
    group: str
    """Rows of one group share a context; empty for none."""
