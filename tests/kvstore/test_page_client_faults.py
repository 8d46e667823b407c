"""What a worker relies on when copies are corrupt and stores die, restart or hang."""

from __future__ import annotations

import contextlib
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longreach.core.clock import ManualClock
from longreach.core.errors import (
    LongreachError,
    StoreUnreachable,
)
from longreach.core.page_key import PageKey, RecipeFingerprint
from longreach.kvstore import page_client
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.placement import rendezvous

from .kv_helpers import GEOMETRY, ROOT, Stores, bytes_at, check, key_of, page_of, put, take


def primary(key: PageKey) -> str:
    return rendezvous(key, ["store-0", "store-1"], 1)[0]


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
    assert client.stats()["pages_under_replicated"] == 1
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


def test_the_memory_of_dead_stores_is_given_back(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once no row has pages there: stores that die now and then would otherwise fill a worker's node."""
    monkeypatch.setattr(page_client, "MAINTENANCE_S", 0.02)
    before, clock = mapped_arenas(), ManualClock()
    stores.start("store-0")
    with contextlib.closing(stores.client(replicas=1, clock=clock)) as client:
        (old,) = put(client, [1], "long")
        for i in range(3):
            stores.stop("store-0")
            stores.start("store-0")
            client.update_stores(stores.addresses)
            put(client, [2 + i], "short")
            client.release("short")
        gc.collect()
        assert len(mapped_arenas() - before) == 4
        passes(client, clock, n_gone=2)
        assert (bytes_at(client, old) == page_of(1)).all()
        client.release("long")
        passes(client, clock, n_gone=3)
        check(client, put(client, [9], "later"), 9)
        gc.collect()
        assert len(mapped_arenas() - before) == 1
        passes(client, clock, n_gone=3)


def passes(client: PageClient, clock: ManualClock, n_gone: int) -> None:
    """Time goes by until so many memories are given back, and for as long again."""
    for _ in range(2):
        deadline_s = time.monotonic() + 10
        while sum(not len(memory) for memory in client.memories) != n_gone:
            assert time.monotonic() < deadline_s
            clock.advance(20.0)
            time.sleep(0.05)
        for _ in range(4):
            clock.advance(20.0)
            time.sleep(0.05)


def mapped_arenas() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if "longreach-arena" in line}


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
