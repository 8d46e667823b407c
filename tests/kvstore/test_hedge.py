"""When a hedge is worth its request, and how many are."""

from __future__ import annotations

from longreach.kvstore.hedge import (
    AVOID_S,
    CEILING_S,
    FLOOR_S,
    MAX_SAVED,
    MIN_GAPS,
    GapEstimate,
    Hedging,
)


def test_unknown_stores_get_the_ceiling() -> None:
    gaps = GapEstimate()
    for _ in range(MIN_GAPS - 1):
        gaps.add(0.001)
        assert gaps.patience_s == CEILING_S
    gaps.add(0.001)
    assert gaps.patience_s == FLOOR_S


def test_patience_is_a_high_quantile_of_the_latest_gaps() -> None:
    gaps = GapEstimate()
    for i in range(1000):
        gaps.add(0.001 if i % 10 else 0.3)
    assert gaps.patience_s == 0.3
    for _ in range(1000):
        gaps.add(0.1)
    assert gaps.patience_s == 0.1
    for _ in range(1000):
        gaps.add(7.0)
    assert gaps.patience_s == CEILING_S


def test_first_pages_and_later_ones_are_told_apart() -> None:
    hedging = Hedging()
    for _ in range(50):
        hedging.gap("a", 0.4, first=True)
        hedging.gap("a", 0.001, first=False)
    assert hedging.patience_s("a", first=True) == 0.4
    assert hedging.patience_s("a", first=False) == FLOOR_S
    assert hedging.patience_s("b", first=True) == CEILING_S


def test_at_most_a_tenth_of_the_requests() -> None:
    hedging = Hedging()
    n_hedges = 0
    for _ in range(10_000):
        hedging.request()
        n_hedges += hedging.may_hedge()
    assert 990 <= n_hedges <= 1001


def test_quick_days_save_only_so_many() -> None:
    hedging = Hedging()
    for _ in range(10_000):
        hedging.request()
    assert sum(hedging.may_hedge() for _ in range(100)) == MAX_SAVED


def test_off() -> None:
    hedging = Hedging(enabled=False)
    hedging.request()
    assert not hedging.may_hedge()


def test_a_store_that_lost_in_silence_is_asked_last_for_a_while() -> None:
    hedging = Hedging()
    hedging.lost("a", now=10.0)
    assert hedging.slow(10.0 + AVOID_S / 2) == {"a"}
    assert hedging.slow(10.0 + AVOID_S) == set()
    hedging.lost("a", now=20.0)
    hedging.keep({"b"})
    assert hedging.slow(20.0) == set()
