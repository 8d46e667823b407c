"""Real stores with a disk tier, through the real client: where pages go, what a restart finds, and that
no damage on disk is ever served."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.core.errors import FailedPrecondition, StoreFull
from longreach.core.store_config import StoreConfig
from longreach.kvstore.page import PageGeometry

from .kv_helpers import GEOMETRY, Stores, bytes_at, check, key_of, page_of, put, take

N = GEOMETRY.page_nbytes


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(params=["mem", "tcp"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    (tmp_path / "arena").mkdir()
    stores = Stores(tmp_path / "arena", request.param)
    yield stores
    stores.close()


@pytest.fixture
def start(stores: Stores, tmp_path: Path) -> Callable[..., None]:
    def start(name: str = "s", n_slots: int = 8, n_disk: int = 32, **options: Any) -> None:
        settings = {"disk_dir": str(tmp_path / "disk"), "disk_bytes": n_disk * N, **options}
        geometry = settings.pop("geometry", GEOMETRY)
        stores.start(name, n_slots, geometry=geometry, config=StoreConfig(**settings))

    return start


def stats(stores: Stores, name: str = "s") -> dict[str, int]:
    return stores.services[name].stats()


def flip(path: Path, slot: int, byte: int = 7) -> None:
    with path.open("r+b") as file:
        file.seek(slot * N + byte)
        (value,) = file.read(1)
        file.seek(slot * N + byte)
        file.write(bytes([value ^ 1]))


def slot_on_disk(stores: Stores, i: int, name: str = "s") -> int:
    shard = stores.services[name]._shard
    page = shard.find(key_of(i))
    assert page is not None
    slot = page.slot if page.backup is None else page.backup
    assert slot >= shard.slots.n_arena
    return slot - shard.slots.n_arena


def test_pinned_pages_stay_and_new_ones_spill(
    stores: Stores, start: Callable[..., None], force_wire: bool
) -> None:
    start(n_slots=4, n_disk=6)
    client = stores.client(replicas=1, force_wire=force_wire)
    handles = put(client, range(10))
    if not force_wire:
        assert len({h.memory for h in handles}) == 2, "arena and disk, both read in place"
    check(client, handles)
    assert stats(stores)["spilled"] == 6
    with pytest.raises(StoreFull, match=r"all 4 page slots and 6 on disk.*store\.disk_bytes"):
        put(client, [10])
    check(client, handles)
    client.release("row")
    put(client, [10], "other")
    check(client, take(client, [10]), 10)
    client.close()
    assert stats(stores)["pages_pinned"] == 0


def test_above_the_high_watermark_cold_pages_move_to_disk(
    stores: Stores, start: Callable[..., None]
) -> None:
    start(n_slots=20, n_disk=40, high_watermark=0.8, low_watermark=0.5)
    client = stores.client(replicas=1)
    put(client, range(16))
    client.release("row")
    time.sleep(0.6)
    assert stats(stores)["demotions"] == 0, "16 of 20 is not above 0.8"
    handles = take(client, range(16))
    put(client, range(16, 20))
    time.sleep(0.6)
    assert stats(stores)["demotions"] == 0, "all are pinned"
    check(client, handles)
    client.release("row")
    until(lambda: stats(stores)["arena_pages"] <= 10)
    told = stats(stores)
    assert told["demotions"] == 10
    assert told["disk_pages"] == 10
    assert told["evictions"] == 0
    handles = take(client, range(20), "again")
    check(client, handles)
    told = stats(stores)
    # up to 0.8 of the arena pages come back before they are read; the others are read on disk
    assert told["promotions"] == 6
    assert (told["hits_arena"], told["hits_disk"]) == (16 + 16, 4)
    client.release("again")
    client.close()


def test_through_writes_every_page_behind(stores: Stores, start: Callable[..., None]) -> None:
    start(n_slots=4, n_disk=16, disk_write="through")
    client = stores.client(replicas=1)
    put(client, range(3))
    until(lambda: stats(stores)["disk_pages"] == 3)
    client.release("row")
    put(client, range(3, 12))  # the arena's slots are free for new pages at once
    until(lambda: stats(stores)["disk_pages"] == 12)
    told = stats(stores)
    assert told["evictions"] == 0
    assert told["arena_pages"] == 4
    check(client, take(client, range(12), "reader"))
    client.close()


@pytest.mark.parametrize("write", ["through", "demote"])
def test_a_restart_finds_pages_and_writes_none_again(
    stores: Stores, start: Callable[..., None], write: str
) -> None:
    start(n_slots=8, disk_write=write, flush_s=10)
    client = stores.client(replicas=1)
    put(client, range(8))
    client.close()
    stores.stop("s")
    start(n_slots=8, disk_write=write)
    assert stats(stores)["pages_adopted"] == 8
    client = stores.client(replicas=1)
    assert client.lookup([key_of(i) for i in range(9)]) == [True] * 8 + [False]
    check(client, take(client, range(8)))
    told = stats(stores)
    assert told["promotions"] == 7, "below the watermark of 0.95 * 8"
    assert told["disk_bytes_written"] == 0
    assert told["pages_held"] == told["disk_pages"] == 8
    client.close()
    stores.stop("s")
    start(n_slots=8, disk_write=write)
    assert stats(stores)["pages_adopted"] == 8


def test_no_flush_when_none_is_wanted(stores: Stores, start: Callable[..., None]) -> None:
    start(flush_s=0)
    client = stores.client(replicas=1)
    put(client, range(4))
    client.close()
    stores.stop("s")
    start()
    assert stats(stores)["pages_adopted"] == 0


def test_a_client_that_was_there_before_goes_on(stores: Stores, start: Callable[..., None]) -> None:
    start(n_slots=4, flush_s=10)
    client = stores.client(replicas=1)
    handles = put(client, range(8))
    stores.stop("s")
    start(n_slots=4)
    client.update_stores(stores.addresses)
    check(client, handles)  # what it had mapped is still there
    client.release("row")
    check(client, take(client, range(8), "after"))
    client.close()


@pytest.mark.parametrize("when", ["while it runs", "while it is down"])
def test_a_flipped_byte_on_disk_is_taken_from_a_replica(
    stores: Stores, start: Callable[..., None], tmp_path: Path, force_wire: bool, when: str
) -> None:
    for name in ("a", "b"):
        start(name, n_slots=2, disk_write="through", promote_pages=0)
    client = stores.client(replicas=2)
    put(client, range(8))
    for name in ("a", "b"):
        until(lambda name=name: stats(stores, name)["disk_pages"] == 8)  # type: ignore[misc]
    client.release("row")
    client.close()
    if when == "while it is down":
        bad_slot = slot_on_disk(stores, 3, "a")
        stores.stop("a")
        flip(tmp_path / "disk" / "a.pages", bad_slot)
        start("a", n_slots=2, disk_write="through", promote_pages=0)
        bad = [3]
    else:
        on_disk = [i for i in range(8) if stores.services["a"]._shard.find(key_of(i)).slot >= 2]  # type: ignore[union-attr]
        bad = on_disk[:2]
        for i in bad:
            flip(tmp_path / "disk" / "a.pages", slot_on_disk(stores, i, "a"))
    client = stores.client(replicas=2, force_wire=force_wire)
    for attempt in range(3):  # whichever store is asked, the page is good
        check(client, take(client, range(8), f"row {attempt}"))
    for _ in stores.services["a"].handle("verify", {}, []):
        pass
    assert stats(stores, "a")["corrupt_disk"] == len(bad)
    assert not any(stores.services["a"]._shard.lookup([key_of(i) for i in bad]))
    client.close()


def test_a_bad_page_in_the_arena_is_replaced_by_its_backup(
    stores: Stores, start: Callable[..., None], force_wire: bool
) -> None:
    start(n_slots=8, disk_write="through")
    client = stores.client(replicas=1, force_wire=force_wire)
    put(client, [0])
    until(lambda: stats(stores)["disk_pages"] == 1)
    client.release("row")
    stores.corrupt("s", key_of(0))
    first = take(client, [0], "one")
    if force_wire:  # the store looks before it sends
        check(client, first)
    else:  # the reader looks, and tells the store
        assert first == [None]
    check(client, take(client, [0], "two"))
    assert stats(stores)["corrupt_arena"] == 1
    assert stats(stores)["corrupt_disk"] == 0
    client.close()


def test_a_truncated_file_loses_pages_but_serves_none_wrong(
    stores: Stores, start: Callable[..., None], tmp_path: Path
) -> None:
    start(n_slots=1, n_disk=16, disk_write="through", flush_s=10)
    client = stores.client(replicas=1)
    put(client, range(8))
    client.close()
    stores.stop("s")
    with (tmp_path / "disk" / "s.pages").open("r+b") as file:
        file.truncate(5 * N + 3)
    start(n_slots=1, n_disk=16)
    assert stats(stores)["pages_adopted"] == 8
    client = stores.client(replicas=1)
    found = take(client, range(8))
    assert sum(handle is not None for handle in found) == 5
    for i, handle in enumerate(found):
        if handle is not None:
            assert (bytes_at(client, handle) == page_of(i)).all()
    assert stats(stores)["corrupt_disk"] == 3
    put(client, range(8), "again")
    check(client, take(client, range(8), "reader"))
    client.close()


class DiskErrors:
    """Hook of a disk that fails."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.reads = self.writes = True

    def before_write(self, slot: int) -> None:
        if self.writes:
            raise OSError(self.code, "injected")

    def before_read(self, slot: int) -> None:
        if self.reads:
            raise OSError(self.code, "injected")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing_leaves_the_arena_working(
    stores: Stores, start: Callable[..., None], code: int
) -> None:
    start(n_slots=4)
    disk = stores.services["s"]._core.disk
    assert disk is not None
    disk.hook = DiskErrors(code)
    client = stores.client(replicas=1)
    for i in range(12):  # cold pages are lost instead of moved; accepted ones never
        check(client, put(client, [i], f"row {i}"), i)
        client.release(f"row {i}")
    told = stats(stores)
    assert told["disk_pages"] == 0
    assert told["evictions"] == 8
    assert (told["disk_errors"] > 0) == (code == errno.EIO)
    put(client, range(20, 24))
    with pytest.raises(StoreFull):
        put(client, [30])
    client.close()


