"""What a worker relies on: replicas, checks, pins, write-behind, and every store's death."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from longreach.core.clock import ManualClock
from longreach.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    LongreachError,
    StoreFull,
    StoreUnreachable,
    Unavailable,
)
from longreach.core.page_key import PageKey, RecipeFingerprint
from longreach.kvstore import page_client as page_client_module
from longreach.kvstore.page import PageGeometry, page_checksums
from longreach.kvstore.page_client import PageClient, PageHandle
from longreach.kvstore.placement import rendezvous

from .kv_helpers import GEOMETRY, ROOT, Stores, bytes_at, key_of, page_of


@pytest.fixture(params=["mem", "tcp"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path, request.param)
    yield stores
    stores.close()
    assert os.listdir(tmp_path) == [], "an arena file was left behind"


@pytest.fixture
def pair(stores: Stores) -> Stores:
    stores.start("store-0")
    stores.start("store-1")
    return stores


@pytest.fixture(params=[False, True], ids=["mapped", "wire"])
def force_wire(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def put(client: PageClient, numbers: range | list[int], row: str = "row") -> list[PageHandle]:
    futures = [client.store(key_of(i), ROOT, page_of(i), row) for i in numbers]
    return [future.result(10) for future in futures]


def take(
    client: PageClient, numbers: range | list[int], row: str = "row"
) -> list[PageHandle | None]:
    return client.acquire([key_of(i) for i in numbers], row)


def check(
    client: PageClient, handles: list[PageHandle | None] | list[PageHandle], first: int = 0
) -> None:
    for i, handle in enumerate(handles, first):
        assert handle is not None
        assert (bytes_at(client, handle) == page_of(i)).all()
        assert np.array_equal(handle.checksums, page_checksums(page_of(i), GEOMETRY))


def primary(key: PageKey) -> str:
    return rendezvous(key, ["store-0", "store-1"], 1)[0]


def test_store_then_acquire(pair: Stores, force_wire: bool) -> None:
    writer = pair.client("w", force_wire=force_wire)
    check(writer, put(writer, range(20)))
    for i in range(20):
        assert len(pair.holders(key_of(i))) == 2
    reader = pair.client("r", force_wire=force_wire)
    assert reader.lookup([key_of(i) for i in (3, 99, 4)]) == [True, False, True]
    check(reader, take(reader, range(20)))
    assert take(reader, [99, 5, 5])[0] is None
    stats = reader.stats()
    moved = "bytes_read_wire" if force_wire else "bytes_read_inplace"
    other = "bytes_read_inplace" if force_wire else "bytes_read_wire"
    assert stats[moved] == 20 * GEOMETRY.page_nbytes + (0 if force_wire else GEOMETRY.page_nbytes)
    assert stats[other] == 0
    assert writer.stats()["bytes_written"] == 40 * GEOMETRY.page_nbytes
    assert writer.stats()["pages_stored"] == 20
    assert reader.stats()["store_failures"] == 0
    writer.close()
    reader.close()


def test_another_nodes_store_is_read_over_the_wire(stores: Stores) -> None:
    stores.start("far", node_id="node-1")
    stores.start("near", node_id="node-0")
    writer = stores.client("w")
    check(writer, put(writer, range(8)))
    assert {handle.store_id for handle in put(writer, range(8))} == {"near"}
    alone = stores.client("r", node_id="node-2")
    check(alone, take(alone, range(8)))
    assert alone.stats()["private_pages"] == 8
    alone.release("row")
    assert alone.stats()["private_pages"] == 0
    near_first = stores.client("n")
    assert {h.store_id for h in take(near_first, range(8)) if h} == {"near"}
    assert near_first.stats()["bytes_read_wire"] == 0
    for client in (writer, alone, near_first):
        client.close()


def test_release_frees_pins(pair: Stores, force_wire: bool) -> None:
    client = pair.client(force_wire=force_wire)
    put(client, range(4), "a")
    take(client, range(4), "b")
    client.release("a")
    pinned = sum(pair.stat(name, "pages_pinned") for name in pair.servers)
    assert pinned == (0 if force_wire else 4)
    client.release("b")
    client.release("b")
    client.release("never seen")
    for name in pair.servers:
        assert pair.stat(name, "pages_pinned") == 0
        assert pair.stat(name, "leases") == 0
    assert client.stats()["rows"] == 0
    assert client.stats()["private_pages"] == 0
    client.close()


def test_close_frees_everything(pair: Stores) -> None:
    client = pair.client()
    (handle,) = put(client, [1])
    client.close()
    client.close()
    assert (bytes_at(client, handle) == page_of(1)).all()
    assert [pair.stat(name, "leases") for name in pair.servers] == [0, 0]
    with pytest.raises(Unavailable):
        client.acquire([key_of(1)], "row")


def test_corrupt_copy_is_replaced_by_the_replica(pair: Stores, force_wire: bool) -> None:
    client = pair.client(force_wire=force_wire)
    put(client, range(10), "writer")
    client.release("writer")
    for i in range(10):
        pair.corrupt(primary(key_of(i)), key_of(i), leaf=i % GEOMETRY.n_leaves)
    check(client, take(client, range(10)))
    for i in range(10):
        assert pair.holders(key_of(i)) == [s for s in pair.servers if s != primary(key_of(i))]
    found = client.stats()["corrupt_detected"]
    # over the wire the store itself looks before it sends, and says it has no such page
    assert found == (0 if force_wire else 10)
    assert sum(pair.stat(name, "corrupt_detected") for name in pair.servers) == 10
    assert client.stats()["replica_reads"] == (0 if force_wire else 10)
    client.close()


def test_both_copies_corrupt_is_none(pair: Stores, force_wire: bool) -> None:
    client = pair.client(force_wire=force_wire)
    put(client, range(3))
    client.release("row")  # with it the worker's own, good copy
    for name in pair.servers:
        pair.corrupt(name, key_of(1))
    good_0, bad, good_2 = take(client, range(3), "other")
    assert bad is None
    check(client, [good_0])
    check(client, [good_2], 2)
    assert pair.holders(key_of(1)) == []
    check(client, put(client, [1], "again"), 1)
    check(client, take(client, [1], "other"), 1)
    client.close()


def test_a_page_of_another_recipe_is_not_used(pair: Stores) -> None:
    client = pair.client()
    put(client, [1])
    other = pair.client("other", recipe=RecipeFingerprint(b"x" * 32))
    assert take(other, [1]) == [None]
    assert other.stats()["corrupt_detected"] == 2
    check(client, take(client, [1]), 1)
    client.close()
    other.close()


def test_corruption_found_at_promotion(pair: Stores, force_wire: bool) -> None:
    client = pair.client(force_wire=force_wire)
    put(client, [1], "writer")
    client.release("writer")
    (handle,) = take(client, [1])
    assert handle is not None
    if force_wire:
        bytes_at(client, handle)[3] ^= 1
    else:
        pair.corrupt(handle.store_id, key_of(1))
    replacement = client.report_corrupt(handle)
    assert replacement is not None
    check(client, [replacement], 1)
    assert (replacement.memory, replacement.first_leaf_row) != (
        handle.memory,
        handle.first_leaf_row,
    )
    if not force_wire:
        pair.corrupt(replacement.store_id, key_of(1))
        assert client.report_corrupt(replacement) is None
        assert client.stats()["corrupt_detected"] == 2
    client.release("row")
    assert client.stats()["private_pages"] == 0
    assert [pair.stat(name, "pages_pinned") for name in pair.servers] == [0, 0]
    client.close()


def test_a_dead_store_in_the_middle(pair: Stores, force_wire: bool) -> None:
    client = pair.client(force_wire=force_wire)
    held = put(client, range(20))
    pair.stop("store-0")
    check(client, held)  # a dead store's file stays mapped
    check(client, take(client, range(20)))
    assert client.lookup([key_of(i) for i in range(20)]) == [True] * 20
    assert client.stats()["store_failures"] >= 1
    check(client, put(client, [30]), 30)
    assert client.stats()["under_replicated"] == 1
    client.update_stores(pair.addresses)
    check(client, take(client, range(20), "new row"))
    client.close()


def test_stores_dying_while_pages_are_loaded_and_stored(pair: Stores) -> None:
    client = pair.client()
    put(client, range(40), "first")
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(take, client, range(40), f"row-{k}") for k in range(8)]
        writes = [client.store(key_of(100 + i), ROOT, page_of(100 + i), "w") for i in range(20)]
        pair.stop("store-1")
        for future in loads:
            check(client, future.result(20))
        for i, write in enumerate(writes):
            check(client, [write.result(20)], 100 + i)
    client.close()


def test_all_stores_dead(pair: Stores) -> None:
    client = pair.client()
    put(client, [1])
    pair.close()
    assert client.lookup([key_of(1)]) == [False]
    assert take(client, [1]) == [None]
    with pytest.raises(StoreUnreachable):
        client.store(key_of(2), ROOT, page_of(2), "row").result(10)
    client.release("row")
    client.close()


def test_no_stores_at_all() -> None:
    client = Stores(Path("/nowhere")).client()
    assert client.lookup([key_of(1)]) == [False]
    assert take(client, [1]) == [None]
    with pytest.raises(StoreUnreachable):
        client.store(key_of(2), ROOT, page_of(2), "row").result(10)
    client.close()


def test_a_restarted_store_is_another_arena(stores: Stores) -> None:
    """Same address, new file: slots of the old one must not be read in the new one."""
    stores.start("store-0")
    client = stores.client(replicas=1)
    old = put(client, range(4))
    address = stores.addresses["store-0"]
    stores.stop("store-0")
    stores.start("store-0", address=address)
    check(client, old)
    assert len(client.memories) == 1
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:  # the first tries may fall into the cool-down
        try:
            new = put(client, [7, 6], "again")
            break
        except LongreachError:
            time.sleep(0.1)
    check(client, old)
    assert {handle.memory for handle in new} == {1}
    check(client, new[:1], 7)
    check(client, new[1:], 6)
    assert take(client, range(4), "again") == [None] * 4
    client.close()


def test_a_restart_that_goes_unnoticed(stores: Stores) -> None:
    stores.start("store-0")
    reader = stores.client("r", replicas=1)
    put(reader, [1])
    address = stores.addresses["store-0"]
    stores.stop("store-0")
    stores.start("store-0", address=address)
    writer = stores.client("w", replicas=1)
    put(writer, [2])
    handle = None
    deadline_s = time.monotonic() + 10
    while handle is None and time.monotonic() < deadline_s:
        (handle,) = take(reader, [2])
    check(reader, [handle], 2)
    writer.close()
    reader.close()


def test_a_full_store_evicts_what_nobody_holds(stores: Stores) -> None:
    stores.start("store-0", n_slots=4)
    client = stores.client(replicas=1)
    put(client, range(4), "a")
    with pytest.raises(StoreFull):
        client.store(key_of(4), ROOT, page_of(4), "b").result(10)
    client.release("a")
    check(client, put(client, range(4, 7), "b"), 4)
    assert stores.stat("store-0", "evictions") == 3
    held = client.lookup([key_of(i) for i in range(7)])
    assert (sum(held[:4]), held[4:]) == (1, [True] * 3)
    client.close()


def test_a_full_replica_leaves_the_page_under_replicated(stores: Stores) -> None:
    stores.start("store-0", n_slots=2)
    stores.start("store-1", n_slots=50)
    client = stores.client()
    check(client, put(client, range(5)))
    assert client.stats()["under_replicated"] == 3
    client.close()


def test_under_replicated_pages_are_repaired_when_a_store_joins(stores: Stores) -> None:
    stores.start("store-0")
    client = stores.client()
    put(client, range(5))
    assert client.stats()["under_replicated"] == 5
    client.release("row")
    assert client.repair() == 0
    stores.start("store-1")
    client.update_stores(stores.addresses)
    deadline_s = time.monotonic() + 10
    while client.stats()["under_replicated"] and time.monotonic() < deadline_s:
        client.repair()
    assert client.stats()["pages_repaired"] == 5
    for i in range(5):
        assert len(stores.holders(key_of(i))) == 2
    assert [stores.stat(name, "pages_pinned") for name in stores.servers] == [0, 0]
    client.close()


def test_a_joining_store_does_not_hide_pages(pair: Stores) -> None:
    client = pair.client(replicas=1)
    put(client, range(30))
    for i in range(2, 6):
        pair.start(f"store-{i}")
    client.update_stores(pair.addresses)
    check(client, take(client, range(30), "other"))
    client.close()


def test_first_completed_store_wins_at_every_replica(pair: Stores, force_wire: bool) -> None:
    one = pair.client("one", force_wire=force_wire)
    two = pair.client("two", force_wire=force_wire)
    put(one, [1])
    handle = two.store(key_of(1), ROOT, page_of(2), "row").result(10)
    check(two, [handle], 1)
    assert two.stats()["mismatched_duplicates"] == 1
    assert two.stats()["corrupt_detected"] == 0
    put(two, [1])
    assert two.stats()["duplicate_stores"] >= 2
    one.close()
    two.close()


def test_a_replica_is_filled_with_the_winners_bytes(stores: Stores, force_wire: bool) -> None:
    first, second = rendezvous(key_of(1), ["store-0", "store-1"], 2)
    stores.start(second)
    one = stores.client("one", force_wire=force_wire)
    put(one, [1])
    stores.start(first)
    two = stores.client("two", force_wire=force_wire)
    check(two, [two.store(key_of(1), ROOT, page_of(2), "row").result(10)], 1)
    for name in stores.servers:
        reader = stores.client(f"r-{name}", channels={name: stores.addresses[name]})
        check(reader, take(reader, [1]), 1)
        reader.close()
    one.close()
    two.close()


def test_stores_from_many_threads(pair: Stores, force_wire: bool) -> None:
    clients = [pair.client(f"w{k}", force_wire=force_wire) for k in range(2)]

    def work(k: int) -> None:
        client = clients[k % 2]
        check(client, put(client, range(10), f"row-{k}"))
        check(client, take(client, range(10), f"row-{k}"))
        client.release(f"row-{k}")

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, k) for k in range(8)]:
            future.result(60)
    for name in pair.servers:
        assert pair.stat(name, "pages_held") == 10
        assert pair.stat(name, "pages_stored") == 10
        assert pair.stat(name, "leases") == 0
        assert pair.stat(name, "slots_free") == 54
    for client in clients:
        assert client.stats()["mismatched_duplicates"] == 0
        client.close()


def test_release_while_a_store_is_under_way(pair: Stores) -> None:
    client = pair.client()
    futures = [client.store(key_of(i), ROOT, page_of(i), "row") for i in range(30)]
    client.release("row")
    for future in futures:
        future.result(10)
    deadline_s = time.monotonic() + 5
    while any(pair.stat(n, "leases") for n in pair.servers) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert [pair.stat(name, "leases") for name in pair.servers] == [0, 0]
    client.close()


def test_close_while_stores_are_waiting(pair: Stores) -> None:
    client = pair.client()
    futures = [client.store(key_of(i), ROOT, page_of(i), "row") for i in range(60)]
    client.close()
    assert all(future.done() for future in futures)
    assert [pair.stat(name, "leases") for name in pair.servers] == [0, 0]


def test_drop(pair: Stores) -> None:
    client = pair.client()
    (held,) = put(client, [1])
    put(client, [2])
    client.drop([key_of(1)])
    assert client.lookup([key_of(1), key_of(2)]) == [False, True]
    check(client, [held], 1)  # still pinned by its row
    client.close()


def test_leases_are_renewed(stores: Stores) -> None:
    stores.start("store-0", n_slots=2)
    client = stores.client(replicas=1, lease_s=0.6)
    held = put(client, range(2))
    time.sleep(1.5)
    with pytest.raises(StoreFull):
        client.store(key_of(5), ROOT, page_of(5), "other").result(10)
    check(client, held)
    assert not client.lost("row")
    client.close()


def test_a_lease_that_ended_at_the_store_is_noticed(stores: Stores) -> None:
    clock = ManualClock()
    stores.start("store-0", n_slots=2, clock=clock)
    client = stores.client(replicas=1, lease_s=0.9)
    put(client, [1])
    clock.advance(60.0)
    deadline_s = time.monotonic() + 5
    while not client.lost("row") and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert client.lost("row")
    assert client.stats()["leases_lost"] >= 1
    client.close()


def test_backpressure_has_a_deadline(pair: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_client_module, "MAX_WAITING_STORES", 2)
    client = pair.client(timeout_s=0.3)
    for service in pair.services.values():
        service._lock.acquire()  # stores that hang
    try:
        client.store(key_of(0), ROOT, page_of(0), "row")
        client.store(key_of(1), ROOT, page_of(1), "row")
        with pytest.raises(DeadlineExceeded, match="waiting to be stored"):
            client.store(key_of(2), ROOT, page_of(2), "row")
    finally:
        for service in pair.services.values():
            service._lock.release()
    client.close()


def test_a_store_that_hangs_is_skipped_for_a_while(pair: Stores) -> None:
    client = pair.client(timeout_s=0.5)
    put(client, range(6))
    pair.services["store-0"]._lock.acquire()
    try:
        start_s = time.monotonic()
        check(client, take(client, range(6), "other"))
        assert time.monotonic() - start_s < 2.0
        start_s = time.monotonic()
        for _ in range(5):
            check(client, take(client, range(6), "other"))
        assert time.monotonic() - start_s < 0.4, "the cool-down was not kept"
    finally:
        pair.services["store-0"]._lock.release()
    client.close()


def test_another_models_store_is_refused(pair: Stores) -> None:
    other = pair.client(geometry=PageGeometry(1, 1, 8, 16))
    with pytest.raises(StoreUnreachable, match="holds pages of"):
        other.store(key_of(1), ROOT, np.zeros(other.geometry.page_nbytes, np.uint8), "r").result(10)
    other.close()


def test_wrong_arguments(pair: Stores) -> None:
    client = pair.client()
    with pytest.raises(InvalidInput):
        client.store(key_of(1), ROOT, np.zeros(5, np.uint8), "row")
    with pytest.raises(InvalidInput):
        pair.client(replicas=0)
    assert client.acquire([], "row") == []
    assert client.lookup([]) == []
    client.close()
