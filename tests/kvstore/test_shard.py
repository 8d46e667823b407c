"""Scenarios of one shard, in order of a page's life. Time is handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from longreach.core.errors import LeaseExpired, PageCorrupt, StoreFull
from longreach.kvstore.arena import Arena
from longreach.kvstore.page import page_checksums
from longreach.kvstore.shard import HeldPage, OpenWrite, StoreShard

from .kv_helpers import GEOMETRY, RECIPE, ROOT, key_of, page_of

LEASE_S = 10.0


@pytest.fixture
def make_shard(tmp_path: Path) -> Iterator[Callable[[int], StoreShard]]:
    arenas = []

    def make(n_slots: int = 4) -> StoreShard:
        arenas.append(Arena.create(tmp_path, GEOMETRY, n_slots * GEOMETRY.page_nbytes, "store"))
        return StoreShard(arenas[-1])

    yield make
    for arena in arenas:
        arena.close()


def begin(
    shard: StoreShard, i: int, owner: str, now: float = 0.0, content: int | None = None
) -> OpenWrite | HeldPage:
    page = page_of(i if content is None else content)
    checksums = page_checksums(page, GEOMETRY)
    begun = shard.prepare_store(key_of(i), ROOT, RECIPE, checksums, owner, now, LEASE_S)
    if isinstance(begun, OpenWrite):
        shard.arena.slots[begun.page.slot] = page
    return begun


def put(shard: StoreShard, i: int, owner: str = "w", now: float = 0.0) -> HeldPage:
    begun = begin(shard, i, owner, now)
    if isinstance(begun, HeldPage):
        return begun
    return shard.complete_store(begun.write_id, owner, now, LEASE_S)


def load(shard: StoreShard, i: int, owner: str, now: float = 0.0) -> HeldPage | None:
    return shard.prepare_load([key_of(i)], owner, now, LEASE_S)[0]


def test_a_page_is_visible_only_when_complete(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard()
    begun = begin(shard, 1, "w")
    assert isinstance(begun, OpenWrite)
    assert shard.lookup([key_of(1)]) == [False]
    assert load(shard, 1, "r") is None
    shard.complete_store(begun.write_id, "w", 1.0, LEASE_S)
    assert shard.lookup([key_of(1), key_of(2)]) == [True, False]
    page = load(shard, 1, "r")
    assert page is not None
    assert (shard.arena.slots[page.slot] == page_of(1)).all()
    assert (page.recipe, page.parent_key) == (RECIPE, ROOT)


def test_least_recently_used_goes_first(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(4)
    for i in range(4):
        put(shard, i)
    shard.release("w")
    shard.touch([key_of(3)])  # release leaves the last stored as the first to go
    put(shard, 10)
    assert shard.lookup([key_of(i) for i in range(4)]) == [True, True, False, True]
    load(shard, 1, "r")
    shard.release("r")
    put(shard, 11)
    assert shard.lookup([key_of(i) for i in range(4)]) == [False, True, False, True]
    assert shard.stats()["evictions"] == 2


def test_the_head_of_a_context_outlives_its_tail(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(4)
    for i in range(4):
        put(shard, i)
    shard.release("w")
    shard.prepare_load([key_of(i) for i in range(4)], "r", 0.0, LEASE_S)
    shard.release("r")
    put(shard, 10, "other")
    put(shard, 11, "other")
    assert shard.lookup([key_of(i) for i in range(4)]) == [True, True, False, False]


def test_copying_a_page_on_is_no_use_of_it(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(3)
    for i in range(3):
        put(shard, i)
    shard.release("w")  # the last stored goes first
    shard.prepare_load([key_of(2)], "repair/x", 0.0, LEASE_S, passing=True)
    shard.complete_load([key_of(2)], "repair/x")
    assert shard.table.order.n_rows(key_of(2)) == 1
    assert shard.stats()["hits_arena"] == 0
    put(shard, 10)
    assert shard.lookup([key_of(i) for i in range(3)]) == [True, True, False]


def test_full_of_pins(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(3)
    put(shard, 0)
    begin(shard, 1, "w")
    put(shard, 2)
    with pytest.raises(StoreFull, match="all 3 page slots"):
        begin(shard, 3, "other")
    assert shard.stats()["store_full"] == 1
    shard.complete_load([key_of(2)], "w")
    put(shard, 3, "other")
    assert shard.lookup([key_of(0), key_of(2), key_of(3)]) == [True, False, True]


def test_two_owners_pin_independently(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    put(shard, 0, "a")
    load(shard, 0, "b")
    assert shard.release("a") == 1
    with pytest.raises(StoreFull):
        put(shard, 1)
    assert shard.release("b") == 1
    put(shard, 1)


def test_pinning_twice_is_one_pin(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    put(shard, 0, "a")
    load(shard, 0, "a")
    load(shard, 0, "a")
    shard.complete_load([key_of(0)], "a")
    shard.complete_load([key_of(0)], "a")
    assert shard.stats()["leases"] == 0
    put(shard, 1)


def test_leases_free_themselves(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(2)
    put(shard, 0, "dead", now=0.0)
    begun = begin(shard, 1, "dead", now=5.0)  # extends the owner's lease to 15
    assert isinstance(begun, OpenWrite)
    with pytest.raises(StoreFull):
        put(shard, 2, "alive", now=14.9)
    put(shard, 2, "alive", now=15.0)
    put(shard, 3, "alive", now=15.0)
    assert shard.stats()["leases_expired"] == 1
    with pytest.raises(LeaseExpired):
        shard.complete_store(begun.write_id, "dead", 15.0, LEASE_S)


def test_renewal(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    put(shard, 0, "a", now=0.0)
    assert shard.renew("a", 9.0, LEASE_S)
    assert shard.expire(18.9) == 0
    assert shard.expire(19.0) == 1
    assert not shard.renew("a", 19.0, LEASE_S)


def test_first_completed_store_wins(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(4)
    one, two, three = (
        begin(shard, 0, owner, content=c) for owner, c in (("a", 0), ("b", 9), ("c", 0))
    )
    assert isinstance(one, OpenWrite)
    assert isinstance(two, OpenWrite)
    assert isinstance(three, OpenWrite)
    winner = shard.complete_store(two.write_id, "b", 0.0, LEASE_S)
    assert shard.complete_store(one.write_id, "a", 0.0, LEASE_S) is winner
    assert shard.complete_store(three.write_id, "c", 0.0, LEASE_S) is winner
    assert begin(shard, 0, "d", content=9) is winner
    assert (shard.arena.slots[winner.slot] == page_of(9)).all()
    stats = shard.stats()
    assert (stats["pages_stored"], stats["duplicate_stores"]) == (1, 1)
    assert stats["mismatched_duplicates"] == 2
    assert stats["corrupt_detected"] == 0
    assert stats["slots_free"] == 3
    assert winner.n_pins == 4


def test_bytes_that_were_not_written_as_announced(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    begun = begin(shard, 0, "w")
    assert isinstance(begun, OpenWrite)
    shard.arena.slots[begun.page.slot, -1] ^= 1
    with pytest.raises(PageCorrupt, match="1 of 6 leaves"):
        shard.complete_store(begun.write_id, "w", 0.0, LEASE_S)
    assert shard.lookup([key_of(0)]) == [False]
    assert shard.stats()["slots_free"] == 1
    put(shard, 0)


def test_a_corrupt_page_is_dropped_when_asked_for(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(2)
    page = put(shard, 0)
    shard.arena.slots[page.slot, 7] ^= 1
    assert shard.prepare_load([key_of(0)], "r", 0.0, LEASE_S, verify=False) == [page]
    assert load(shard, 0, "r2") is None
    assert shard.lookup([key_of(0)]) == [False]
    assert shard.stats()["corrupt_detected"] == 1


def test_a_dropped_page_keeps_its_slot_while_pinned(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    page = put(shard, 0, "reader")
    assert shard.drop([key_of(0), key_of(5)]) == 1
    assert shard.lookup([key_of(0)]) == [False]
    with pytest.raises(StoreFull):
        put(shard, 1)
    assert (shard.arena.slots[page.slot] == page_of(0)).all()
    shard.release("reader")
    put(shard, 1)


def test_a_late_report_does_not_drop_the_pages_successor(
    make_shard: Callable[..., StoreShard],
) -> None:
    shard = make_shard(2)
    old = put(shard, 0)
    assert shard.report_corrupt(key_of(0), old.slot)
    new = put(shard, 0)
    assert new.slot != old.slot
    assert not shard.report_corrupt(key_of(0), old.slot)
    assert shard.lookup([key_of(0)]) == [True]


def test_abort_gives_the_slot_back_once(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    begun = begin(shard, 0, "w")
    assert isinstance(begun, OpenWrite)
    shard.abort_store(begun.write_id, "w")
    shard.abort_store(begun.write_id, "w")
    assert shard.stats()["slots_free"] == 1
    with pytest.raises(LeaseExpired):
        shard.complete_store(begun.write_id, "w", 0.0, LEASE_S)


def test_a_write_belongs_to_its_owner(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(1)
    begun = begin(shard, 0, "w")
    assert isinstance(begun, OpenWrite)
    with pytest.raises(LeaseExpired):
        shard.complete_store(begun.write_id, "thief", 0.0, LEASE_S)
    shard.complete_store(begun.write_id, "w", 0.0, LEASE_S)


def test_release_of_a_dead_worker_by_prefix(make_shard: Callable[..., StoreShard]) -> None:
    shard = make_shard(3)
    for i, owner in enumerate(("worker-1/a/1", "worker-1/b/2", "worker-2/a/1")):
        put(shard, i, owner)
    assert shard.release("worker-1/", prefix=True) == 2
    assert shard.stats()["pages_pinned"] == 1


def test_slots_without_memory_are_not_used(
    make_shard: Callable[..., StoreShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full tmpfs: eviction goes on with the slots that have memory."""
    shard = make_shard(4)
    put(shard, 0)
    put(shard, 1)
    reserved = {page.slot for page in (shard.find(key_of(0)), shard.find(key_of(1))) if page}
    monkeypatch.setattr(shard.arena, "reserve", lambda slot: slot in reserved)
    with pytest.raises(StoreFull):
        put(shard, 2)
    shard.release("w")
    put(shard, 2)
    put(shard, 3)
    assert shard.lookup([key_of(i) for i in range(4)]) == [False, False, True, True]
    assert np.isin([shard.find(key_of(3)).slot], list(reserved)).all()  # type: ignore[union-attr]
