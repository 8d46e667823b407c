"""Rendezvous placement: shares by weight, minimal movement, replicas as far apart as can be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.core.page_key import PageKey
from longreach.kvstore.membership import Member
from longreach.kvstore.placement import place, rank, rendezvous

from .kv_helpers import key_of

KEYS = [key_of(i) for i in range(3000)]
STORES = [f"store-{i}" for i in range(6)]

keys = st.binary(min_size=32, max_size=32).map(PageKey)
replicas = st.integers(1, 4)


@st.composite
def clusters(draw: st.DrawFn, min_size: int = 1) -> list[Member]:
    """Stores on nodes; a node lies in one zone."""
    zone_of_node = draw(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=5))
    members = []
    for i in range(draw(st.integers(min_size, 8))):
        node = draw(st.integers(0, len(zone_of_node) - 1))
        weight = draw(st.sampled_from([0.5, 1, 4 << 30]))
        draining = draw(st.integers(0, 3)) == 0
        members.append(
            Member(f"store-{i}", f"mem://{i}", f"node-{node}", zone_of_node[node], weight, draining)
        )
    return members


@given(keys, clusters(), st.randoms())
def test_the_order_of_members_does_not_matter(key: PageKey, members: list[Member], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(members, len(members))
    ranked = rank(key, members)
    assert rank(key, shuffled) == ranked
    assert sorted(ranked) == sorted(m.store_id for m in members)
    assert place(key, members, 2) == ranked[:2]


@given(keys, clusters(), replicas)
def test_replicas_are_spread_over_zones_then_nodes(
    key: PageKey, members: list[Member], n: int
) -> None:
    by_id = {m.store_id: m for m in members}
    chosen = [by_id[store_id] for store_id in place(key, members, n)]
    staying = [m for m in members if not m.draining]
    assert len(chosen) == min(n, len(members))
    assert sum(m.draining for m in chosen) == max(0, len(chosen) - len(staying))
    spread = [m for m in chosen if not m.draining]
    for place_of in (lambda m: m.zone, lambda m: m.node_id):
        n_possible = min(len(spread), len({place_of(m) for m in staying}))
        assert len({place_of(m) for m in spread}) == n_possible


@given(keys, clusters(min_size=2), replicas)
def test_a_store_that_leaves_or_joins_changes_one_replica_at_most(
    key: PageKey, members: list[Member], n: int
) -> None:
    gone, *left = members
    before, after = set(place(key, members, n)), set(place(key, left, n))
    if gone.store_id in before:
        assert before - after == {gone.store_id}
        assert len(after - before) <= 1
    else:
        assert after == before


@given(keys, clusters(), replicas, st.integers(0, 7))
def test_draining_moves_no_more_than_leaving(
    key: PageKey, members: list[Member], n: int, at: int
) -> None:
    one = members[at % len(members)]
    if one.draining:
        return
    drained = [replace(m, draining=True) if m is one else m for m in members]
    before, after = set(place(key, members, n)), set(place(key, drained, n))
    assert before - after <= {one.store_id}


def test_shares_follow_the_weights() -> None:
    weights = {"one": 1.0, "two": 2.0, "three": 3.0}
    members = [Member(name, name, name, "", weight) for name, weight in weights.items()]
    first = Counter(rank(key, members)[0] for key in KEYS)
    for name, weight in weights.items():
        # standard deviation at most 0.009
        assert abs(first[name] / len(KEYS) - weight / 6) < 0.03
    scaled = [replace(m, weight=m.weight * 2**30) for m in members]
    assert [rank(key, scaled) for key in KEYS[:50]] == [rank(key, members) for key in KEYS[:50]]


@pytest.mark.parametrize("position", [0, 1])
def test_equal_stores_have_equal_shares(position: int) -> None:
    counts = Counter(rendezvous(key, STORES, 2)[position] for key in KEYS)
    # 500 expected, standard deviation 20
    assert max(counts.values()) < 600
    assert min(counts[name] for name in STORES) > 400


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_store_that_joins_takes_its_share_and_nothing_else_moves(weight: float) -> None:
    before = [Member(name, name, name) for name in STORES]
    after = [*before, Member("new", "new", "new", "", weight)]
    moved = 0
    for key in KEYS:
        old, new = rank(key, before)[0], rank(key, after)[0]
        if old != new:
            assert new == "new"
            moved += 1
    share = weight / (6 + weight)
    assert 0.8 * share < moved / len(KEYS) < 1.2 * share


def test_names_alone() -> None:
    assert rendezvous(KEYS[0], ["only"], 2) == ["only"]
    assert rendezvous(KEYS[0], [], 2) == []
    assert len(set(rendezvous(KEYS[0], STORES, 3))) == 3
