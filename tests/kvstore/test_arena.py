"""Arena files: mapping elsewhere, survival of readers, sweeping of the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longreach.core.errors import ConfigError, FailedPrecondition
from longreach.kvstore.arena import Arena, sweep

from .kv_helpers import GEOMETRY, page_of

CAPACITY = 4 * GEOMETRY.page_nbytes


def test_two_mappings_share_bytes(tmp_path: Path) -> None:
    owner = Arena.create(tmp_path, GEOMETRY, CAPACITY + 5, "store-0")
    assert owner.n_slots == 4
    other = Arena.open(owner.path, GEOMETRY, 4)
    reader = Arena.open(owner.path, GEOMETRY, 4, readonly=True)
    assert owner.reserve(2)
    other.slots[2] = page_of(1)
    assert (owner.slots[2] == page_of(1)).all()
    assert (reader.slots[2] == page_of(1)).all()
    with pytest.raises(ValueError, match="read-only"):
        reader.slots[2, 0] = 0
    owner.close()
    owner.close()


def test_readers_outlive_the_owner_and_the_next_incarnation_has_another_name(
    tmp_path: Path,
) -> None:
    first = Arena.create(tmp_path, GEOMETRY, CAPACITY, "store-0")
    first.slots[1] = page_of(1)
    reader = Arena.open(first.path, GEOMETRY, 4)
    first.close()
    second = Arena.create(tmp_path, GEOMETRY, CAPACITY, "store-0")
    second.slots[1] = page_of(2)
    assert second.path != first.path
    assert (reader.slots[1] == page_of(1)).all()
    second.close()
    assert os.listdir(tmp_path) == []


def test_sweep_spares_the_living(tmp_path: Path) -> None:
    (tmp_path / "somebody-elses-file").touch()
    living = Arena.create(tmp_path, GEOMETRY, CAPACITY, "a/b c")
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "import os, signal\n"
        "from kv_helpers import GEOMETRY\n"
        "from longreach.kvstore.arena import Arena\n"
        f"arena = Arena.create({str(tmp_path)!r}, GEOMETRY, {CAPACITY}, 'dead')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(os.listdir(tmp_path)) == 3
    (removed,) = sweep(tmp_path)
    assert ".dead." in removed
    assert living.path.exists()
    assert sweep(tmp_path) == []
    living.close()
    assert os.listdir(tmp_path) == ["somebody-elses-file"]


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.capacity_bytes"):
        Arena.create(tmp_path, GEOMETRY, GEOMETRY.page_nbytes - 1, "x")
    with pytest.raises(ConfigError, match=r"store\.arena_dir"):
        Arena.create(tmp_path / "absent", GEOMETRY, CAPACITY, "x")
    with pytest.raises(FailedPrecondition):
        Arena.open(tmp_path / "absent", GEOMETRY, 4)
    arena = Arena.create(tmp_path, GEOMETRY, CAPACITY, "x")
    with pytest.raises(FailedPrecondition, match="bytes"):
        Arena.open(arena.path, GEOMETRY, 5)
    arena.close()
