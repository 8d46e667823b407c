"""What the disk tier's slots hold, in SQLite beside the file of slots.

Rows are changed in memory at once and written in batches, behind the page bytes. A crash loses the
last batches: pages then have no row, which frees their slots, or rows have other bytes in their
slot, which their checksums tell. So the index needs no order with the page bytes, and a batch is
there in full or not at all.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FailedPrecondition, InvalidInput
from ..core.page_key import PageKey, RecipeFingerprint
from .page import Checksums, PageGeometry, checksums_from_wire, checksums_to_wire

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pages (
    slot INTEGER PRIMARY KEY, key BLOB NOT NULL, parent BLOB NOT NULL, recipe BLOB NOT NULL,
    checksums BLOB NOT NULL
);
"""


@dataclass(frozen=True, eq=False, slots=True)
class IndexRow:
    """A page in a slot of the file. `checksums`: uint64 [n_leaves]."""

    slot: int
    key: PageKey
    parent_key: PageKey
    recipe: RecipeFingerprint
    checksums: Checksums


class DiskIndex:
    """Thread-safe."""

    def __init__(self, path: Path, geometry: PageGeometry) -> None:
        """Opens or makes the index. One that cannot be read is set aside and a new one made, with
        the pages lost. Raises FailedPrecondition if it holds pages of another geometry or format
        version, or cannot be opened now (a full disk)."""
        self.path = path
        self._geometry = geometry
        self._pending: dict[int, IndexRow | None] = {}
        self._lock = threading.Lock()  # guards _pending, briefly
        self._writing = threading.Lock()  # guards the connection
        try:
            self._db = self._open()
        except sqlite3.OperationalError as exc:  # a full or failing disk damages nothing
            raise FailedPrecondition(f"{path} cannot be opened: {exc}") from exc
        except sqlite3.DatabaseError as exc:
            aside = path.with_suffix(".damaged")
            logger.error("%s cannot be read (%s); set aside as %s", path, exc, aside.name)
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open()

    def rows(self) -> Iterator[IndexRow]:
        """What was committed, before any change of this process."""
        with self._writing:
            found = self._db.execute(
                "SELECT slot, key, parent, recipe, checksums FROM pages ORDER BY slot"
            ).fetchall()
        for slot, key, parent, recipe, checksums in found:
            try:
                sums = checksums_from_wire(checksums, self._geometry)
            except InvalidInput as exc:
                logger.error("%s: slot %d: %s", self.path, slot, exc.message)
                self.remove(slot)
                continue
            yield IndexRow(slot, PageKey(key), PageKey(parent), RecipeFingerprint(recipe), sums)

    def put(self, row: IndexRow) -> None:
        with self._lock:
            self._pending[row.slot] = row

    def remove(self, slot: int) -> None:
        with self._lock:
            self._pending[slot] = None

    def n_pending(self) -> int:
        return len(self._pending)

    def flush(self) -> int:
        """Commits what has changed, all of it or nothing. Returns how many slots. Raises OSError if
        that cannot be written now; it stays pending."""
        with self._writing:
            with self._lock:
                batch, self._pending = self._pending, {}
            if not batch:
                return 0
            gone = [(slot,) for slot, row in batch.items() if row is None]
            put = [
                (row.slot, row.key, row.parent_key, row.recipe, checksums_to_wire(row.checksums))
                for row in batch.values()
                if row is not None
            ]
            try:
                with self._db:
                    self._db.executemany("DELETE FROM pages WHERE slot = ?", gone)
                    self._db.executemany("REPLACE INTO pages VALUES (?, ?, ?, ?, ?)", put)
            except sqlite3.Error as exc:
                with self._lock:
                    self._pending = {**batch, **self._pending}
                raise OSError(f"{self.path}: {exc}") from exc
            return len(batch)

    def close(self) -> None:
        with self._writing:
            self._db.close()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, check_same_thread=False, timeout=5.0)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_TABLES)
            with closing(db.execute("PRAGMA quick_check(1)")) as check:
                if (told := check.fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(told)
            self._check_meta(db)
        except BaseException:
            db.close()
            raise
        return db

    def _check_meta(self, db: sqlite3.Connection) -> None:
        mine = {
            "format_version": str(FORMAT_VERSION),
            "geometry": json.dumps(self._geometry.to_dict(), sort_keys=True),
        }
        theirs = dict(db.execute("SELECT name, value FROM meta"))
        if theirs == mine:
            return
        n_pages = db.execute("SELECT count(*) FROM pages").fetchone()[0]
        if n_pages:
            differing = [
                f"{name} {theirs.get(name, 'none')}, this store's is {value}"
                for name, value in mine.items()
                if theirs.get(name) != value
            ]
            raise FailedPrecondition(
                f"{self.path} holds {n_pages} pages of {'; '.join(differing)}; give each model its "
                "own store.disk_dir, or delete the files"
            )
        with db:
            db.executemany("REPLACE INTO meta VALUES (?, ?)", mine.items())
