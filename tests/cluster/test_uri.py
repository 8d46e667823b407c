"""Reading by URI ends: at the bound, at the deadline, or with what is there."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from longreach.cluster.uri import CHUNK_BYTES, read_uri
from longreach.core.errors import ContextTooLong, UnreadableUri


def read(uri: str, max_bytes: int = 10**9, timeout_s: float = 5.0) -> bytes:
    return b"".join(
        read_uri(uri, max_bytes=max_bytes, timeout_s=timeout_s, protocols=("file", "memory"))
    )


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 7 * CHUNK_BYTES + 3])
def test_all_bytes_arrive(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "x"
    path.write_bytes(data)
    assert read(str(path)) == read(path.as_uri()) == data


def test_more_than_the_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 1000)
    assert len(read(str(path), max_bytes=1000)) == 1000
    with pytest.raises(ContextTooLong, match="more than 999 bytes"):
        read(str(path), max_bytes=999)


def test_a_silent_source_ends_at_the_deadline(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    began_s = time.monotonic()
    with pytest.raises(UnreadableUri, match=r"no data for 0\.3 s"):
        read(str(fifo), timeout_s=0.3)
    assert time.monotonic() - began_s < 3.0
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # lets the waiting thread go


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("", "empty"),
        ("/no/such/file", "no such file"),
        ("/tmp", "directory"),
        ("ftp://host/x", "'ftp' is not allowed"),
        ("zip://x::file:///a.zip", "'zip' is not allowed"),
        ("file:///a\x00b", "zero byte"),
    ],
)
def test_refusals_say_why(uri: str, why: str) -> None:
    with pytest.raises(UnreadableUri, match=why):
        read(uri)


def test_a_reader_that_leaves_ends_the_thread(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * (20 * CHUNK_BYTES))
    chunks = read_uri(str(path), max_bytes=10**9, timeout_s=5.0, protocols=("file",))
    next(chunks)
    chunks.close()
    deadline_s = time.monotonic() + 5
    while any(thread.name == "uri" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
