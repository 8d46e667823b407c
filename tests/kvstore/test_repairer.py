"""Real stores keep every page where it should be: after deaths, joins, drains, damage, full stores."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from longreach.core.errors import InvalidInput
from longreach.core.store_config import StoreConfig
from longreach.kvstore import repairer as repairer_module
from longreach.kvstore.membership import Member, Membership
from longreach.kvstore.page_client import PageClient, PageHandle
from longreach.kvstore.placement import place

from .kv_helpers import GEOMETRY, Stores, check, key_of, put, take

REPLICAS = 2


class World:
    """Stores, the membership that they are told, and a client that places by it."""

    def __init__(self, stores: Stores, *names: str) -> None:
        self.stores = stores
        self.membership = Membership(1 << 32)
        for name in names:
            self.start(name)
        self.tell()
        self.client: PageClient = stores.client("w", channels=self.membership, timeout_s=30.0)
        self.n_pages = 0

    def fill(self, n_pages: int) -> list[PageHandle]:
        """Stores pages 0 to n_pages - 1, pinned for the client's row `row`."""
        self.n_pages = n_pages
        return put(self.client, range(n_pages))

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

    def holders(self) -> list[set[str]]:
        """For each page, who holds it."""
        keys = [key_of(i) for i in range(self.n_pages)]
        held: list[set[str]] = [set() for _ in keys]
        for name in self.stores.servers:
            for at, holds in enumerate(self.stores.call(name, "lookup", keys=keys)["held"]):
                if holds:
                    held[at].add(name)
        return held

    def in_place(self, in_use: Sequence[int] = ()) -> bool:
        """Every page is held by its targets and, but for those in use, by nobody else."""
        for i, held in enumerate(self.holders()):
            targets = set(place(key_of(i), self.membership, REPLICAS))
            if held != targets and not (i in in_use and held > targets):
                return False
        return True

    def read_all(self, name: str) -> None:
        """Every page as this store alone has it, compared with the truth."""
        keys = [i for i, held in enumerate(self.holders()) if name in held]
        reader = self.stores.client(f"r-{name}", channels={name: self.stores.addresses[name]})
        for i, handle in zip(keys, take(reader, keys), strict=True):
            check(reader, [handle], i)
        assert reader.stats()["corrupt_detected"] == 0
        reader.close()

    def surplus(self) -> int:
        return sum(len(held) - REPLICAS for held in self.holders())

    def to_move(self) -> int:
        return self.total("to_move")

    def n_pinned(self) -> int:
        return sum(self.stores.stat(name, "pages_pinned") for name in self.stores.servers)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repairer_module, "SWEEP_S", 1.0)
    monkeypatch.setattr(repairer_module, "BUSY_S", 0.2)
    monkeypatch.setattr(repairer_module, "FIRST_PAUSE_S", 0.2)
    # a store that is asked in vain on a busy machine may be given what it has
    monkeypatch.setattr(repairer_module, "LOOKUP_TIMEOUT_S", 20.0)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Stores]:
    """Stores of this process, where the transport makes no difference."""
    stores = Stores(tmp_path)
    yield stores
    stores.close()


def eventually(true: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.1)


