"""What operators ask of the stores: each answers for itself, and one that is silent is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longreach.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    Unavailable,
)
from longreach.core.page_key import ROOT_KEY, PageKey

from .fakes import GEOMETRY
from .kv_cluster import DOCUMENT, N_PAGES, KvCluster, Store, flip, page_of

pytestmark = pytest.mark.timeout(60)
OTHER = DOCUMENT.replace("word", "term")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KvCluster]:
    with KvCluster(tmp_path, 3) as made:
        yield made


def silence(cluster: KvCluster, name: str) -> None:
    cluster.stores[name].awake.clear()


def errors_of(stores: Any) -> dict[str, str]:
    return {store.store_id: store.error for store in stores if store.error}


def test_stat_tells_each_store_and_their_sums(cluster: KvCluster) -> None:
    cluster.read()
    response = cluster.client.kv.stat()
    assert [store.store_id for store in response.stores] == cluster.names
    assert {store.state for store in response.stores} == {"live"}
    assert not errors_of(response.stores)
    held = [store.numbers["pages_held"] for store in response.stores]
    assert held == cluster.stat("pages_held")
    assert response.totals["pages_held"] == sum(held) == 2 * N_PAGES
    assert response.page_bytes == GEOMETRY.page_nbytes


def test_a_silent_store_is_named_and_the_others_are_heard(cluster: KvCluster) -> None:
    cluster.read()
    silence(cluster, "store-1")
    started_s = time.monotonic()
    response = cluster.client.kv.stat()
    assert 1.5 < time.monotonic() - started_s < 5
    assert list(errors_of(response.stores)) == ["store-1"]
    assert "DEADLINE_EXCEEDED" in response.stores[1].error
    assert (
        response.totals["pages_held"]
        == cluster.stat("pages_held")[0] + cluster.stat("pages_held")[2]
    )


def test_states_of_stores(cluster: KvCluster) -> None:
    cluster.runtime.lose_store("store-0")
    cluster.runtime.drain_store("store-2")
    response = cluster.client.kv.stat()
    assert [s.state for s in response.stores] == ["lost", "live", "draining"]
    assert errors_of(response.stores) == {"store-0": "UNAVAILABLE: store store-0 is lost"}


def test_verify_streams_counts_and_bad_pages(cluster: KvCluster) -> None:
    bad = {"key": b"\xab" * 32, "tier": "disk", "reason": "leaf 3"}
    for i, name in enumerate(cluster.names):
        replies = [{"checked": 64, "bad": []}, {"checked": 6 + i, "bad": [bad] * i}]
        cluster.stores[name].streams["verify"] = replies
    updates = list(cluster.client.kv.verify())
    last = updates[-1]
    assert all(store.done for store in last.stores)
    assert [(s.checked, s.bad) for s in last.stores] == [(70, 0), (71, 1), (72, 2)]
    found = [page for update in updates for page in update.bad]
    assert sorted(page.store_id for page in found) == ["store-1", "store-2", "store-2"]
    assert {(page.key, page.tier, page.reason) for page in found} == {("ab" * 32, "disk", "leaf 3")}


def test_verify_finds_what_was_flipped_behind_the_stores_back(cluster: KvCluster) -> None:
    cluster.read()
    keys = cluster.keys()
    flipped = set()
    for name, store in cluster.stores.items():
        if store.real.stats()["pages_held"]:
            held = next(key for key in keys if holds(store, key))
            flip(store, held, leaf=1)
            flipped.add((name, held.hex()))
    assert len(flipped) > 1
    updates = list(cluster.client.kv.verify())
    assert sum(state.checked for state in updates[-1].stores) == 2 * N_PAGES
    assert sum(state.bad for state in updates[-1].stores) == len(flipped)
    assert {(page.store_id, page.key) for u in updates for page in u.bad} == flipped
    assert {page.tier for u in updates for page in u.bad} == {"arena"}
    # they are gone; what is left is good
    again = list(cluster.client.kv.verify())[-1]
    assert sum(state.bad for state in again.stores) == 0
    assert sum(state.checked for state in again.stores) == 2 * N_PAGES - len(flipped)


def holds(store: Store, key: PageKey) -> bool:
    reply = store.real.handle("lookup", {"keys": [key]}, [])
    return bool(reply.header["held"][0])  # type: ignore[union-attr]


def test_a_scrub_that_is_started_checks_every_page(cluster: KvCluster) -> None:
    cluster.read()
    cluster.client.kv.scrub(start=True)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stores = cluster.client.kv.scrub().stores
        if sum(store.pages_checked for store in stores) == 2 * N_PAGES:
            break
        time.sleep(0.05)
    assert sum(store.pages_checked for store in stores) == 2 * N_PAGES
    assert not any(store.bad or store.error for store in stores)


def test_verify_of_one_store_asks_no_other(cluster: KvCluster) -> None:
    for store in cluster.stores.values():
        store.streams["verify"] = [{"checked": 1, "bad": []}]
    (state,) = list(cluster.client.kv.verify("store-1"))[-1].stores
    assert (state.store_id, state.checked) == ("store-1", 1)
    asked = {name: [m for m, _ in store.asked] for name, store in cluster.stores.items()}
    assert [name for name, methods in asked.items() if "verify" in methods] == ["store-1"]
    with pytest.raises(NotFound, match="no store 'store-9'; there are store-0, store-1, store-2"):
        list(cluster.client.kv.verify("store-9"))
    cluster.runtime.lose_store("store-1")
    with pytest.raises(Unavailable, match="store-1 is lost"):
        list(cluster.client.kv.verify("store-1"))


def test_verify_goes_on_without_a_store_that_is_lost_or_fails(cluster: KvCluster) -> None:
    cluster.stores["store-0"].streams["verify"] = [{"checked": 5, "bad": []}]
    cluster.stores["store-1"].answers["verify"] = {}  # a reply without its fields
    cluster.runtime.lose_store("store-2")
    last = list(cluster.client.kv.verify())[-1]
    assert all(state.done for state in last.stores)
    assert [state.checked for state in last.stores] == [5, 0, 0]
    assert "UNAVAILABLE" in errors_of(last.stores)["store-2"]
    assert "store-1" in errors_of(last.stores)


def test_verify_ends_with_its_client(cluster: KvCluster) -> None:
    ended = threading.Event()

    def forever() -> Iterator[dict[str, Any]]:
        try:
            while True:
                time.sleep(0.05)
                yield {"checked": 1, "bad": []}
        finally:
            ended.set()

    for store in cluster.stores.values():
        store.streams["verify"] = forever()
    updates = cluster.client.kv.verify("store-0")
    assert next(updates).stores[0].done is False
    updates.close()  # type: ignore[attr-defined]
    assert ended.wait(5)


def test_scrub_tells_the_background_checks_and_starts_them(cluster: KvCluster) -> None:
    state = {"running": True, "pages_checked": 12, "bad": 1, "last_round_s": None}
    for store in cluster.stores.values():
        store.answers["scrub"] = state
    silence(cluster, "store-2")
    response = cluster.client.kv.scrub()
    first = response.stores[0]
    assert (first.running, first.pages_checked, first.bad, first.last_round_s) == (True, 12, 1, 0)
    assert list(errors_of(response.stores)) == ["store-2"]
    assert ("scrub", {}) in cluster.stores["store-0"].asked
    cluster.stores["store-2"].awake.set()
    cluster.client.kv.scrub(start=True)
    assert ("scrub", {"start": True}) in cluster.stores["store-0"].asked


def test_drop_of_a_document_leaves_the_others(cluster: KvCluster) -> None:
    context_id = cluster.read()
    cluster.read(OTHER)
    response = cluster.client.kv.drop(context_id)
    assert response.n_pages == N_PAGES
    assert sum(store.n_dropped for store in response.stores) == 2 * N_PAGES
    assert cluster.n_held(cluster.keys()) == [0] * N_PAGES
    cluster.check_pages(cluster.keys(OTHER))


def test_drop_of_everything_takes_every_page_but_pinned_bytes_stay(cluster: KvCluster) -> None:
    cluster.read()
    cluster.read(OTHER)
    client = cluster.page_client()
    try:
        key = cluster.keys()[0]
        handle = client.acquire([key], "row")[0]
        assert handle is not None
        response = cluster.client.kv.drop(everything=True)
        assert sum(store.n_dropped for store in response.stores) == 4 * N_PAGES
        assert cluster.stat("pages_held") == [0, 0, 0]
        client.store(cluster.keys(OTHER)[0], ROOT_KEY, page_of(key), "other").result(10)
        first = handle.first_leaf_row * GEOMETRY.leaf_nbytes
        memory = client.memories[handle.memory]
        assert (memory[first : first + GEOMETRY.page_nbytes] == page_of(key)).all()
    finally:
        client.close()


def test_drop_of_everything_is_done_in_parts(
    cluster: KvCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longreach.cluster.store_calls.LIST_PAGES", 3)
    cluster.read()
    cluster.client.kv.drop(everything=True)
    assert cluster.stat("pages_held") == [0, 0, 0]
    lists = [header for method, header in cluster.stores["store-0"].asked if method == "list"]
    assert len(lists) > 1
    assert {header["limit"] for header in lists} == {3}


def test_drop_names_a_store_that_does_not_answer(cluster: KvCluster) -> None:
    context_id = cluster.read()
    cluster.runtime.lose_store("store-0")
    response = cluster.client.kv.drop(context_id)
    assert list(errors_of(response.stores)) == ["store-0"]
    assert cluster.n_held(cluster.keys()) == [0] * N_PAGES
    for wrong in ({}, {"context_id": context_id, "everything": True}):
        with pytest.raises(InvalidInput, match="one of context_id and all"):
            cluster.client.kv.drop(**wrong)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        cluster.client.kv.drop("ctx-" + "0" * 64)


def drain_status(epoch: int, to_move: int, drained: bool) -> dict[str, Any]:
    left = {"to_move": to_move // 2, "under_replicated": to_move - to_move // 2}
    moved = {"pages_pushed": 9 - to_move, "bytes_pushed": 4096}
    return {"epoch": epoch, "drained": drained, **left, **moved}


def test_drain_is_told_until_it_is_done(cluster: KvCluster) -> None:
    store = cluster.stores["store-1"]
    # as it stood before it knew: nothing to do, so as if it were drained
    store.answers["repair_status"] = drain_status(1, 0, True)
    updates = cluster.client.kv.drain("store-1", wait=True)
    assert not next(updates).drained
    assert cluster.client.kv.stat().stores[1].state == "draining"
    store.answers["repair_status"] = drain_status(2, 4, False)
    assert any(update.to_move == 4 for update, _ in zip(updates, range(4), strict=False))
    store.answers["repair_status"] = drain_status(2, 0, True)
    last = list(updates)[-1]
    assert last.drained
    assert (last.to_move, last.pages_pushed, last.bytes_pushed) == (0, 9, 4096)


def test_drain_without_waiting_answers_once(cluster: KvCluster) -> None:
    cluster.stores["store-1"].answers["repair_status"] = drain_status(2, 4, False)
    (update,) = cluster.client.kv.drain("store-1")
    assert (update.store_id, update.to_move, update.drained) == ("store-1", 4, False)
    assert cluster.runtime.membership().find("store-1").draining  # type: ignore[union-attr]


def test_drain_of_a_store_that_went_away_does_not_wait_for_ever(cluster: KvCluster) -> None:
    cluster.stores["store-1"].answers["repair_status"] = drain_status(2, 4, False)
    updates = cluster.client.kv.drain("store-1", wait=True)
    next(updates)
    cluster.runtime.lose_store("store-1")
    started_s = time.monotonic()
    with pytest.raises(Unavailable):
        list(updates)
    assert time.monotonic() - started_s < 10
    with pytest.raises(InvalidInput):
        list(cluster.client.kv.drain(""))


def test_drain_that_is_refused_or_takes_too_long(
    cluster: KvCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.stores["store-1"].answers["repair_status"] = drain_status(2, 4, False)
    with pytest.raises(DeadlineExceeded):
        list(cluster.client.kv.drain("store-1", wait=True, timeout_s=1.5))

    def refuse(store_id: str) -> None:
        raise FailedPrecondition(f"{store_id} is the last store")

    monkeypatch.setattr(cluster.runtime, "drain_store", refuse)
    with pytest.raises(FailedPrecondition, match="the last store"):
        list(cluster.client.kv.drain("store-1"))


def test_streams_leave_slots_free(cluster: KvCluster) -> None:
    cluster.stores["store-1"].answers["repair_status"] = drain_status(2, 4, False)
    updates = cluster.client.kv.drain("store-1", wait=True)
    next(updates)
    service = cluster.gateway._service
    assert service is not None
    assert service.streams.n_open == 1
    updates.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while service.streams.n_open and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.streams.n_open == 0
