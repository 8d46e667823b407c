"""Batches of pages from several stores: one request each, one deadline, hedges, cancellation."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from longreach.core.errors import Cancelled, LongreachError
from longreach.core.page_key import RecipeFingerprint
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import Reply

from .kv_helpers import ROOT, Stores, check, key_of, page_of, put, take

Change = Callable[[int, Reply], Reply | None]


def tamper(service: StoreService, change: Change) -> None:
    """Every page that this store streams goes through `change`, which may wait; None drops the
    rest of the stream's replies."""
    inner = service.handle

    def replies(made: Iterator[Reply]) -> Iterator[Reply]:
        for i, reply in enumerate(made):
            changed = change(i, reply)
            if changed is None:
                return
            yield changed

    def handle(
        method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        made = inner(method, header, buffers)
        return made if isinstance(made, Reply) else replies(made)

    service.handle = handle  # type: ignore[method-assign]


def stall(service: StoreService, after: int, gate: threading.Event) -> None:
    """Streams of this store stop after so many pages until the gate opens."""

    def wait(i: int, reply: Reply) -> Reply:
        if i >= after:
            gate.wait(30)
        return reply

    tamper(service, wait)


def count_requests(stores: Stores) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()

    def watch(name: str, service: StoreService) -> None:
        inner = service.handle

        def handle(method: str, header: dict[str, Any], buffers: Sequence[memoryview]) -> Any:
            counts[name, method] += 1
            return inner(method, header, buffers)

        service.handle = handle  # type: ignore[method-assign]

    for name, service in stores.services.items():
        watch(name, service)
    return counts


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def at_rest(stores: Stores, timeout_s: float = 15.0) -> bool:
    """No store has pins, leases or open writes."""
    fields = ("pages_pinned", "leases", "writes_open")
    return wait_until(
        lambda: not any(stores.stat(name, field) for name in stores.servers for field in fields),
        timeout_s,
    )


def leases_left(stores: Stores) -> list[tuple[str, str, int, int]]:
    """Store, owner, pages pinned and writes open."""
    return [
        (store_id, owner, len(lease.pages), len(lease.writes))
        for store_id, service in stores.services.items()
        for owner in service._shard._leases.named("")
        if (lease := service._shard._leases.get(owner)) is not None
    ]


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}")[-50:])
    return found


def n_open_files() -> int:
    gc.collect()  # a mapping keeps its file open
    return len(open_files())


@pytest.fixture
def filled(stores: Stores) -> Stores:
    """Three stores of other nodes with two copies of 60 pages."""
    for i in range(3):
        stores.start(f"store-{i}", n_slots=200, node_id=f"node-{i + 1}")
    writer = stores.client("writer")
    put(writer, range(60))
    writer.close()
    return stores


def quick_learner(stores: Stores, **options: Any) -> PageClient:
    """A client that knows how quick its stores are."""
    client = stores.client(**options)
    for k in range(20):
        take(client, range(k % 6 * 10, k % 6 * 10 + 10), f"lesson-{k}")
        client.release(f"lesson-{k}")
    return client


def test_one_request_per_store_and_batch(filled: Stores) -> None:
    client = filled.client()
    counts = count_requests(filled)
    check(client, take(client, range(60)))
    assert {counts[name, "read"] for name in filled.servers} == {1}
    sent = [filled.stat(name, "leases") for name in filled.servers]
    assert sent == [0, 0, 0], "the pins of a stream end with it"
    client.close()


def test_one_deadline_for_all(filled: Stores) -> None:
    gate = threading.Event()
    for service in filled.services.values():
        stall(service, 1, gate)
    client = filled.client(timeout_s=5.0)
    start_s = time.monotonic()
    handles = client.acquire([key_of(i) for i in range(60)], "row", timeout_s=0.5)
    elapsed_s = time.monotonic() - start_s
    gate.set()
    assert 0.4 < elapsed_s < 3.0
    check(client, handles[:1])
    n_missing = sum(handle is None for handle in handles)
    assert n_missing >= 50
    stats = client.stats()
    assert stats["pages_unavailable"] == n_missing
    assert stats["failed_load_deadline"] >= n_missing
    check(client, take(client, range(60), "other"))  # nobody was blamed for the hurry
    client.release("row")
    client.release("other")
    assert at_rest(filled)
    client.close()


def test_a_store_that_dies_hands_its_share_on(filled: Stores) -> None:
    client = filled.client(timeout_s=4.0)
    reached = threading.Event()

    def slowly(i: int, reply: Reply) -> Reply:
        if i == 5:
            reached.set()
            time.sleep(0.3)
        return reply

    tamper(filled.services["store-0"], slowly)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(take, client, range(60))
        assert reached.wait(5)
        filled.stop("store-0")
        check(client, loading.result(10))
    assert client.stats()["replica_reads"] > 0
    assert client.stats()["failed_load_unreachable"] > 0
    client.close()


