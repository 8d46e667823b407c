"""What a worker relies on: replicas, pins, write-behind, placement, repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from longreach.core.clock import ManualClock
from longreach.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    StoreFull,
    StoreUnreachable,
    Unavailable,
)
from longreach.kvstore.page import PageGeometry
from longreach.kvstore.placement import rendezvous
from longreach.kvstore.store_service import StoreService

from .kv_helpers import GEOMETRY, ROOT, Stores, bytes_at, check, key_of, page_of, put, take


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
    assert client.stats()["pages_under_replicated"] == 3
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


def test_backpressure_has_a_deadline(pair: Stores) -> None:
    client = pair.client(timeout_s=0.3, write_behind_bytes=2 * GEOMETRY.page_nbytes)
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


def test_slow_stores_slow_the_writer(pair: Stores) -> None:
    """Prefill waits for room instead of failing, and pages under way stay within their bytes."""
    most = [0]

    def slowly(service: StoreService) -> None:
        inner = service.handle

        def handle(method: str, header: dict[str, Any], buffers: Sequence[memoryview]) -> Any:
            if method == "prepare_store":
                time.sleep(0.05)
                most[0] = max(most[0], int(client.stats()["write_behind_bytes"]))
            return inner(method, header, buffers)

        service.handle = handle  # type: ignore[method-assign]

    for service in pair.services.values():
        slowly(service)
    client = pair.client(write_behind_bytes=5 * GEOMETRY.page_nbytes, timeout_s=1.0)
    start_s = time.monotonic()
    futures = [client.store(key_of(i), ROOT, page_of(i), "row") for i in range(40)]
    submitted_s = time.monotonic() - start_s
    for i, future in enumerate(futures):
        check(client, [future.result(10)], i)
    # four writers, two stores each: 40 pages take a second, of which the last five are not waited for
    assert submitted_s > 0.7
    assert GEOMETRY.page_nbytes < most[0] <= 5 * GEOMETRY.page_nbytes
    assert client.stats()["write_behind_bytes"] == 0
    client.close()


def test_a_page_larger_than_the_bound_goes_alone(pair: Stores) -> None:
    client = pair.client(write_behind_bytes=1)
    check(client, put(client, range(5)))
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
