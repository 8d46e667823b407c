"""The journal's file: exclusive lock, schema, epochs, short transactions. SQLite in WAL mode."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..core.errors import AlreadyServing, FailedPrecondition

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
OPEN_STATES = "('queued', 'running')"
"""Rows that have not ended, for use in SQL."""
_SCHEMA = """
CREATE TABLE epochs (epoch INTEGER PRIMARY KEY AUTOINCREMENT, started_s REAL, pid INTEGER);
CREATE TABLE jobs (
  job_id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  state TEXT NOT NULL,
  idempotency_key TEXT UNIQUE,
  content_sha256 TEXT NOT NULL,
  created_s REAL NOT NULL,
  started_s REAL NOT NULL DEFAULT 0,
  ended_s REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE rows (
  row_id TEXT PRIMARY KEY,
  job_id TEXT NOT NULL,
  line INTEGER NOT NULL,
  custom_id TEXT NOT NULL,
  state TEXT NOT NULL,
  spec TEXT,
  context_id TEXT,
  context_uri TEXT,
  max_tokens INTEGER NOT NULL DEFAULT 0,
  size_bytes INTEGER NOT NULL DEFAULT 0,
  attempts INTEGER NOT NULL DEFAULT 0,
  n_tokens INTEGER NOT NULL DEFAULT 0,
  prompt_tokens INTEGER NOT NULL DEFAULT 0,
  reused_tokens INTEGER NOT NULL DEFAULT 0,
  error TEXT,
  started_s REAL NOT NULL DEFAULT 0,
  ended_s REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE UNIQUE INDEX rows_by_line ON rows (job_id, line);
CREATE INDEX rows_by_state ON rows (job_id, state);
CREATE INDEX rows_by_context ON rows (context_id) WHERE context_id IS NOT NULL;
CREATE TABLE tokens (
  row_id TEXT NOT NULL,
  first_index INTEGER NOT NULL,
  ids BLOB NOT NULL,
  PRIMARY KEY (row_id, first_index)
) WITHOUT ROWID;
CREATE TABLE results (
  job_id TEXT NOT NULL,
  position INTEGER NOT NULL,
  row_id TEXT NOT NULL UNIQUE,
  custom_id TEXT NOT NULL,
  line TEXT NOT NULL,
  PRIMARY KEY (job_id, position)
);
CREATE TABLE contexts (
  context_id TEXT PRIMARY KEY,
  n_bytes INTEGER NOT NULL,
  created_s REAL NOT NULL,
  source TEXT NOT NULL
) WITHOUT ROWID;
"""


class JournalFile:
    """One process at a time; one writing connection; reads never wait for writes."""

    def __init__(self, state_dir: str | Path) -> None:
        """Lock and open `state_dir`/journal.sqlite3, made if absent.

        Raises AlreadyServing while another process holds it, FailedPrecondition for a journal
        written by another schema version.
        """
        self.state_dir = Path(state_dir)
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self._lock_file = self._take_lock()
        try:
            path = self.state_dir / "journal.sqlite3"
            self._write_lock = threading.RLock()
            self._writer = self._connect(path)
            self._open_schema(path)
            self._read_lock = threading.Lock()
            self._reader = self._connect(path)
        except BaseException:
            self._lock_file.close()
            raise
        self.closed = False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()
            self._lock_file.close()  # releases the lock

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; durable when the block is left."""
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._read_lock:
            return self._reader.execute(sql, values).fetchall()

    def take_epoch(self, now_s: float) -> int:
        """A number greater than any that this journal gave before."""
        with self.transaction() as db:
            cursor = db.execute(
                "INSERT INTO epochs (started_s, pid) VALUES (?, ?)", (now_s, os.getpid())
            )
            return int(cursor.lastrowid or 0)

    def _take_lock(self) -> TextIO:
        path = self.state_dir / "journal.lock"
        # flock belongs to the open file: the kernel drops it when the process dies, however
        held = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            held.seek(0)
            pid = held.read().strip() or "unknown"
            held.close()
            raise AlreadyServing(
                f"journal {self.state_dir} is in use by process {pid}; stop it, or set another "
                "gateway.state_dir",
                pid=pid,
            ) from exc
        held.truncate(0)
        held.write(f"{os.getpid()}\n")
        held.flush()
        return held

    def _connect(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        return db

    def _open_schema(self, path: Path) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return
        if version:
            self._writer.close()
            raise FailedPrecondition(
                f"journal {path} has schema {version}, this release reads {SCHEMA_VERSION}; "
                "use the release that wrote it, or another gateway.state_dir"
            )
        self._writer.executescript(
            f"BEGIN EXCLUSIVE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
        )
