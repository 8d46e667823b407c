"""Real stores keep every page where it should be: after deaths, joins, drains, damage, full stores."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from longreach.core.config import StoreConfig
from longreach.core.errors import InvalidInput
from longreach.kvstore import repairer as repairer_module
from longreach.kvstore.membership import Member, Membership
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.placement import place

from .kv_helpers import GEOMETRY, Stores, check, key_of, put, take

N_PAGES = 500
REPLICAS = 2


class World:
    """Stores, the membership that they are told, and a client that places by it."""

    def __init__(self, stores: Stores, *names: str, n_slots: int = 1000) -> None:
        self.stores = stores
        self.membership = Membership(1 << 32)
        for name in names:
            self.start(name, n_slots)
        self.tell()
        self.client: PageClient = stores.client("w", channels=self.membership)

    def start(self, name: str, n_slots: int = 1000) -> None:
        self.stores.start(name, n_slots, node_id=f"node-{name}")

    def member(self, name: str) -> Member:
        hello = self.stores.call(name, "hello")
        address = self.stores.addresses[name]
        return Member(name, address, hello["node_id"], hello["zone"], hello["weight"])

    def tell(self, membership: Membership | None = None, **more: Any) -> None:
        """The supervisor's part. Without a membership: all stores that run, none draining."""
        members = [self.member(name) for name in self.stores.servers]
        self.membership = membership or self.membership.next(members)
        wire = self.membership.to_wire()
        for name in self.stores.servers:
            self.stores.call(name, "members", membership=wire, replicas=REPLICAS, **more)
        if hasattr(self, "client"):
            self.client.update_stores(self.membership)

    def drain(self, name: str) -> None:
        self.tell(self.membership.drained(name))

    def status(self, name: str) -> dict[str, Any]:
        return self.stores.call(name, "repair_status")

    def total(self, field: str) -> int:
        return sum(self.status(name)[field] for name in self.stores.servers)

    def holders(self, n_pages: int = N_PAGES) -> list[set[str]]:
        """For each page, who holds it."""
        keys = [key_of(i) for i in range(n_pages)]
        held: list[set[str]] = [set() for _ in keys]
        for name in self.stores.servers:
            for at, holds in enumerate(self.stores.call(name, "lookup", keys=keys)["held"]):
                if holds:
                    held[at].add(name)
        return held

    def in_place(self, n_pages: int = N_PAGES) -> bool:
        """Every page is held by its targets and nobody else."""
        targets = [set(place(key_of(i), self.membership, REPLICAS)) for i in range(n_pages)]
        return self.holders(n_pages) == targets

    def read_all(self, name: str, n_pages: int = N_PAGES) -> None:
        """Every page as this store alone has it, compared with the truth."""
        keys = [i for i, held in enumerate(self.holders(n_pages)) if name in held]
        reader = self.stores.client(f"r-{name}", channels={name: self.stores.addresses[name]})
        for i, handle in zip(keys, take(reader, keys), strict=True):
            check(reader, [handle], i)
        assert reader.stats()["corrupt_detected"] == 0
        reader.close()

    def n_pinned(self) -> int:
        return sum(self.stores.stat(name, "pages_pinned") for name in self.stores.servers)


def eventually(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.05)


def test_death_join_and_drain_lose_nothing(stores: Stores) -> None:
    world = World(stores, "a", "b", "c", "d")
    put(world.client, range(N_PAGES))
    assert world.in_place()
    world.client.release("row")
    pinned = take(world.client, [0, 1, 2], "reader")
    check(world.client, pinned)

    lost = Counter(name for held in world.holders() for name in held)["b"]
    stores.stop("b")
    world.tell(loss_age_s=3.0)
    eventually(world.in_place)
    for name in stores.servers:
        world.read_all(name)
    statuses = [world.status(name) for name in stores.servers]
    assert sum(s["pages_pushed"] for s in statuses) == lost
    assert sum(s["bytes_pushed"] for s in statuses) == lost * GEOMETRY.page_nbytes
    eventually(lambda: all(world.status(n)["time_to_whole_s"] for n in stores.servers))
    for status in map(world.status, stores.servers):
        assert 3.0 <= status["time_to_first_repair_s"] <= status["time_to_whole_s"] < 20.0

    pushed_before = world.total("pages_pushed")
    world.start("e")
    world.tell()
    eventually(world.in_place)
    share = Counter(name for held in world.holders() for name in held)["e"]
    assert 0.7 * REPLICAS * N_PAGES / 4 < share < 1.3 * REPLICAS * N_PAGES / 4
    assert world.total("pages_pushed") - pushed_before == share
    assert world.total("dropped_surplus") == share  # each of its pages left another store

    world.drain("a")
    eventually(lambda: world.status("a")["drained"])
    held = world.holders()
    assert all(len(names - {"a"}) == REPLICAS for names in held)
    check(world.client, pinned)  # where they were, whatever moved
    stores.stop("a")
    world.tell()
    assert all(len(names) == REPLICAS for names in world.holders())
    for name in stores.servers:
        world.read_all(name)
    check(world.client, pinned)
    world.client.release("reader")
    eventually(world.in_place)
    assert world.n_pinned() == 0
    world.client.close()


