"""Which store is asked for which page: order, balance, hand-over, races."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.core.page_key import PageKey
from longreach.kvstore.fetch_plan import FetchPlan, Share
from longreach.kvstore.placement import rendezvous

from .kv_helpers import key_of

STORES = [f"store-{i}" for i in range(4)]


def ranks_of(keys: list[PageKey], stores: list[str] = STORES) -> dict[PageKey, list[str]]:
    return {key: rendezvous(key, stores, len(stores)) for key in keys}


def plan_of(n: int, near: tuple[str, ...] = (), n_replicas: int = 2) -> FetchPlan:
    keys = [key_of(i) for i in range(n)]
    return FetchPlan(keys, ranks_of(keys), near, n_replicas)


def yes() -> bool:
    return True


def test_one_request_per_store_and_those_that_hold_it() -> None:
    keys = [key_of(i) for i in range(400)]
    ranks = ranks_of(keys)
    shares = FetchPlan(keys, ranks, (), 2).begin()
    assert len(shares) == len({share.store_id for share in shares}) == 4
    for share in shares:
        assert list(share.keys) == sorted(share.keys, key=keys.index), "not in order of need"
        assert all(share.store_id in ranks[key][:2] for key in share.keys)
    sizes = [len(share.keys) for share in shares]
    assert max(sizes) - min(sizes) <= 4, "the load is not spread over the replicas"


def test_near_copies_first() -> None:
    shares = plan_of(50, near=("store-2",)).begin()
    assert [(share.store_id, len(share.keys)) for share in shares] == [("store-2", 50)]


def test_what_is_lacking_is_asked_elsewhere_when_the_share_ends() -> None:
    plan = plan_of(60, near=("store-2",))
    (near,) = plan.begin()
    for key in near.keys[:20]:
        assert plan.arrived(near.number, key)
    for key in near.keys[20:]:
        plan.bad(near.number, key, lacking=True)
    far = plan.ended(near.number)
    assert sorted(k for s in far for k in s.keys) == sorted(near.keys[20:])
    assert "store-2" not in {share.store_id for share in far}
    assert not plan.failed_before(near.keys[30])


def test_a_store_that_failed_is_not_asked_again() -> None:
    plan = plan_of(100)
    first = plan.begin()
    gone = first[0]
    again = plan.ended(gone.number, failed=True)
    assert sorted(k for s in again for k in s.keys) == sorted(gone.keys)
    for share in first[1:]:
        again += plan.ended(share.number)
    assert gone.store_id not in {share.store_id for share in again}
    assert plan.failed_before(gone.keys[0])


def test_slow_stores_are_asked_last() -> None:
    keys = [key_of(i) for i in range(50)]
    plan = FetchPlan(keys, ranks_of(keys), ("store-1",), 2, last=("store-1", "store-0"))
    assert {share.store_id for share in plan.begin()} == {"store-2", "store-3"}
    alone = FetchPlan(keys, ranks_of(keys, ["store-0"]), (), 2, last=("store-0",))
    assert {share.store_id for share in alone.begin()} == {"store-0"}


def hedged() -> tuple[FetchPlan, Share, Share]:
    keys = [key_of(i) for i in range(10)]
    ranks = {key: ["store-0", "store-1"] for key in keys}
    plan = FetchPlan(keys, ranks, ("store-0",), 2)
    (original,) = plan.begin()
    for key in keys[:4]:
        plan.arrived(original.number, key)
    (hedge,) = plan.hedge(original.number, yes)
    return plan, original, hedge


def test_a_hedge_asks_for_the_rest() -> None:
    plan, original, hedge = hedged()
    assert (hedge.store_id, hedge.hedges) == ("store-1", original.number)
    assert hedge.keys == original.keys[4:]
    assert plan.hedge(original.number, yes) == []
    assert plan.hedge(hedge.number, yes) == []


def test_the_first_good_page_decides_the_race() -> None:
    plan, original, hedge = hedged()
    assert plan.arrived(hedge.number, hedge.keys[0])
    assert plan.needless() == [original.number]
    assert plan.ended(original.number) == []
    assert not plan.arrived(original.number, hedge.keys[1])
    for key in hedge.keys[1:]:
        assert plan.arrived(hedge.number, key)
    assert plan.done

    plan, original, hedge = hedged()
    assert plan.arrived(original.number, hedge.keys[0])
    assert plan.needless() == [hedge.number]
    assert plan.ended(hedge.number) == []
    assert plan.n_waiting(original.number) == 5


def test_a_hedge_that_fails_after_it_won() -> None:
    plan, original, hedge = hedged()
    plan.arrived(hedge.number, hedge.keys[0])
    plan.ended(original.number)
    (again,) = plan.ended(hedge.number, failed=True)
    assert (again.store_id, again.keys) == ("store-0", hedge.keys[1:])


def test_a_hedge_in_vain_changes_nothing() -> None:
    plan, original, hedge = hedged()
    for key in hedge.keys:
        plan.bad(hedge.number, key, lacking=True)
    assert plan.ended(hedge.number) == []
    assert plan.n_waiting(original.number) == 6


def test_no_budget_no_hedge() -> None:
    keys = [key_of(i) for i in range(10)]
    plan = FetchPlan(keys, {key: ["store-0", "store-1"] for key in keys}, (), 2)
    for share in plan.begin():
        assert plan.hedge(share.number, lambda: False) == []
        assert plan.has_others(share.number)


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40))
def test_any_history_ends_with_what_the_stores_could_give(
    seed: int, n_stores: int, n_replicas: int, n_keys: int
) -> None:
    """Stores that fail, lack pages or hold bad ones, hedges at any moment, in any order."""
    rng = random.Random(seed)
    stores = [f"store-{i}" for i in range(n_stores)]
    keys = [key_of(i) for i in range(n_keys)]
    good = {(s, k) for s in stores for k in keys if rng.random() < 0.5}
    fails_after = {s: rng.randrange(n_keys) for s in stores if rng.random() < 0.3}
    near = [s for s in stores if rng.random() < 0.4]
    plan = FetchPlan(keys, ranks_of(keys, stores), near, n_replicas)
    running: dict[int, tuple[Share, list[PageKey]]] = {}
    asked: Counter[tuple[str, PageKey]] = Counter()
    arrived: Counter[PageKey] = Counter()
    given_by: Counter[str] = Counter()

    def start(shares: list[Share]) -> None:
        for share in shares:
            assert share.keys
            running[share.number] = (share, list(share.keys))
            asked.update((share.store_id, key) for key in share.keys)

    start(plan.begin())
    n_steps = 0
    while running:
        n_steps += 1
        assert n_steps < 20_000, "it goes round in circles"
        number = rng.choice(list(running))
        share, rest = running[number]
        if rng.random() < 0.05:
            start(plan.hedge(number, yes))
        elif given_by[share.store_id] >= fails_after.get(share.store_id, 10**9):
            del running[number]
            start(plan.ended(number, failed=True))
        elif not rest:
            del running[number]
            start(plan.ended(number))
        else:
            key = rest.pop(0)
            given_by[share.store_id] += 1
            if (share.store_id, key) in good:
                arrived[key] += plan.arrived(number, key)
            else:
                plan.bad(number, key, lacking=rng.random() < 0.5)
        for loser in plan.needless():
            if loser != number and loser in running:
                del running[loser]
                start(plan.ended(loser))
    assert plan.done
    assert all(n == 1 for n in arrived.values()), "a page was taken twice"
    assert set(arrived) | set(plan.missing) == set(keys)
    assert not set(arrived) & set(plan.missing)
    for key in plan.missing:
        sound = [s for s in stores if s not in fails_after and (s, key) in good]
        assert not sound, "a store had the page and was not asked"


@pytest.mark.parametrize("n", [0, 1])
def test_little_to_do(n: int) -> None:
    plan = plan_of(n)
    assert len(plan.begin()) == n
    assert plan.done == (n == 0)


def test_nobody_to_ask() -> None:
    plan = FetchPlan([key_of(1)], {key_of(1): []})
    assert plan.begin() == []
    assert plan.done
    assert plan.missing == [key_of(1)]
