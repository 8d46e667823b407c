"""A store process that is killed in the middle of its work and started again on the same files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.core.errors import FailedPrecondition, LongreachError
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.transport import connect

from .kv_helpers import GEOMETRY, RECIPE, ROOT, bytes_at, key_of, page_of, take

N = GEOMETRY.page_nbytes
N_ARENA, N_DISK = 16, 400
CHILD = f"""
import sys, time
from longreach.core.store_config import StoreConfig
from longreach.kvstore.page import PageGeometry
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import serve
config = StoreConfig(disk_dir=sys.argv[1], disk_bytes={N_DISK * N}, disk_write=sys.argv[3])
geometry = PageGeometry(3, 2, 8, 16, "float16")
store = StoreService("s", "node-0", sys.argv[2], geometry, {N_ARENA * N}, config=config)
print(serve(store).address, flush=True)
time.sleep(120)
"""


class Child:
    def __init__(self, root: Path, mode: str) -> None:
        (root / "arena").mkdir(exist_ok=True)
        arguments = [str(root / "disk"), str(root / "arena"), mode]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the store did not come up"

    def client(self, owner: str) -> PageClient:
        return PageClient({"s": self.address}, GEOMETRY, RECIPE, 1, 60.0, 5.0, "node-0", owner)

    def stats(self) -> dict[str, int]:
        channel = connect(self.address)
        try:
            return channel.call("stats", {}, timeout_s=5.0).header
        finally:
            channel.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def running(root: Path, mode: str) -> Iterator[Child]:
    child = Child(root, mode)
    try:
        yield child
    finally:
        child.kill()


@pytest.mark.parametrize("mode", ["through", "demote"])
def test_kill_in_the_middle_of_writes(tmp_path: Path, mode: str) -> None:
    """Pages are written and moved until the kill; whatever is served afterwards is right."""
    n_stored = 0
    for round_ in range(3):
        with running(tmp_path, mode) as child:
            told = child.stats()
            client = child.client(f"round-{round_}")
            if round_:
                assert told["pages_adopted"] > 0
            handles = take(client, range(n_stored), "check")
            n_found = 0
            for i, handle in enumerate(handles):
                if handle is not None:
                    n_found += 1
                    assert (bytes_at(client, handle) == page_of(i)).all()
            told = child.stats()
            # adopted pages that were no good are counted and gone; all others were served
            assert n_found + told["corrupt_disk"] == told["pages_adopted"]
            client.release("check")
            futures = []
            for i in range(n_stored, n_stored + 120):
                row = f"row {i // 10}"
                futures.append(client.store(key_of(i), ROOT, page_of(i), row))
                if i % 10 == 9:
                    for future in futures:
                        future.result(10)
                    client.release(row)
                    n_stored = i + 1
                if i % 120 == 100 and mode == "through":
                    time.sleep(0.3)  # some of it has certainly reached the index
            before = child.stats()
            assert before["disk_pages"] > 0
            futures = [
                client.store(key_of(i), ROOT, page_of(i), "last")
                for i in range(n_stored, n_stored + 30)
            ]
            n_stored += 30
            child.kill()
            for future in futures:
                with contextlib.suppress(LongreachError):
                    future.result(10)
            client.close()


def test_a_living_owner_keeps_its_files(tmp_path: Path) -> None:
    with running(tmp_path, "through"):
        second = subprocess.run(
            [
                sys.executable,
                "-c",
                CHILD,
                str(tmp_path / "disk"),
                str(tmp_path / "arena"),
                "demote",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert second.returncode != 0
    assert FailedPrecondition.__name__ in second.stderr
    assert "s.pages belongs to another store process" in second.stderr
    assert len(os.listdir(tmp_path / "arena")) <= 1, "the refused one left nothing behind"
