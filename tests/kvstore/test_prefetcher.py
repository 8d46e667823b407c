"""Prefetch brings pages near, within its bytes, and gives way to rows."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from longreach.kvstore.prefetcher import BATCH_PAGES, advise

from .kv_helpers import GEOMETRY, Stores, check, key_of, put, take
from .test_page_fetch import at_rest, count_requests, stall, wait_until

PAGE = GEOMETRY.page_nbytes


@pytest.fixture
def far(stores: Stores) -> Stores:
    for i in range(2):
        stores.start(f"store-{i}", n_slots=100, node_id="elsewhere")
    writer = stores.client("writer")
    put(writer, range(40))
    writer.close()
    return stores


def test_what_was_prefetched_is_there_already(far: Stores) -> None:
    client = far.client()
    client.prefetch([key_of(i) for i in range(20)])
    assert wait_until(lambda: client.stats()["pages_prefetched"] == 20)
    assert client.stats()["private_pages"] == 20
    counts = count_requests(far)
    check(client, take(client, range(20)))
    assert not counts, "a store was asked again"
    assert client.stats()["prefetch_hits"] == 20
    assert client.stats()["bytes_read_wire"] == 20 * PAGE
    client.release("row")
    assert client.stats()["private_pages"] == 0
    assert at_rest(far)
    client.close()


def test_bytes_are_bounded(far: Stores) -> None:
    client = far.client(prefetch_bytes=10 * PAGE)
    client.prefetch([key_of(i) for i in range(30)])
    assert wait_until(lambda: client.stats()["pages_prefetched"] == 30)
    assert client.stats()["private_pages"] == 10
    check(client, take(client, range(30)))
    assert client.stats()["prefetch_hits"] == 10
    client.close()
    off = far.client("off", prefetch_bytes=0)
    off.prefetch([key_of(1)])
    time.sleep(0.1)
    assert off.stats()["pages_prefetched"] == 0
    off.close()


def test_pages_that_nobody_has_are_not_asked_for(far: Stores) -> None:
    client = far.client()
    client.prefetch([key_of(i) for i in (500, 1, 501)])
    assert wait_until(lambda: client.stats()["pages_prefetched"] == 1)
    assert client.stats()["failed_load_missing"] == 0
    client.close()


def test_a_row_does_not_wait_for_a_prefetch(far: Stores) -> None:
    client = far.client(timeout_s=20.0)
    gate = threading.Event()
    for service in far.services.values():
        stall(service, BATCH_PAGES // 4, gate)
    client.prefetch([key_of(i) for i in range(40)])
    assert wait_until(lambda: client.stats()["bytes_read_wire"] > 0)
    for service in far.services.values():
        del service.handle
    start_s = time.monotonic()
    check(client, take(client, range(20)))
    assert time.monotonic() - start_s < 1.0
    gate.set()
    assert wait_until(lambda: client.stats()["private_pages"] == 40), "it did not go on"
    client.release("row")
    client.close()
    assert client.stats()["private_pages"] == 0
    assert at_rest(far)


def test_close_in_the_middle(far: Stores) -> None:
    client = far.client()
    gate = threading.Event()
    for service in far.services.values():
        stall(service, 1, gate)
    client.prefetch([key_of(i) for i in range(40)])
    assert wait_until(lambda: client.stats()["bytes_read_wire"] > 0)
    start_s = time.monotonic()
    client.close()
    assert time.monotonic() - start_s < 3.0
    gate.set()
    assert client.stats()["private_pages"] == 0
    assert at_rest(far)


def test_damaged_while_it_waited(far: Stores) -> None:
    client = far.client()
    client.prefetch([key_of(1)])
    assert wait_until(lambda: client.stats()["private_pages"] == 1)
    client.memories[-1][5] ^= 1
    (handle,) = take(client, [1])
    check(client, [handle], 1)
    assert client.stats()["failed_load_corrupt_private"] == 1
    client.release("row")
    assert client.stats()["private_pages"] == 0
    client.close()


def test_near_pages_stay_where_they_are(pair: Stores) -> None:
    client = pair.client()
    put(client, range(10), "writer")
    client.release("writer")
    client.prefetch([key_of(i) for i in range(10)])
    assert wait_until(lambda: client.stats()["pages_prefetched"] == 10)
    assert client.stats()["private_pages"] == 0
    assert client.stats()["bytes_read_inplace"] == 0, "nobody reads them yet"
    assert at_rest(pair)
    client.close()


def n_resident(memory: np.ndarray) -> int:
    """System pages of a mapping that are in memory."""
    libc = ctypes.CDLL(None)
    flags = np.zeros(-(-memory.nbytes // mmap.PAGESIZE), np.uint8)
    at, size = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    assert libc.mincore(at, size, flags.ctypes.data_as(ctypes.c_void_p)) == 0
    return int((flags & 1).sum())


def test_advice_brings_bytes_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    n_bytes = 256 * mmap.PAGESIZE
    path.write_bytes(np.random.default_rng(0).bytes(n_bytes))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = np.frombuffer(mmap.mmap(fd, n_bytes), np.uint8).reshape(16, -1)
    os.close(fd)
    if n_resident(mapped):
        pytest.skip("this file system keeps everything in memory")
    advise(mapped.reshape(-1), 100 * mmap.PAGESIZE + 7, 40 * mmap.PAGESIZE)
    assert wait_until(lambda: 41 <= n_resident(mapped) < 200)


def test_advice_on_other_memory_is_nothing() -> None:
    advise(np.zeros(100, np.uint8), 3, 5)