def test_death_join_and_drain_lose_nothing(stores: Stores) -> None:
    world = World(stores, "a", "b", "c", "d")
    n_pages = 500 if stores.scheme == "mem" else 150
    world.fill(n_pages)
    assert world.in_place()
    world.client.release("row")
    # a reader on c's node uses pages where they lie
    near = [i for i, held in enumerate(world.holders()) if "c" in held][:40]
    reader = stores.client("near", channels=world.membership, node_id="node-c")
    pinned = dict(zip(near, take(reader, near), strict=True))
    assert stores.stat("c", "pages_pinned") == len(near)

    lost = Counter(name for held in world.holders() for name in held)["b"]
    stores.stop("b")
    world.tell(loss_age_s=3.0)
    eventually(world.in_place)
    for name in stores.servers:
        world.read_all(name)
    eventually(lambda: all(world.status(n)["time_to_whole_s"] for n in stores.servers))
    statuses = [world.status(name) for name in stores.servers]
    assert sum(s["pages_pushed"] for s in statuses) == lost
    assert sum(s["bytes_pushed"] for s in statuses) == lost * GEOMETRY.page_nbytes
    for status in statuses:
        assert 3.0 <= status["time_to_first_repair_s"] <= status["time_to_whole_s"]

    world.start("e")
    world.tell()
    eventually(lambda: world.in_place(in_use=near))
    share = Counter(name for held in world.holders() for name in held)["e"]
    assert 0.6 * REPLICAS * n_pages / 4 < share < 1.4 * REPLICAS * n_pages / 4
    assert world.total("pages_pushed") == lost + share
    # each of its pages leaves another store, where nobody uses it
    kept = sum(len(held) - REPLICAS for held in world.holders())
    assert world.total("dropped_surplus") == share - kept

    world.drain("a")
    eventually(lambda: world.status("a")["drained"])
    assert all(len(names - {"a"}) >= REPLICAS for names in world.holders())
    stores.stop("a")
    world.tell()
    assert all(len(names) >= REPLICAS for names in world.holders())
    for name in stores.servers:
        world.read_all(name)

    for i, handle in pinned.items():  # nothing of this touched what the reader has
        check(reader, [handle], i)
    assert all("c" in world.holders()[i] for i in near)
    assert not reader.lost("row")
    reader.close()
    eventually(world.in_place)
    assert world.n_pinned() == 0
    world.client.close()


def test_a_pinned_page_that_is_surplus_stays_until_it_is_released(local: Stores) -> None:
    world = World(local, "a", "b")
    pinned = world.fill(100)
    world.start("c")
    world.tell()
    everything = range(100)
    eventually(lambda: world.in_place(in_use=everything) and world.surplus() == world.to_move())
    check(world.client, pinned)
    surplus = world.surplus()
    assert surplus > 20
    assert world.total("dropped_surplus") == 0
    world.client.release("row")
    eventually(world.in_place)
    assert world.total("dropped_surplus") == surplus
    world.client.close()


def test_pages_with_one_copy_get_their_second_when_a_store_joins(local: Stores) -> None:
    world = World(local, "a")
    world.fill(50)
    assert world.client.stats()["pages_under_replicated"] == 50
    world.client.release("row")
    world.start("b")
    world.tell()
    eventually(world.in_place)
    assert world.n_pinned() == 0
    assert all(len(held) == REPLICAS for held in world.holders())
    world.client.close()


def test_a_copy_that_is_missing_is_found_without_a_change_of_members(
    local: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairer_module, "PART_PAGES", 30)
    world = World(local, "a", "b", "c")
    world.fill(60)
    world.client.release("row")
    local.call("a", "drop", keys=[key_of(i) for i in range(60)])
    eventually(world.in_place)
    world.client.close()


def test_a_corrupt_copy_is_never_passed_on(local: Stores) -> None:
    world = World(local, "a", "b")
    world.fill(20)
    world.client.release("row")
    bad = range(0, 20, 3)
    for i in bad:
        local.corrupt("a", key_of(i))
    local.stop("b")
    world.start("b")  # empty
    world.tell()
    eventually(lambda: world.status("a")["failures"].get("NOT_FOUND") == len(bad))
    eventually(lambda: not world.total("under_replicated"))
    assert local.stat("a", "corrupt_detected") == len(bad)
    for i, held in enumerate(world.holders()):
        assert held == (set() if i in bad else {"a", "b"})
    for name in local.servers:
        world.read_all(name)
    world.client.close()


def test_copies_of_unused_pages_take_free_room_only(local: Stores) -> None:
    world = World(local, "a", "b")
    world.fill(30)
    world.client.release("row")
    local.stop("b")
    world.start("b", n_slots=10)
    world.tell()
    eventually(lambda: world.status("a")["failures"].get("STORE_FULL"))
    assert local.stat("b", "pages_held") == 10
    assert local.stat("b", "evictions") == 0
    assert world.status("a")["under_replicated"] == 20
    # others make room for those in use, once
    lacking = [i for i, held in enumerate(world.holders()) if held == {"a"}][:5]
    reader = local.client("r", node_id="node-a")
    for i, handle in zip(lacking, take(reader, lacking), strict=True):
        check(reader, [handle], i)
    eventually(lambda: all(world.holders()[i] == {"a", "b"} for i in lacking))
    assert local.stat("b", "evictions") == 5
    time.sleep(1.0)
    assert local.stat("b", "evictions") == 5, "copies and evictions go on for ever"
    reader.close()
    world.client.close()


