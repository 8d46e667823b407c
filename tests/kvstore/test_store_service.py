"""The store's requests: bad ones are refused and harm nothing, draining, leases on its clock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.core.clock import ManualClock
from longreach.core.errors import Draining, FailedPrecondition, InvalidInput, NotFound, PageCorrupt
from longreach.kvstore.page import checksums_to_wire, page_checksums
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import Reply

from .kv_helpers import GEOMETRY, RECIPE, ROOT, key_of, page_of


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[StoreService]:
    service = StoreService(
        "store-0", "node-0", str(tmp_path), GEOMETRY, 4 * GEOMETRY.page_nbytes, clock=clock
    )
    yield service
    service.close()
    assert os.listdir(tmp_path) == []


def ask(store: StoreService, method: str, *buffers: Any, **header: Any) -> dict[str, Any]:
    reply = store.handle(method, header, [memoryview(b) for b in buffers])
    assert isinstance(reply, Reply)
    return reply.header


def entry(i: int) -> dict[str, Any]:
    sums = checksums_to_wire(page_checksums(page_of(i), GEOMETRY))
    return {"key": key_of(i), "parent": ROOT, "recipe": RECIPE, "checksums": sums}


def write(store: StoreService, i: int, owner: str = "w") -> dict[str, Any]:
    return ask(store, "write", page_of(i), **entry(i), owner=owner, lease_s=10.0)


def test_write_then_read(store: StoreService) -> None:
    assert not write(store, 1)["duplicate"]
    assert write(store, 1)["duplicate"]
    replies = store.handle("read", {"keys": [key_of(2), key_of(1)], "owner": "r", "lease_s": 5}, [])
    absent, found = list(replies)  # type: ignore[arg-type]
    assert absent == Reply({"found": False})
    assert bytes(found.buffers[0]) == page_of(1).tobytes()
    assert found.header["checksums"] == entry(1)["checksums"]
    assert store.stats()["leases"] == 2


def test_requests_take_lists(store: StoreService) -> None:
    begun = ask(store, "prepare_store", pages=[entry(i) for i in range(6)], owner="w", lease_s=10)[
        "pages"
    ]
    assert ["write_id" in page for page in begun] == [True] * 4 + [False] * 2
    assert begun[4]["failed"]["error"] == "StoreFull"
    slots = np.memmap(ask(store, "hello")["arena"], np.uint8).reshape(-1, GEOMETRY.page_nbytes)
    for i in range(3):  # the fourth is announced but never written
        slots[begun[i]["slot"]] = page_of(i)
    done = ask(
        store, "complete_store", writes=[p["write_id"] for p in begun[:4]], owner="w", lease_s=10
    )["pages"]
    assert ["held" in page for page in done] == [True, True, True, False]
    assert done[3]["failed"]["error"] == "PageCorrupt"
    assert ask(store, "lookup", keys=[key_of(i) for i in range(4)])["held"] == [True] * 3 + [False]


def test_leases_end_on_the_stores_clock(store: StoreService, clock: ManualClock) -> None:
    write(store, 1)
    assert store.stats()["pages_pinned"] == 1
    clock.advance(9.0)
    assert ask(store, "renew", owners=["w", "x"], lease_s=10.0) == {"ended": ["x"]}
    clock.advance(9.0)
    assert store.stats()["pages_pinned"] == 1
    clock.advance(1.0)
    assert store.stats()["pages_pinned"] == 0
    assert store.stats()["leases_expired"] == 1


def test_a_write_with_wrong_bytes_is_refused(store: StoreService) -> None:
    page = page_of(1)
    page[5] ^= 1
    with pytest.raises(PageCorrupt):
        ask(store, "write", page, **entry(1), owner="w", lease_s=10.0)
    assert store.stats()["slots_free"] == 4


def test_a_false_report_does_not_empty_the_store(store: StoreService) -> None:
    write(store, 1)
    assert ask(store, "report_corrupt", key=key_of(1)) == {"dropped": False}
    assert ask(store, "lookup", keys=[key_of(1)])["held"] == [True]


def test_draining_serves_reads_only(store: StoreService) -> None:
    write(store, 1)
    ask(store, "drain")
    assert ask(store, "health")["state"] == "draining"
    with pytest.raises(Draining):
        write(store, 2)
    pages = ask(store, "prepare_load", keys=[key_of(1)], owner="r", lease_s=5)["pages"]
    assert pages[0] is not None


def test_fault_injection_is_off_unless_asked_for(store: StoreService, tmp_path: Path) -> None:
    write(store, 1)
    with pytest.raises(FailedPrecondition):
        ask(store, "corrupt", key=key_of(1))
    faulty = StoreService("f", "n", str(tmp_path), GEOMETRY, GEOMETRY.page_nbytes, faults=True)
    with pytest.raises(NotFound):
        ask(faulty, "corrupt", key=key_of(1))
    faulty.close()


@pytest.mark.parametrize(
    ("method", "header"),
    [
        ("unknown", {}),
        ("lookup", {}),
        ("lookup", {"keys": "x"}),
        ("lookup", {"keys": [b"short"]}),
        ("lookup", {"keys": [1]}),
        ("prepare_load", {"keys": [], "owner": "", "lease_s": 1}),
        ("prepare_load", {"keys": [], "owner": "w", "lease_s": -1}),
        ("prepare_load", {"keys": [], "owner": "w", "lease_s": float("nan")}),
        ("prepare_load", {"keys": [], "owner": 7, "lease_s": 1}),
        ("prepare_store", {"pages": [3], "owner": "w", "lease_s": 1}),
        ("prepare_store", {"pages": 3, "owner": "w", "lease_s": 1}),
        ("complete_store", {"writes": ["x"], "owner": "w", "lease_s": 1}),
        ("complete_store", {"writes": 5, "owner": "w", "lease_s": 1}),
        ("abort_store", {"write_id": "x", "owner": "w"}),
        ("write", {}),
        ("renew", {"owners": 1, "lease_s": 1}),
        ("renew", {"owners": [[]], "lease_s": 1}),
        ("release", {}),
        ("report_corrupt", {"key": None}),
    ],
)
def test_bad_requests(store: StoreService, method: str, header: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        ask(store, method, **header)
    assert store.stats()["leases"] == 0
    write(store, 1)


def test_bad_entries_of_a_list_fail_alone(store: StoreService) -> None:
    pages = [{**entry(1), "checksums": b"x"}, {**entry(2), "recipe": 1}, {}, entry(3)]
    begun = ask(store, "prepare_store", pages=pages, owner="w", lease_s=1)["pages"]
    assert [page.get("failed", {}).get("error") for page in begun] == ["InvalidInput"] * 3 + [None]
