"""Documents named by their content: files beside the journal, noted in it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..core.clock import Clock, SystemClock
from ..core.errors import (
    ContextTooLong,
    EmptyContext,
    FailedPrecondition,
    InvalidInput,
    NotFound,
)
from .journal_file import OPEN_STATES, JournalFile

ROW_SOURCE = "row"
"""Source of a context that came inside a batch line; it goes when no row needs it."""
_ID = re.compile(r"ctx-[0-9a-f]{64}")


@dataclass(frozen=True)
class ContextRecord:
    """What the journal notes of a context."""

    context_id: str
    n_bytes: int
    created_s: float
    source: str


class ContextStore:
    """Thread-safe. A context exists once its bytes are on disk and the journal notes it."""

    def __init__(self, journal: JournalFile, max_bytes: int, clock: Clock | None = None) -> None:
        self._journal = journal
        self._clock = clock or SystemClock()
        self._dir = journal.state_dir / "contexts"
        self._dir.mkdir(exist_ok=True)
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._held: Counter[str] = Counter()
        for left_over in self._dir.glob("*.part"):
            left_over.unlink()  # of a process that died in the middle of an upload

    def add(
        self, chunks: Iterable[bytes], source: str, hold: set[str] | None = None
    ) -> ContextRecord:
        """Store UTF-8 text. Raises EmptyContext, ContextTooLong, InvalidInput (not UTF-8).

        With `hold` the context also stays until `release(hold)`, for rows not yet journaled.
        """
        digest = hashlib.sha256()
        n_bytes = 0
        handle, part = tempfile.mkstemp(dir=self._dir, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as out:
                for chunk in chunks:
                    n_bytes += len(chunk)
                    if n_bytes > self.max_bytes:
                        raise ContextTooLong(
                            f"context of more than {self.max_bytes} bytes (16 per token of "
                            "model.max_context_tokens, at least 1 MiB)",
                            max_bytes=self.max_bytes,
                        )
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            _check_text(Path(part), n_bytes)
            context_id = f"ctx-{digest.hexdigest()}"
            with self._lock:
                if hold is not None and context_id not in hold:
                    hold.add(context_id)
                    self._held[context_id] += 1
                os.replace(part, self._path(context_id))
                return self._note(context_id, n_bytes, source)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    def release(self, hold: set[str]) -> None:
        with self._lock:
            self._held.subtract(hold)
            self._held += Counter()  # drops what is not held any more

    def get(self, context_id: str) -> ContextRecord:
        """Raises NotFound."""
        found = self._journal.read("SELECT * FROM contexts WHERE context_id = ?", (context_id,))
        if not found:
            raise NotFound(f"no context '{context_id:.80}'", context_id=context_id[:80])
        return ContextRecord(*found[0])

    def text(self, context_id: str) -> str:
        """Raises NotFound."""
        self.get(context_id)
        try:
            return self._path(context_id).read_bytes().decode("utf-8")
        except FileNotFoundError as exc:
            raise NotFound(
                f"the bytes of context '{context_id}' are gone from {self._dir}; upload it again",
                context_id=context_id,
            ) from exc

    def delete(self, context_id: str) -> None:
        """Raises NotFound, or FailedPrecondition while an open row names it."""
        self.get(context_id)
        with self._lock, self._journal.transaction() as db:
            used = db.execute(
                f"SELECT row_id FROM rows WHERE context_id = ? AND state IN {OPEN_STATES} LIMIT 1",
                (context_id,),
            ).fetchone()
            if used or context_id in self._held:
                row_id = used["row_id"] if used else "of a job being submitted"
                raise FailedPrecondition(
                    f"context '{context_id}' is needed by row {row_id}; cancel its job first",
                    row_id=row_id,
                )
            db.execute("DELETE FROM contexts WHERE context_id = ?", (context_id,))
            self._path(context_id).unlink(missing_ok=True)

    def drop_unused(self, job_id: str) -> int:
        """Remove contexts that came inside lines of an ended job and that no open row names."""
        with self._lock, self._journal.transaction() as db:
            found = db.execute(
                "SELECT DISTINCT contexts.context_id FROM rows JOIN contexts USING (context_id)"
                " WHERE job_id = ? AND source = ? AND NOT EXISTS (SELECT 1 FROM rows AS other"
                f" WHERE other.context_id = rows.context_id AND other.state IN {OPEN_STATES})",
                (job_id, ROW_SOURCE),
            ).fetchall()
            unused = [row["context_id"] for row in found if row["context_id"] not in self._held]
            for context_id in unused:
                db.execute("DELETE FROM contexts WHERE context_id = ?", (context_id,))
                self._path(context_id).unlink(missing_ok=True)
        return len(unused)

    def _note(self, context_id: str, n_bytes: int, source: str) -> ContextRecord:
        with self._journal.transaction() as db:
            # a row's private copy becomes a context of its own when somebody uploads it
            db.execute(
                "INSERT INTO contexts VALUES (?, ?, ?, ?) ON CONFLICT (context_id) DO UPDATE"
                " SET source = excluded.source WHERE contexts.source = ?",
                (context_id, n_bytes, self._clock.wall_s(), source, ROW_SOURCE),
            )
        return self.get(context_id)

    def _path(self, context_id: str) -> Path:
        # the id comes from clients: only the exact form may reach the file system
        if not _ID.fullmatch(context_id):
            raise NotFound(f"no context '{context_id:.80}'", context_id=context_id[:80])
        return self._dir / f"{context_id}.txt"


def _check_text(path: Path, n_bytes: int) -> None:
    if n_bytes == 0:
        raise EmptyContext("the context has zero bytes")
    try:
        with open(path, encoding="utf-8") as text:
            blank = not any(chunk.strip() for chunk in iter(lambda: text.read(1 << 20), ""))
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"the context is not valid UTF-8: {exc.reason}") from exc
    if blank:
        raise EmptyContext(f"the context of {n_bytes} bytes holds only white space")
