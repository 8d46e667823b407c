"""Rendezvous placement: even spread, minimal movement."""

from __future__ import annotations

from collections import Counter

from longreach.kvstore.placement import rendezvous

from .kv_helpers import key_of

KEYS = [key_of(i) for i in range(3000)]
STORES = [f"store-{i}" for i in range(6)]


def test_replicas_are_different_stores_and_order_of_ids_does_not_matter() -> None:
    for key in KEYS[:100]:
        chosen = rendezvous(key, STORES, 2)
        assert len(set(chosen)) == 2
        assert chosen == rendezvous(key, reversed(STORES), 2)
        assert rendezvous(key, STORES, 6)[:2] == chosen
    assert rendezvous(KEYS[0], ["only"], 2) == ["only"]
    assert rendezvous(KEYS[0], [], 2) == []


def test_spread_is_even() -> None:
    for rank in (0, 1):
        counts = Counter(rendezvous(key, STORES, 2)[rank] for key in KEYS)
        assert set(counts) == set(STORES)
        # 500 expected, standard deviation 20
        assert max(counts.values()) < 600
        assert min(counts.values()) > 400


def test_a_store_that_leaves_moves_only_its_own_pages() -> None:
    left = STORES[:3] + STORES[4:]
    for key in KEYS[:500]:
        before, after = rendezvous(key, STORES, 2), rendezvous(key, left, 2)
        if "store-3" in before:
            assert set(before) - {"store-3"} < set(after)
        else:
            assert after == before


def test_a_store_that_joins_takes_its_share() -> None:
    moved = 0
    for key in KEYS:
        before, after = rendezvous(key, STORES, 1), rendezvous(key, [*STORES, "new"], 1)
        if before != after:
            assert after == ["new"]
            moved += 1
    assert 0.7 * len(KEYS) / 7 < moved < 1.3 * len(KEYS) / 7
