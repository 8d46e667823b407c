"""Tokens so far of rows that run: buffered briefly, written in order, never twice."""

from __future__ import annotations

import logging
import sqlite3
import threading
from array import array

from ..core.errors import FailedPrecondition
from .journal_file import OPEN_STATES, JournalFile

log = logging.getLogger("longreach.journal")
FLUSH_INTERVAL_S = 0.25
"""Longest time a token waits in memory before it is written."""


class TokenLog:
    """Thread-safe. What `flush` has written survives the process."""

    def __init__(self, file: JournalFile) -> None:
        self._file = file
        self._pending: dict[str, tuple[int, array[int]]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flush_loop, name="token-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is buffered and stop."""
        self._stop.set()
        self._thread.join(timeout=10)
        self.flush()

    def append(self, row_id: str, index: int, token_id: int) -> None:
        """Buffer one token; `index` counts from 0 over the row's new tokens.

        Raises FailedPrecondition on a gap or a repetition within the buffer.
        """
        with self._lock:
            first, ids = self._pending.setdefault(row_id, (index, array("I")))
            if index == first + len(ids):
                ids.append(token_id)
                return
        raise FailedPrecondition(
            f"row {row_id}: token {index} after {first + len(ids)} tokens; tokens come in order"
        )

    def forget(self, row_id: str) -> None:
        """Drop what is buffered for a row that ends."""
        with self._lock:
            self._pending.pop(row_id, None)

    def flush(self) -> None:
        """Write everything buffered; kept for the next try if the disk refuses."""
        with self._lock:
            if not self._pending:
                return
            with self._file.transaction() as db:
                for row_id, (first, ids) in self._pending.items():
                    self._write(db, row_id, first, ids)
            self._pending = {}

    def read(self, row_id: str) -> list[int]:
        self.flush()
        ids: array[int] = array("I")
        for chunk in self._file.read(
            "SELECT ids FROM tokens WHERE row_id = ? ORDER BY first_index", (row_id,)
        ):
            ids.frombytes(chunk["ids"])
        return ids.tolist()

    def _write(self, db: sqlite3.Connection, row_id: str, first: int, ids: array[int]) -> None:
        # the guard on n_tokens: a row that ended, or that is further on, takes nothing
        changed = db.execute(
            "UPDATE rows SET n_tokens = n_tokens + ?"
            f" WHERE row_id = ? AND n_tokens = ? AND state IN {OPEN_STATES}",
            (len(ids), row_id, first),
        ).rowcount
        if changed:
            db.execute("INSERT INTO tokens VALUES (?, ?, ?)", (row_id, first, ids.tobytes()))

    def _flush_loop(self) -> None:
        while not self._stop.wait(FLUSH_INTERVAL_S):
            try:
                self.flush()
            except sqlite3.Error as exc:
                log.error("tokens so far could not be written: %s", exc)