def test_a_pinned_page_that_is_surplus_stays_until_it_is_released(stores: Stores) -> None:
    world = World(stores, "a", "b")
    pinned = put(world.client, range(100))
    world.start("c")
    world.tell()
    eventually(
        lambda: all(
            set(place(key_of(i), world.membership, REPLICAS)) <= held
            for i, held in enumerate(world.holders(100))
        )
    )
    check(world.client, pinned)
    surplus = sum(len(held) - REPLICAS for held in world.holders(100))
    assert surplus == world.total("to_move") > 0
    assert world.total("dropped_surplus") == 0
    world.client.release("row")
    eventually(lambda: world.in_place(100))
    assert world.total("dropped_surplus") == surplus
    world.client.close()


def test_pages_with_one_copy_get_their_second_when_a_store_joins(stores: Stores) -> None:
    world = World(stores, "a")
    put(world.client, range(50))
    assert world.client.stats()["pages_under_replicated"] == 50
    world.client.release("row")
    world.start("b")
    world.tell()
    eventually(lambda: world.in_place(50))
    assert world.n_pinned() == 0
    assert all(len(held) == REPLICAS for held in world.holders(50))
    world.client.close()


def test_a_copy_that_is_missing_is_found_without_a_change_of_members(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairer_module, "SWEEP_S", 0.1)
    monkeypatch.setattr(repairer_module, "PART_PAGES", 30)
    world = World(stores, "a", "b", "c")
    put(world.client, range(100))
    world.client.release("row")
    stores.call("a", "drop", keys=[key_of(i) for i in range(100)])
    eventually(lambda: world.in_place(100))
    world.client.close()


def test_a_corrupt_copy_is_never_passed_on(stores: Stores) -> None:
    world = World(stores, "a", "b")
    put(world.client, range(20))
    world.client.release("row")
    bad = [i for i in range(20) if place(key_of(i), world.membership, 1) == ["a"]]
    for i in bad:
        stores.corrupt("a", key_of(i))
    stores.stop("b")
    world.start("b")  # empty
    world.tell()
    eventually(lambda: world.status("a")["failures"].get("NOT_FOUND") == len(bad))
    eventually(lambda: not world.total("under_replicated"))
    assert stores.stat("a", "corrupt_detected") == len(bad)
    for i, held in enumerate(world.holders(20)):
        assert held == (set() if i in bad else {"a", "b"})
    for name in stores.servers:
        world.read_all(name, 20)
    world.client.close()


def test_copies_of_unused_pages_take_free_room_only(stores: Stores) -> None:
    world = World(stores, "a", "b")
    put(world.client, range(30))
    world.client.release("row")
    stores.stop("b")
    world.start("b", n_slots=10)
    world.tell()
    eventually(lambda: world.status("a")["failures"].get("STORE_FULL"))
    assert stores.stat("b", "pages_held") == 10
    assert stores.stat("b", "evictions") == 0
    assert world.total("under_replicated") == 20
    # those in use come first, and others make room for them
    lacking = [i for i, held in enumerate(world.holders(30)) if held == {"a"}][:5]
    reader = stores.client("r", node_id="node-a")
    check_in_place = take(reader, lacking)
    for i, handle in zip(lacking, check_in_place, strict=True):
        check(reader, [handle], i)
    eventually(lambda: all(world.holders(30)[i] == {"a", "b"} for i in lacking))
    assert stores.stat("b", "evictions") == 5
    time.sleep(2.5)
    assert stores.stat("b", "evictions") == 5, "copies and evictions go on for ever"
    reader.close()
    world.client.close()


