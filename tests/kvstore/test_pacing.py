"""Budgets and pauses, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.kvstore.pacing import Backoff, TokenBucket


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=50),
    st.sampled_from([100.0, 1000.0]),
)
def test_never_more_than_the_rate_and_the_burst(
    spent: list[tuple[int, float]], bytes_per_s: float
) -> None:
    bucket, now_s, total = TokenBucket(bytes_per_s, burst_s=0.5), 10.0, 0
    for n_bytes, pause_s in spent:
        now_s += bucket.take(n_bytes, now_s)
        total += n_bytes
        assert total <= bytes_per_s * (now_s - 10.0 + 0.5) + 1e-6 * total
        now_s += pause_s


def test_a_steady_user_gets_the_whole_rate() -> None:
    bucket, now_s = TokenBucket(1000.0, burst_s=0.1), 0.0
    for _ in range(100):
        now_s += bucket.take(50, now_s)
    assert now_s == pytest.approx(100 * 50 / 1000 - 0.1)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1000.0, burst_s=0.1)
    assert bucket.take(100, 5.0) == 0.0
    assert bucket.take(100, 4.0) == pytest.approx(0.1)


def test_pauses_grow_and_end_with_success() -> None:
    backoff = Backoff(1.0, 5.0)
    assert backoff.ready("a", 0.0)
    assert [backoff.failed("a", 10.0) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert not backoff.ready("a", 14.9)
    assert backoff.ready("a", 15.0)
    assert backoff.ready("b", 10.0)
    backoff.worked("a")
    assert backoff.failed("a", 20.0) == 1.0
    backoff.clear()
    assert backoff.ready("a", 20.0)