def test_reads_that_fail_drop_the_page(
    stores: Stores, start: Callable[..., None], force_wire: bool
) -> None:
    start(n_slots=2, promote_pages=0, flush_s=10)
    client = stores.client(replicas=1)
    put(client, range(6))
    client.close()
    stores.stop("s")
    start(n_slots=2, promote_pages=0)
    disk = stores.services["s"]._core.disk
    assert disk is not None
    disk.hook = DiskErrors(errno.EIO)
    client = stores.client(replicas=1, force_wire=force_wire)
    assert take(client, [0, 1]) == [None, None]
    disk.hook = None
    check(client, take(client, range(2, 6)), 2)
    assert stats(stores)["disk_errors"] == 2
    assert stats(stores)["corrupt_detected"] == 0
    client.close()


def test_limits_of_both_tiers_hold_to_the_page(
    stores: Stores, start: Callable[..., None], tmp_path: Path
) -> None:
    start(n_slots=6, n_disk=10, high_watermark=0.7, low_watermark=0.4)
    client = stores.client(replicas=1)
    rng = np.random.default_rng(1)
    for _ in range(40):
        first = int(rng.integers(0, 60))
        for i, handle in enumerate(take(client, range(first, first + 4)), first):
            if handle is None:
                put(client, [i])
        if rng.random() < 0.6:
            client.release("row")
        told = stats(stores)
        assert told["arena_pages"] <= 6
        assert told["disk_pages"] <= 10
        if told["pages_pinned"] > 12:
            client.release("row")
    assert (tmp_path / "disk" / "s.pages").stat().st_blocks * 512 <= 10 * N + (1 << 16)
    assert stats(stores)["evictions"] > 0
    client.close()


