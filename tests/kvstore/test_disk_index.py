"""The index of the disk tier: batches, refusals by name, damage."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longreach.core.errors import FailedPrecondition
from longreach.kvstore.disk_index import DiskIndex, IndexRow
from longreach.kvstore.page import page_checksums

from .kv_helpers import GEOMETRY, RECIPE, ROOT, key_of, page_of


def row(slot: int, i: int) -> IndexRow:
    return IndexRow(slot, key_of(i), ROOT, RECIPE, page_checksums(page_of(i), GEOMETRY))


def slots_of(path: Path) -> dict[int, bytes]:
    index = DiskIndex(path, GEOMETRY)
    found = {r.slot: bytes(r.key) for r in index.rows()}
    index.close()
    return found


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "s.index"
    index = DiskIndex(path, GEOMETRY)
    index.put(row(3, 1))
    index.put(row(5, 2))
    assert index.flush() == 2
    index.remove(3)
    index.put(row(7, 3))
    index.put(row(7, 4))  # the last state of a slot counts
    assert index.flush() == 2
    index.close()
    again = DiskIndex(path, GEOMETRY)
    found = list(again.rows())
    again.close()
    assert [(r.slot, r.key) for r in found] == [(5, key_of(2)), (7, key_of(4))]
    assert np.array_equal(found[0].checksums, page_checksums(page_of(2), GEOMETRY))
    assert (found[0].parent_key, found[0].recipe) == (ROOT, RECIPE)


def test_another_geometry_is_refused_with_both(tmp_path: Path) -> None:
    path = tmp_path / "s.index"
    index = DiskIndex(path, GEOMETRY)
    index.put(row(0, 1))
    index.flush()
    index.close()
    other = replace(GEOMETRY, head_dim=32)
    with pytest.raises(FailedPrecondition, match=r'"head_dim": 16.*"head_dim": 32'):
        DiskIndex(path, other)
    assert slots_of(path) == {0: key_of(1)}, "a refusal changes nothing"


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.index"
    index = DiskIndex(path, GEOMETRY)
    index.put(row(0, 1))
    index.flush()
    index.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '99' WHERE name = 'format_version'")
    db.close()
    with pytest.raises(FailedPrecondition, match="format_version 99, this store's is 1"):
        DiskIndex(path, GEOMETRY)


def test_an_empty_index_takes_any_geometry(tmp_path: Path) -> None:
    path = tmp_path / "s.index"
    DiskIndex(path, replace(GEOMETRY, head_dim=32)).close()
    index = DiskIndex(path, GEOMETRY)
    index.put(row(0, 1))
    index.flush()
    index.close()
    assert slots_of(path) == {0: key_of(1)}


@pytest.mark.parametrize("damage", ["not a database", "pages overwritten"])
def test_a_damaged_index_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.index"
    index = DiskIndex(path, GEOMETRY)
    for slot in range(200):
        index.put(row(slot, slot))
    index.flush()
    index.close()
    raw = bytearray(path.read_bytes())
    if damage == "not a database":
        raw[:] = b"x" * len(raw)
    else:
        raw[8192:] = os.urandom(len(raw) - 8192)
    path.write_bytes(raw)
    assert slots_of(path) == {}
    assert (tmp_path / "s.damaged").exists()


def test_an_index_that_cannot_be_opened_now_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s.index").mkdir()
    with pytest.raises(FailedPrecondition, match=r"s\.index cannot be opened"):
        DiskIndex(tmp_path / "s.index", GEOMETRY)
    assert os.listdir(tmp_path) == ["s.index"]


def test_a_batch_that_cannot_be_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "s.index"
    index = DiskIndex(path, GEOMETRY)
    index.put(row(0, 1))
    blocker = sqlite3.connect(path)
    index._db.execute("PRAGMA busy_timeout = 1")
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match="locked"):
        index.flush()
    index.put(row(0, 2))  # newer than what failed
    index.put(row(1, 3))
    blocker.rollback()
    blocker.close()
    assert index.flush() == 2
    index.close()
    assert slots_of(path) == {0: key_of(2), 1: key_of(3)}


def test_kill_in_the_middle_of_batches(tmp_path: Path) -> None:
    """Batch n writes slots 0..9 with one key: after a kill all rows are of one batch."""
    path = tmp_path / "s.index"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from longreach.kvstore.disk_index import DiskIndex\n"
        "from longreach.kvstore.page import PageGeometry\n"
        "from longreach.kvstore.disk_index import IndexRow\n"
        "import numpy as np\n"
        "index = DiskIndex(Path(sys.argv[1]), PageGeometry(3, 2, 8, 16, 'float16'))\n"
        "sums = np.zeros(6, np.uint64)\n"
        "for n in range(10**9):\n"
        "    key = n.to_bytes(32, 'big')\n"
        "    for slot in range(10):\n"
        "        index.put(IndexRow(slot, key, key, key, sums))\n"
        "    index.flush()\n"
        "    print(n, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 20:
            break
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    found = slots_of(path)
    assert len(found) == 10
    assert len(set(found.values())) == 1
    assert int.from_bytes(found[0], "big") >= 20, "what was committed is there"
