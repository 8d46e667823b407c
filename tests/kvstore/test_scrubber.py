"""The background check, and checks on request: every copy is read, bad ones go, readers are not barred."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longreach.core.errors import InvalidInput
from longreach.core.store_config import StoreConfig
from longreach.kvstore.page import checksums_to_wire, page_checksums
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import Reply

from .kv_helpers import GEOMETRY, RECIPE, ROOT, key_of, page_of

N = GEOMETRY.page_nbytes


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., StoreService]]:
    made = []

    def make(n_pages: int = 6, **settings: Any) -> StoreService:
        config = StoreConfig(
            disk_dir=str(tmp_path / "disk"), disk_bytes=32 * N, **{"flush_s": 0, **settings}
        )
        store = StoreService(
            f"s{len(made)}", "n", str(tmp_path), GEOMETRY, 4 * N, faults=True, config=config
        )
        made.append(store)
        for i in range(n_pages):
            page = page_of(i)
            sums = checksums_to_wire(page_checksums(page, GEOMETRY))
            header = {"key": key_of(i), "parent": ROOT, "recipe": RECIPE, "checksums": sums}
            store.handle("write", {**header, "owner": "w", "lease_s": 60}, [page.data])
        return store

    yield make
    for store in made:
        store.close()


def ask(store: StoreService, method: str, **header: Any) -> dict[str, Any]:
    reply = store.handle(method, header, [])
    assert isinstance(reply, Reply)
    return reply.header


def verify(store: StoreService, **header: Any) -> tuple[int, list[dict[str, Any]]]:
    replies = [reply.header for reply in store.handle("verify", header, [])]  # type: ignore[union-attr]
    return sum(r["checked"] for r in replies), [bad for r in replies for bad in r["bad"]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_verify_finds_what_is_bad_in_either_tier(make: Callable[..., StoreService]) -> None:
    store = make(scrub_bytes_per_s=0)
    assert verify(store) == (6, [])
    ask(store, "corrupt", key=key_of(0))  # pinned in the arena
    ask(store, "corrupt", key=key_of(5))  # spilled to disk
    n_checked, bad = verify(store)
    assert n_checked == 6
    assert {(b["key"], b["tier"], b["reason"]) for b in bad} == {
        (key_of(0), "arena", "corrupt"),
        (key_of(5), "disk", "corrupt"),
    }
    assert ask(store, "lookup", keys=[key_of(0), key_of(5), key_of(1)])["held"] == [
        False,
        False,
        True,
    ]
    assert verify(store) == (4, [])
    told = store.stats()
    assert (told["corrupt_arena"], told["corrupt_disk"]) == (1, 1)


def test_verify_of_some_keys(make: Callable[..., StoreService]) -> None:
    store = make(scrub_bytes_per_s=0)
    ask(store, "corrupt", key=key_of(0))
    assert verify(store, keys=[key_of(1), key_of(99)]) == (2, [])
    assert len(verify(store, keys=[key_of(0)])[1]) == 1
    with pytest.raises(InvalidInput):
        verify(store, keys=[b"short"])


def test_a_backup_is_checked_too(make: Callable[..., StoreService], tmp_path: Path) -> None:
    store = make(n_pages=1, disk_write="through", scrub_bytes_per_s=0)
    page = store._shard.find(key_of(0))
    assert page is not None
    # it is counted on disk a moment before it is the page's backup
    until(lambda: page.backup is not None)
    assert page.backup is not None
    with (tmp_path / "disk" / "s0.pages").open("r+b") as file:
        file.seek((page.backup - 4) * N)
        file.write(bytes(10))
    assert verify(store)[1] == [{"key": key_of(0), "tier": "disk", "reason": "corrupt"}]
    assert store.stats()["disk_pages"] == 0
    assert verify(store) == (1, []), "the page itself stays"


def test_a_page_that_cannot_be_read_is_no_corruption(make: Callable[..., StoreService]) -> None:
    class Hook:
        def before_write(self, slot: int) -> None: ...

        def before_read(self, slot: int) -> None:
            raise OSError(errno.EIO, "injected")

    store = make(scrub_bytes_per_s=0)
    disk = store._core.disk
    assert disk is not None
    disk.hook = Hook()
    _, bad = verify(store)
    assert {(b["tier"], b["reason"]) for b in bad} == {("disk", "unreadable")}
    assert len(bad) == 2
    assert store.stats()["disk_errors"] == 2
    assert store.stats()["corrupt_detected"] == 0


def test_rounds_in_the_background(make: Callable[..., StoreService]) -> None:
    store = make(scrub_bytes_per_s=1 << 30, scrub_pause_s=0.05)
    until(lambda: store.stats()["scrub_checked"] >= 12)  # more than a round
    assert store.stats()["scrub_bad"] == 0
    ask(store, "corrupt", key=key_of(1))
    until(lambda: store.stats()["scrub_bad"] == 1)
    assert ask(store, "lookup", keys=[key_of(1)])["held"] == [False]


def test_a_round_begins_when_asked_for(make: Callable[..., StoreService]) -> None:
    store = make(scrub_bytes_per_s=0)
    idle = {"pages_checked": 0, "bad": 0, "last_round_s": 0.0, "running": False}
    assert ask(store, "scrub") == idle
    ask(store, "scrub", start=True)
    until(lambda: ask(store, "scrub")["last_round_s"] > 0)
    assert ask(store, "scrub")["pages_checked"] == 6


def test_the_rate_is_bounded(make: Callable[..., StoreService]) -> None:
    store = make(scrub_bytes_per_s=10 * N, scrub_pause_s=600)
    started = time.monotonic()
    ask(store, "scrub", start=True)
    until(lambda: ask(store, "scrub")["pages_checked"] == 6)
    assert time.monotonic() - started > 0.4, "six pages at ten a second"


def test_readers_go_on_while_a_page_is_checked(
    make: Callable[..., StoreService], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(scrub_bytes_per_s=0)
    reading, go_on = threading.Event(), threading.Event()

    class Hook:
        def before_write(self, slot: int) -> None: ...

        def before_read(self, slot: int) -> None:
            if threading.current_thread() is checking:
                reading.set()
                assert go_on.wait(10)

    disk = store._core.disk
    assert disk is not None
    disk.hook = Hook()
    checking = threading.Thread(target=lambda: verify(store, keys=[key_of(5)]))
    checking.start()
    assert reading.wait(10)
    pages = ask(store, "prepare_load", keys=[key_of(5)], owner="r", lease_s=5)["pages"]
    assert pages[0] is not None
    page = store._shard.find(key_of(5))
    assert page is not None
    given_back: list[int] = []
    give_back = store._shard.slots.give_back
    # not the number of free slots: others move to disk meanwhile
    monkeypatch.setattr(
        store._shard.slots, "give_back", lambda s: (given_back.append(s), give_back(s))
    )
    slot = page.slot
    ask(store, "drop", keys=[key_of(5)])
    for owner in ("r", "w"):
        ask(store, "release", owner=owner)
    assert slot not in given_back, "its slot is kept while it is read"
    go_on.set()
    checking.join(10)
    assert slot in given_back
