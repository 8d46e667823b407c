"""What must survive: jobs, rows, tokens so far, results, contexts. Every rule is a guard in SQL.

A job counts once `accept_job` has returned. A row ends once: `end_row` changes it only out of
queued or running, in the same transaction that writes its result line.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..core.clock import Clock, SystemClock
from ..core.errors import AlreadyExists, NotFound
from .journal_file import OPEN_STATES, JournalFile
from .records import JobRecord, NewRow, OpenRow, RowEnd
from .row import JobState, RowSpec, RowState
from .token_log import TokenLog

_INSERT_ROWS = 500


class Journal(JournalFile):
    """Thread-safe. Everything but `tokens` is durable when the call returns."""

    def __init__(self, state_dir: str | Path, clock: Clock | None = None) -> None:
        super().__init__(state_dir)
        self._clock = clock or SystemClock()
        self._forget_unaccepted()
        self.tokens = TokenLog(self)

    def close(self) -> None:
        if not self.closed:
            self.tokens.close()
        super().close()

    def recover(self) -> list[str]:
        """Queue rows that ran when the last process ended; ids of jobs not ended, oldest first."""
        with self.transaction() as db:
            db.execute("UPDATE rows SET state = 'queued' WHERE state = 'running'")
        found = self.read(
            "SELECT job_id FROM jobs WHERE state NOT IN ('completed', 'failed', 'cancelled')"
            " ORDER BY created_s, job_id"
        )
        return [str(job["job_id"]) for job in found]

    # jobs

    def find_job(self, idempotency_key: str, content_sha256: str) -> str | None:
        """The job that was accepted with this key. Raises AlreadyExists if its bytes differ."""
        found = self.read(
            "SELECT job_id, content_sha256 FROM jobs WHERE idempotency_key = ?", (idempotency_key,)
        )
        if not idempotency_key or not found:
            return None
        if found[0]["content_sha256"] != content_sha256:
            raise AlreadyExists(
                f"idempotency key '{idempotency_key}' belongs to {found[0]['job_id']}, which has "
                "other content; use a new key",
                job_id=found[0]["job_id"],
            )
        return str(found[0]["job_id"])

    def accept_job(
        self,
        job_id: str,
        name: str,
        idempotency_key: str,
        content_sha256: str,
        rows: Iterable[NewRow],
    ) -> int:
        """Write a whole job; it exists only when this returns (its number of rows).

        Raises AlreadyExists if a job with the same key was accepted meanwhile.
        """
        n_rows = 0
        try:
            with self.transaction() as db:
                db.execute(
                    "INSERT INTO jobs (job_id, name, state, content_sha256, created_s)"
                    " VALUES (?, ?, 'submitting', ?, ?)",
                    (job_id, name, content_sha256, self._clock.wall_s()),
                )
            for batch in _batches(rows, _INSERT_ROWS):
                with self.transaction() as db:
                    for row in batch:
                        self._insert_row(db, job_id, row)
                n_rows += len(batch)
            with self.transaction() as db:
                db.execute(
                    "UPDATE jobs SET state = 'queued', idempotency_key = ? WHERE job_id = ?",
                    (idempotency_key or None, job_id),
                )
        except BaseException as exc:
            self._delete_job(job_id)
            if isinstance(exc, sqlite3.IntegrityError):
                raise AlreadyExists(f"idempotency key '{idempotency_key}' is taken") from exc
            raise
        return n_rows

    def set_job_state(self, job_id: str, state: JobState) -> None:
        """An ended job stays as it is, and a job ends only when all its rows have."""
        stamp, guard = "", ""
        values: list[str | float] = [state.value]
        if state == JobState.RUNNING or state.ended:
            stamp = ", ended_s = ?" if state.ended else ", started_s = ?"
            values.append(self._clock.wall_s())
        if state.ended:
            guard = (
                " AND NOT EXISTS (SELECT 1 FROM rows WHERE rows.job_id = jobs.job_id"
                f" AND rows.state IN {OPEN_STATES})"
            )
        with self.transaction() as db:
            db.execute(
                f"UPDATE jobs SET state = ?{stamp} WHERE job_id = ?"
                f" AND state NOT IN ('completed', 'failed', 'cancelled'){guard}",
                (*values, job_id),
            )

    def job(self, job_id: str) -> JobRecord:
        """Raises NotFound."""
        self.job_state(job_id)
        return self._record(self.read("SELECT * FROM jobs WHERE job_id = ?", (job_id,))[0])

    def job_state(self, job_id: str) -> JobState:
        """Raises NotFound."""
        found = self.read(
            "SELECT state FROM jobs WHERE job_id = ? AND state != 'submitting'", (job_id,)
        )
        if not found:
            raise NotFound(f"no job '{job_id:.80}'", job_id=job_id[:80])
        return JobState(found[0]["state"])

    def jobs(self, limit: int, active_only: bool = False) -> list[JobRecord]:
        """Newest first."""
        ended = "AND state NOT IN ('completed', 'failed', 'cancelled')" if active_only else ""
        found = self.read(
            f"SELECT * FROM jobs WHERE state != 'submitting' {ended}"
            " ORDER BY created_s DESC, job_id LIMIT ?",
            (limit,),
        )
        return [self._record(job) for job in found]

    def open_rows(self, job_id: str) -> list[OpenRow]:
        """Rows that have not ended, in file order."""
        self.tokens.flush()
        found = self.read(
            "SELECT row_id, line, custom_id, max_tokens, size_bytes, n_tokens,"
            " COALESCE(context_uri, context_id, '') AS context_group"
            f" FROM rows WHERE job_id = ? AND state IN {OPEN_STATES} ORDER BY line",
            (job_id,),
        )
        return [OpenRow(*row) for row in found]

    # rows

    def start_row(self, row_id: str) -> None:
        with self.transaction() as db:
            db.execute(
                "UPDATE rows SET state = 'running', attempts = attempts + 1,"
                " started_s = CASE started_s WHEN 0 THEN ? ELSE started_s END"
                f" WHERE row_id = ? AND state IN {OPEN_STATES}",
                (self._clock.wall_s(), row_id),
            )

    def requeue_row(self, row_id: str) -> None:
        with self.transaction() as db:
            db.execute(
                "UPDATE rows SET state = 'queued' WHERE row_id = ? AND state = 'running'", (row_id,)
            )

    def spec(self, row_id: str) -> RowSpec:
        """Raises NotFound if the row has ended."""
        found = self.read("SELECT spec FROM rows WHERE row_id = ?", (row_id,))
        if not found or found[0]["spec"] is None:
            raise NotFound(f"no open row '{row_id}'", row_id=row_id)
        return RowSpec.model_validate_json(found[0]["spec"])

    def bind_context(self, row_id: str, context_id: str, size_bytes: int) -> None:
        """Note what a row's URI held when it was read, so that a retry asks the same text."""
        with self.transaction() as db:
            db.execute(
                "UPDATE rows SET context_id = ?, size_bytes = ? WHERE row_id = ?",
                (context_id, size_bytes, row_id),
            )

    def bound_context(self, row_id: str) -> str | None:
        """The context that this row, or one of its job with the same URI, was bound to."""
        found = self.read(
            "SELECT other.context_id FROM rows JOIN rows AS other ON other.job_id = rows.job_id"
            " AND other.context_uri = rows.context_uri WHERE rows.row_id = ?"
            " AND other.context_id IS NOT NULL ORDER BY other.line LIMIT 1",
            (row_id,),
        )
        return str(found[0]["context_id"]) if found else None

    def end_row(self, end: RowEnd) -> bool:
        """False if the row had ended before; then nothing changes."""
        return self.end_rows((end,)) == 1

    def end_rows(self, ends: Sequence[RowEnd]) -> int:
        """Write ends and result lines together, in order. How many rows had not ended before."""
        n_ended = 0
        for end in ends:
            # before the transaction: the token log takes its own lock first, then the writer's
            self.tokens.forget(end.row_id)
        with self.transaction() as db:
            for end in ends:
                changed = db.execute(
                    "UPDATE rows SET state = ?, spec = NULL, error = ?, prompt_tokens = ?,"
                    " reused_tokens = ?, n_tokens = MAX(n_tokens, ?), ended_s = ?"
                    f" WHERE row_id = ? AND state IN {OPEN_STATES}",
                    (
                        *(end.state.value, end.error, end.prompt_tokens, end.reused_tokens),
                        *(end.decoded_tokens, self._clock.wall_s(), end.row_id),
                    ),
                ).rowcount
                if changed:
                    self._insert_result(db, end.row_id, end.result)
                    db.execute("DELETE FROM tokens WHERE row_id = ?", (end.row_id,))
                n_ended += changed
        return n_ended

    def results(self, job_id: str, offset: int, limit: int) -> list[tuple[int, str, str]]:
        """(position, custom_id, line) in the order rows ended."""
        found = self.read(
            "SELECT position, custom_id, line FROM results WHERE job_id = ? AND position >= ?"
            " ORDER BY position LIMIT ?",
            (job_id, offset, limit),
        )
        return [(row["position"], row["custom_id"], row["line"]) for row in found]

    # inside

    def _insert_row(self, db: sqlite3.Connection, job_id: str, row: NewRow) -> None:
        row_id = f"{job_id}.{row.line}"
        spec = row.spec
        db.execute(
            "INSERT INTO rows (row_id, job_id, line, custom_id, state, spec, context_id,"
            " context_uri, max_tokens, size_bytes, error, ended_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(row_id, job_id, row.line, row.custom_id),
                RowState.QUEUED if spec else RowState.FAILED,
                spec.model_dump_json(exclude_defaults=True) if spec else None,
                spec.context_id if spec else None,
                spec.context_uri if spec else None,
                spec.sampling.max_tokens if spec else 0,
                *(row.size_bytes, row.error, 0 if spec else self._clock.wall_s()),
            ),
        )
        if not spec:
            self._insert_result(db, row_id, row.result)

    def _insert_result(self, db: sqlite3.Connection, row_id: str, line: str) -> None:
        db.execute(
            "INSERT INTO results SELECT job_id, (SELECT COALESCE(MAX(position) + 1, 0) FROM results"
            " WHERE results.job_id = rows.job_id), row_id, custom_id, ? FROM rows WHERE row_id = ?",
            (line, row_id),
        )

    def _record(self, job: sqlite3.Row) -> JobRecord:
        counts = {state: 0 for state in RowState}
        sums = [0, 0, 0]
        ended_decoded = 0
        for row in self.read(
            "SELECT state, COUNT(*), SUM(prompt_tokens), SUM(reused_tokens), SUM(n_tokens)"
            " FROM rows WHERE job_id = ? GROUP BY state",
            (job["job_id"],),
        ):
            counts[RowState(row["state"])] = row[1]
            sums = [total + value for total, value in zip(sums, row[2:], strict=True)]
            ended_decoded += row[4] if RowState(row["state"]).ended else 0
        return JobRecord(
            job["job_id"],
            job["name"],
            JobState(job["state"]),
            job["idempotency_key"] or "",
            job["created_s"],
            job["started_s"],
            job["ended_s"],
            counts,
            sums[0],
            sums[1],
            sums[2],
            ended_decoded,
        )

    def _forget_unaccepted(self) -> None:
        """Jobs whose Submit was cut off by a crash were never promised to anybody."""
        for job in self.read("SELECT job_id FROM jobs WHERE state = 'submitting'"):
            self._delete_job(job["job_id"])

    def _delete_job(self, job_id: str) -> None:
        with self.transaction() as db:
            for table in ("results", "rows", "jobs"):
                db.execute(f"DELETE FROM {table} WHERE job_id = ?", (job_id,))


def _batches(rows: Iterable[NewRow], size: int) -> Iterator[list[NewRow]]:
    batch: list[NewRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