def test_a_silent_store_is_hedged(filled: Stores) -> None:
    client = quick_learner(filled, timeout_s=30.0)
    gate = threading.Event()
    stall(filled.services["store-0"], 3, gate)
    start_s = time.monotonic()
    check(client, take(client, range(60)))
    elapsed_s = time.monotonic() - start_s
    stats = client.stats()
    gate.set()
    assert elapsed_s < 10.0, "patience of half the deadline would have been enough"
    assert 1 <= stats["hedges_won"] <= stats["hedges_sent"]
    assert stats["pages_unavailable"] == 0
    assert stats["store_failures"] == 0
    client.release("row")
    assert at_rest(filled), "the loser's pins were not released"
    assert client.stats()["private_pages"] == 0
    client.close()


def test_without_hedges_patience_decides(filled: Stores) -> None:
    client = quick_learner(filled, timeout_s=2.0, hedge=False)
    gate = threading.Event()
    stall(filled.services["store-0"], 3, gate)
    start_s = time.monotonic()
    check(client, take(client, range(60)))
    elapsed_s = time.monotonic() - start_s
    gate.set()
    assert elapsed_s > 0.8
    assert client.stats()["hedges_sent"] == 0
    assert client.stats()["failed_load_deadline"] > 0
    client.close()


def test_hedges_are_few(filled: Stores) -> None:
    """A store that stalls in every batch costs a tenth of the requests, not a hedge each time."""
    client = quick_learner(filled, timeout_s=20.0)
    before = client.stats()["hedges_sent"]
    n_requests = count_requests(filled)

    def slow(i: int, reply: Reply) -> Reply:
        time.sleep(0.09 if i == 0 else 0)
        return reply

    tamper(filled.services["store-0"], slow)
    for k in range(20):
        check(client, take(client, range(20), f"row-{k}"))
        client.release(f"row-{k}")
    n_hedges = client.stats()["hedges_sent"] - before
    n_reads = sum(n for (_, method), n in n_requests.items() if method == "read")
    assert n_hedges <= 0.1 * n_reads + 8
    client.close()


def test_a_near_store_that_hangs_is_hedged_too(stores: Stores) -> None:
    stores.start("store-0")
    stores.start("store-1")
    writer = stores.client("writer")
    put(writer, range(12))
    writer.close()
    client = quick_learner(stores, timeout_s=30.0)
    stores.services["store-0"]._lock.acquire()
    try:
        start_s = time.monotonic()
        check(client, take(client, range(12)))
        assert time.monotonic() - start_s < 10.0
        assert client.stats()["hedges_won"] >= 1
    finally:
        stores.services["store-0"]._lock.release()
    client.release("row")
    assert at_rest(stores, 40.0)
    client.close()


def flip(i: int, reply: Reply) -> Reply:
    page = bytearray(reply.buffers[0])
    page[i % len(page)] ^= 1
    return Reply(reply.header, [page])


def cut(i: int, reply: Reply) -> Reply:
    return Reply(reply.header, [bytes(reply.buffers[0])[:-7]])


@pytest.mark.parametrize(("how", "reason"), [(flip, "corrupt_wire"), (cut, "short")])
def test_damage_on_the_way_is_counted_and_replaced(
    filled: Stores, how: Change, reason: str
) -> None:
    tamper(filled.services["store-1"], how)
    client = filled.client()
    check(client, take(client, range(60)))
    stats = client.stats()
    assert stats[f"failed_load_{reason}"] >= 15
    assert stats["replica_reads"] == stats[f"failed_load_{reason}"]
    assert filled.stat("store-1", "corrupt_detected") == 0, "its own copy is good"
    client.release("row")
    assert client.stats()["private_pages"] == 0
    client.close()


def test_a_stream_that_ends_early(filled: Stores) -> None:
    tamper(filled.services["store-1"], lambda i, reply: reply if i < 4 else None)
    client = filled.client()
    check(client, take(client, range(60)))
    assert client.stats()["failed_load_missing"] >= 10
    client.close()


