"""Taking a batch in: spool the bytes, parse, store the contexts once, journal, answer."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.config import Config
from ..core.errors import InvalidInput, LongreachError, QueueFull, ResourceExhausted
from .batch import BatchRow, parse_batch
from .contexts import ROW_SOURCE, ContextStore
from .journal import Journal
from .records import NewRow
from .results import error_line

MAX_BATCH_BYTES = 8 << 30
"""Largest batch taken in one Submit; longer ones are split, or name contexts by reference."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Submission:
    """What Submit answers."""

    job_id: str
    existed: bool


class Intake:
    """Thread-safe: several batches may come in at once."""

    def __init__(self, config: Config, journal: Journal, contexts: ContextStore) -> None:
        self._config = config
        self._journal = journal
        self._contexts = contexts
        self._spool = journal.state_dir / "spool"
        self._spool.mkdir(exist_ok=True)
        for left_over in self._spool.iterdir():
            left_over.unlink()

    def submit(
        self, chunks: Iterable[bytes], *, name: str, idempotency_key: str, n_open_rows: int
    ) -> Submission:
        """Take a batch in; the job is durable when this returns.

        Raises QueueFull (more rows than gateway.max_queued_rows would be open), AlreadyExists
        (key used with other bytes), InvalidInput (no row at all).
        """
        with self._spooled(chunks) as (path, sha256):
            if idempotency_key:
                existing = self._journal.find_job(idempotency_key, sha256)
                if existing:
                    return Submission(existing, existed=True)
            job_id = f"job-{secrets.token_hex(8)}"
            hold: set[str] = set()
            try:
                rows = self._rows(job_id, path, n_open_rows, hold)
                self._journal.accept_job(job_id, name, idempotency_key, sha256, rows)
            finally:
                self._contexts.release(hold)
        return Submission(job_id, existed=False)

    def _rows(self, job_id: str, path: Path, n_open_rows: int, hold: set[str]) -> Iterator[NewRow]:
        limit = self._config.gateway.max_queued_rows
        n_rows = 0
        with open(path, "rb") as spooled:
            chunks = iter(lambda: spooled.read(_READ_BYTES), b"")
            for parsed in parse_batch(chunks, self._config):
                n_rows += 1
                if n_open_rows + n_rows > limit:
                    raise QueueFull(
                        f"{n_open_rows} rows are open and this batch has more than "
                        f"{n_rows - 1} rows; gateway.max_queued_rows is {limit}",
                        open_rows=n_open_rows,
                        limit=limit,
                    )
                yield self._new_row(job_id, parsed, hold)
        if not n_rows:
            raise InvalidInput("the batch holds no row", field="batch")

    def _new_row(self, job_id: str, parsed: BatchRow, hold: set[str]) -> NewRow:
        spec, error = parsed.spec, parsed.error
        size_bytes = 0
        if spec is not None:
            size_bytes = spec.size_chars
            try:
                if spec.context is not None:
                    # a text that many rows repeat is kept once, outside the journal
                    record = self._contexts.add((spec.context.encode(),), ROW_SOURCE, hold)
                    size_bytes += record.n_bytes - len(spec.context)
                    spec = spec.model_copy(
                        update={"context": None, "context_id": record.context_id}
                    )
                elif spec.context_id is not None:
                    size_bytes += self._contexts.get(spec.context_id).n_bytes
            except LongreachError as exc:
                exc.details.setdefault("line", parsed.line)
                spec, error = None, exc
        if error is None:
            return NewRow(parsed.line, parsed.custom_id, spec, size_bytes)
        return NewRow(
            parsed.line,
            parsed.custom_id,
            None,
            error=error.reason,
            result=error_line(f"{job_id}.{parsed.line}", parsed.custom_id, error),
        )

    @contextmanager
    def _spooled(self, chunks: Iterable[bytes]) -> Iterator[tuple[Path, str]]:
        digest = hashlib.sha256()
        n_bytes = 0
        handle, name = tempfile.mkstemp(dir=self._spool)
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as out:
                for chunk in chunks:
                    n_bytes += len(chunk)
                    if n_bytes > MAX_BATCH_BYTES:
                        raise ResourceExhausted(
                            f"batch of more than {MAX_BATCH_BYTES} bytes; split it, or name its "
                            "contexts by context_id or context_uri"
                        )
                    digest.update(chunk)
                    out.write(chunk)
            yield path, digest.hexdigest()
        finally:
            path.unlink(missing_ok=True)