def test_another_models_files_are_refused_by_name(
    stores: Stores, start: Callable[..., None], tmp_path: Path
) -> None:
    start(flush_s=10)
    client = stores.client(replicas=1)
    put(client, range(4))
    client.close()
    stores.stop("s")
    before = (tmp_path / "disk" / "s.pages").read_bytes()
    other = PageGeometry(2, 2, 8, 16, "float16")
    with pytest.raises(FailedPrecondition, match=r'"n_layers": 3.*"n_layers": 2'):
        start(geometry=other)
    assert (tmp_path / "disk" / "s.pages").read_bytes() == before
    start()
    assert stats(stores)["pages_adopted"] == 4


def test_list_goes_through_all_pages_in_key_order(
    stores: Stores, start: Callable[..., None]
) -> None:
    start(n_slots=4)
    client = stores.client(replicas=1)
    put(client, range(8))
    listed, after = [], None
    while True:
        told = stores.call("s", "list", after=after, limit=3)
        listed += told["pages"]
        after = told["next"]
        if after is None:
            break
    assert [page["key"] for page in listed] == sorted(key_of(i) for i in range(8))
    assert {page["n_pins"] for page in listed} == {1}
    assert {page["n_rows_used"] for page in listed} == {1}
    assert sorted(page["tier"] for page in listed) == ["arena"] * 4 + ["disk"] * 4
    client.close()