def test_every_reason_is_counted(pair: Stores, force_wire: bool) -> None:
    client = pair.client(force_wire=force_wire)
    put(client, range(4), "writer")
    client.release("writer")
    stranger = pair.client("stranger", recipe=RecipeFingerprint(b"x" * 32), force_wire=force_wire)
    assert take(stranger, [0]) == [None]
    assert stranger.stats()["failed_load_wrong_recipe"] == 2
    assert take(client, [99]) == [None]
    assert client.stats()["failed_load_missing"] == 2
    for name in pair.servers:
        pair.corrupt(name, key_of(1))
    assert take(client, [1]) == [None]
    reason = "missing" if force_wire else "corrupt_inplace"  # a store looks before it sends
    assert client.stats()[f"failed_load_{reason}"] == (4 if force_wire else 2)
    pair.close()
    assert take(client, [2], "last") == [None]
    assert client.stats()["failed_load_unreachable"] >= 1
    for each in (client, stranger):
        each.close()


def test_release_ends_a_running_acquire(filled: Stores) -> None:
    client = filled.client(timeout_s=20.0)
    gate = threading.Event()
    for service in filled.services.values():
        stall(service, 4, gate)
    with ThreadPoolExecutor(1) as pool:
        acquiring = pool.submit(take, client, range(60))
        assert wait_until(lambda: client.stats()["private_pages"] >= 4)
        start_s = time.monotonic()
        client.release("row")
        with pytest.raises(Cancelled, match="released"):
            acquiring.result(5)
        assert time.monotonic() - start_s < 5.0
    assert client.stats()["private_pages"] == 0
    assert client.stats()["rows"] == 0
    gate.set()
    assert at_rest(filled)
    check(client, take(client, range(60)))  # the name may be used again
    client.close()


def test_close_ends_running_acquires(filled: Stores) -> None:
    client = filled.client(timeout_s=20.0)
    gate = threading.Event()
    for service in filled.services.values():
        stall(service, 4, gate)
    with ThreadPoolExecutor(1) as pool:
        acquiring = pool.submit(take, client, range(60))
        assert wait_until(lambda: client.stats()["private_pages"] >= 4)
        client.close()
        with pytest.raises(Cancelled):
            acquiring.result(5)
    gate.set()
    assert at_rest(filled)


def troubled_row(client: PageClient, rng: random.Random, row: str) -> None:
    """Acquires, prefetches and stores with a chance; may be released in the middle."""
    numbers = rng.sample(range(70), rng.randrange(1, 40))
    keys = [key_of(i) for i in numbers]
    killer = threading.Timer(rng.random() * 0.05, client.release, (row,))
    killed = rng.random() < 0.4
    if killed:
        killer.start()
    try:
        handles = client.acquire(keys, row, rng.choice([0.01, 0.1, None]))
        for i, handle in zip(numbers, handles, strict=True):
            if handle is not None and not killed:
                check(client, [handle], i)
        if rng.random() < 0.3:
            client.prefetch(keys)
        if rng.random() < 0.3:
            i = rng.randrange(200, 210)
            client.store(key_of(i), ROOT, page_of(i), row)
    except LongreachError:
        pass
    if killed:
        killer.join()
    client.release(row)


def live_through_troubles(stores: Stores, seed: int, node_id: str) -> None:
    rng = random.Random(seed)

    def trouble(i: int, reply: Reply) -> Reply | None:
        dice = rng.random()
        if dice < 0.02:
            time.sleep(rng.random() * 0.1)
        if dice < 0.03:
            return None
        return flip(i, reply) if dice < 0.06 and reply.buffers else reply

    for service in stores.services.values():
        tamper(service, trouble)
    client = stores.client(timeout_s=1.0, node_id=node_id)

    def work(k: int) -> None:
        mine = random.Random(seed * 100 + k)
        for n in range(8):
            troubled_row(client, mine, f"row-{k}-{n}")

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, k) for k in range(4)]
        time.sleep(0.1)
        address = stores.addresses["store-2"]
        stores.stop("store-2")
        time.sleep(0.2)
        stores.start("store-2", n_slots=200, node_id="node-3", address=address)
        for future in futures:
            future.result(60)
    client.close()
    stats = client.stats()
    assert (stats["private_pages"], stats["write_behind_bytes"], stats["rows"]) == (0, 0, 0)
    assert at_rest(stores), leases_left(stores)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("node_id", ["node-1", "node-9"], ids=["near", "far"])
def test_after_any_troubles_everything_is_free(filled: Stores, seed: int, node_id: str) -> None:
    """Rows from several threads, cancelled at any time, with short deadlines, from stores that die,
    restart, lose, damage and delay pages."""
    n_files, n_threads = n_open_files(), threading.active_count()
    live_through_troubles(filled, seed, node_id)
    # ZeroMQ closes its sockets behind
    assert wait_until(lambda: threading.active_count() <= n_threads), threading.enumerate()
    assert wait_until(lambda: n_open_files() <= n_files), open_files()
