"""The file of slots: bytes, space, locks, sizes."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longreach.core.errors import ConfigError, FailedPrecondition
from longreach.kvstore.disk import DiskTier, map_disk, write_slot

from .kv_helpers import GEOMETRY, page_of

N = GEOMETRY.page_nbytes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskTier]:
    tier = DiskTier.open(tmp_path / "deep" / "s.pages", GEOMETRY, 8 * N + 5, 1.0)
    tier.fit()
    yield tier
    tier.close()


def read(disk: DiskTier, slot: int) -> bytes:
    out = np.empty(N, np.uint8)
    disk.read_into(slot, out)
    return out.tobytes()


def test_two_ways_to_the_same_bytes(disk: DiskTier) -> None:
    assert disk.n_slots == 8
    mapped = map_disk(disk.path, GEOMETRY, 8)
    assert disk.reserve(3)
    disk.write(3, page_of(1))
    write_slot(disk.path, 4, page_of(2))
    for slot, i in ((3, 1), (4, 2)):
        assert read(disk, slot) == page_of(i).tobytes()
        assert (mapped[slot] == page_of(i)).all()
    disk.write(3, page_of(5))
    assert (mapped[3] == page_of(5)).all(), "a mapping follows the file"
    mapped[3] = 0
    assert read(disk, 3) == page_of(5).tobytes(), "and cannot change it"


def test_the_file_grows_as_slots_are_used(disk: DiskTier) -> None:
    assert disk.path.stat().st_size == 8 * N
    assert disk.path.stat().st_blocks == 0
    disk.reserve(5)
    assert 0 < disk.path.stat().st_blocks * 512 <= N + 8192


def test_a_second_owner_is_refused_by_name(disk: DiskTier) -> None:
    with pytest.raises(FailedPrecondition, match=r"s\.pages belongs to another store process"):
        DiskTier.open(disk.path, GEOMETRY, 8 * N, 0.2)


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from longreach.kvstore.disk import DiskTier\n"
        "from longreach.kvstore.page import PageGeometry\n"
        f"geometry = PageGeometry(3, 2, 8, 16, 'float16')\n"
        f"tier = DiskTier.open(Path(sys.argv[1]), geometry, {8 * N}, 1.0)\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "s.pages"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    with pytest.raises(FailedPrecondition):
        DiskTier.open(path, GEOMETRY, 8 * N, 0.2)
    child.kill()  # waited for only after the next open: it may meet the lock still held
    DiskTier.open(path, GEOMETRY, 8 * N, 5.0).close()
    child.wait(10)
    child.stdout.close()


def test_a_full_disk_is_an_answer_other_failures_are_errors(disk: DiskTier) -> None:
    class Hook:
        code = errno.ENOSPC

        def before_write(self, slot: int) -> None:
            raise OSError(self.code, "injected")

        def before_read(self, slot: int) -> None:
            raise OSError(errno.EIO, "injected")

    disk.reserve(0)
    disk.hook = Hook()
    assert disk.reserve(0), "space once taken stays"
    assert not disk.reserve(1)
    disk.hook.code = errno.EIO
    with pytest.raises(OSError, match="injected"):
        disk.reserve(1)
    with pytest.raises(OSError, match="injected"):
        disk.write(0, page_of(0))
    with pytest.raises(OSError, match="injected"):
        read(disk, 0)


def test_a_truncated_file_reads_as_zeros_and_never_ends_early(disk: DiskTier) -> None:
    disk.write(6, page_of(1))
    disk.close()
    with disk.path.open("r+b") as file:
        file.truncate(6 * N + 100)
    again = DiskTier.open(disk.path, GEOMETRY, 8 * N, 1.0)
    again.fit()
    assert read(again, 6) == page_of(1)[:100].tobytes() + bytes(N - 100)
    assert not any(read(again, 7))
    with again.path.open("r+b") as file:  # while it is open: an error, not zeros
        file.truncate(6 * N + 100)
    with pytest.raises(OSError, match="ends at byte"):
        read(again, 6)
    again.close()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.disk_bytes"):
        DiskTier.open(tmp_path / "s.pages", GEOMETRY, N - 1, 1.0)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"store\.disk_dir"):
        DiskTier.open(tmp_path / "file" / "s.pages", GEOMETRY, N, 1.0)
    with pytest.raises(FailedPrecondition, match="cannot map"):
        map_disk(tmp_path / "nothing", GEOMETRY, 1)
    (tmp_path / "short").write_bytes(bytes(N - 1))
    with pytest.raises(FailedPrecondition, match="bytes, not"):
        map_disk(tmp_path / "short", GEOMETRY, 1)