def test_a_drain_ends_even_if_the_others_are_too_small(local: Stores) -> None:
    world = World(local, "a", "b")
    world.fill(60)
    world.client.release("row")
    local.stop("b")
    world.start("b", n_slots=20)
    world.tell()
    assert not world.status("a")["drained"]
    world.drain("a")
    eventually(lambda: world.status("a")["drained"])
    assert local.stat("b", "pages_held") == 20
    assert not world.status("b")["drained"]
    world.client.close()


def test_the_rate_is_bounded(local: Stores) -> None:
    rate = 100 * GEOMETRY.page_nbytes
    local.start("a", 200, config=StoreConfig(repair_bytes_per_s=rate))
    world = World(local)
    world.fill(150)
    world.start("b")
    start_s = time.monotonic()
    world.tell()
    eventually(world.in_place)
    # the bucket is full at first: a quarter of a second's worth
    assert time.monotonic() - start_s > 1.1
    world.client.close()


def test_a_store_that_hangs_does_not_keep_the_others_waiting(
    local: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairer_module, "LOOKUP_TIMEOUT_S", 0.5)
    world = World(local, "a", "b", "c", "d")
    world.fill(60)
    world.client.release("row")
    reachable = [i for i, held in enumerate(world.holders()) if held & {"a", "c"}]
    d = local.servers.pop("d")  # a member still, but not asked by the test
    local.stop("b")
    with local.services["d"]._lock:
        members = [member for member in world.membership if member.store_id != "b"]
        world.tell(world.membership.next(members))

        def others_are_whole() -> bool:
            targets = [set(place(key_of(i), world.membership, REPLICAS)) for i in range(60)]
            held = world.holders()
            return all(targets[i] - {"d"} <= held[i] for i in reachable)

        eventually(others_are_whole)
        eventually(lambda: world.status("a")["failures"].get("DEADLINE_EXCEEDED"))
    local.servers["d"] = d
    world.tell()
    eventually(world.in_place)
    world.client.close()


def test_older_epochs_are_answered_with_the_newer(local: Stores) -> None:
    world = World(local, "a", "b")
    newer, older = world.membership, Membership(3, (world.member("a"),))
    answer = local.call("a", "members", membership=older.to_wire(), replicas=1)
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
        {"membership": {"epoch": 1 << 40, "members": []}, "replicas": 1, "loss_age_s": "long"},
    ],
)
def test_bad_memberships_change_nothing(local: Stores, header: dict[str, Any]) -> None:
    world = World(local, "a")
    with pytest.raises(InvalidInput):
        local.call("a", "members", **header)
    assert world.status("a")["epoch"] == world.membership.epoch
    world.client.close()


def test_a_store_drops_nothing_under_another_epoch(local: Stores) -> None:
    world = World(local, "a")
    world.fill(2)
    epoch = world.membership.epoch
    keys = [key_of(0), key_of(1)]
    assert local.call("a", "lookup", keys=keys)["epoch"] == epoch
    drop = {"keys": keys, "unpinned": True}
    assert local.call("a", "drop", epoch=epoch, **drop)["n_dropped"] == 0
    world.client.release("row")
    assert local.call("a", "drop", epoch=epoch - 1, **drop)["n_dropped"] == 0
    assert local.call("a", "drop", epoch=epoch, **drop)["n_dropped"] == 2
    world.client.close()


def test_numbers_are_in_the_stores_stats(local: Stores) -> None:
    world = World(local, "a", "b")
    world.fill(5)
    eventually(lambda: world.status("a")["surveyed_epoch"] == world.membership.epoch)
    stats = local.call("a", "stats")
    assert stats["repair_under_replicated"] == stats["repair_to_move"] == 0
    assert stats["repair_failures"] == stats["repair_pages_pushed"] == 0
    assert stats["repair_drained"] == 0
    assert "repair_time_to_whole_s" not in stats
    numbers = {k: v for k, v in stats.items() if k.startswith("repair_")}
    assert all(isinstance(v, int | float) for v in numbers.values()), numbers
    world.client.close()