def test_a_drain_ends_even_if_the_others_are_too_small(stores: Stores) -> None:
    world = World(stores, "a", "b", n_slots=100)
    put(world.client, range(60))
    world.client.release("row")
    stores.stop("b")
    world.start("b", n_slots=20)
    world.drain("a") if world.membership.find("a") is None else world.tell()
    world.drain("a")
    eventually(lambda: world.status("a")["drained"])
    assert stores.stat("b", "pages_held") == 20
    world.client.close()


def test_the_rate_is_bounded(stores: Stores) -> None:
    rate = 100 * GEOMETRY.page_nbytes
    stores.start("a", 200, config=StoreConfig(repair_bytes_per_s=rate))
    world = World(stores, "b", n_slots=200)
    alone = Membership(world.membership.epoch + 1, (world.member("a"),))
    world.tell(alone)
    put(world.client, range(200))
    start_s = time.monotonic()
    world.tell(alone.next([world.member("a"), world.member("b")]))
    eventually(lambda: all(len(held) == 2 for held in world.holders(200)))
    # the bucket is full at first: a quarter of a second's worth
    assert 1.6 < time.monotonic() - start_s < 6.0
    world.client.close()


def test_a_target_that_hangs_does_not_keep_the_others_waiting(stores: Stores) -> None:
    world = World(stores, "a", "b", "c", "d")
    put(world.client, range(100))
    world.client.release("row")
    stores.stop("b")
    world.tell(
        Membership(
            world.membership.epoch + 1, tuple(world.member(name) for name in ("a", "c", "d"))
        )
    )
    lock: threading.Lock = stores.services["d"]._lock
    with lock:
        eventually(
            lambda: all(
                {"a", "c"} - held == set() or "d" in place(key_of(i), world.membership, 2)
                for i, held in enumerate(_holders_without(world, "d", 100))
            )
        )
        eventually(lambda: world.status("a")["failures"].get("DEADLINE_EXCEEDED"))
    eventually(lambda: world.in_place(100), 30.0)
    world.client.close()


def _holders_without(world: World, name: str, n_pages: int) -> list[set[str]]:
    server = world.stores.servers.pop(name)
    try:
        return world.holders(n_pages)
    finally:
        world.stores.servers[name] = server


def test_older_epochs_are_answered_with_the_newer(stores: Stores) -> None:
    world = World(stores, "a", "b")
    newer, older = world.membership, Membership(3, (world.member("a"),))
    answer = stores.call("a", "members", membership=older.to_wire(), replicas=1)
    assert answer["epoch"] == newer.epoch
    assert Membership.from_wire(answer["membership"]) == newer
    assert world.status("a")["epoch"] == newer.epoch
    world.client.close()


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"membership": {"epoch": 1 << 40, "members": []}},
        {"membership": {"epoch": 1 << 40, "members": []}, "replicas": 0},
        {"membership": {"epoch": 1 << 40, "members": [{}]}, "replicas": 1},
    ],
)
def test_bad_memberships_change_nothing(stores: Stores, header: dict[str, Any]) -> None:
    world = World(stores, "a")
    with pytest.raises(InvalidInput):
        stores.call("a", "members", **header)
    assert world.status("a")["epoch"] == world.membership.epoch
    world.client.close()


def test_a_store_drops_nothing_under_another_epoch(stores: Stores) -> None:
    world = World(stores, "a")
    put(world.client, [1, 2])
    epoch = world.membership.epoch
    keys = [key_of(1), key_of(2)]
    assert stores.call("a", "lookup", keys=keys)["epoch"] == epoch
    drop = {"keys": keys, "unpinned": True}
    assert stores.call("a", "drop", epoch=epoch, **drop)["n_dropped"] == 0
    world.client.release("row")
    assert stores.call("a", "drop", epoch=epoch - 1, **drop)["n_dropped"] == 0
    assert stores.call("a", "drop", epoch=epoch, **drop)["n_dropped"] == 2
    world.client.close()


def test_numbers_are_in_the_stores_stats(stores: Stores) -> None:
    world = World(stores, "a", "b")
    put(world.client, range(5))
    eventually(lambda: world.status("a")["surveyed_epoch"] == world.membership.epoch)
    stats = stores.call("a", "stats")
    assert stats["repair_under_replicated"] == stats["repair_to_move"] == 0
    assert stats["repair_failures"] == stats["repair_pages_pushed"] == 0
    assert stats["repair_drained"] == 0
    assert "repair_time_to_whole_s" not in stats
    numbers = {k: v for k, v in stats.items() if k.startswith("repair_")}
    assert all(isinstance(v, int | float) for v in numbers.values()), numbers
    world.client.close()
