"""Leading pages first, then load; rows of one context meet although no page exists yet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.cluster.router import Router, common_pages
from longreach.core.errors import Unavailable
from longreach.core.page_key import PageKey, RecipeFingerprint, page_keys

LIVE = ["a", "b", "c"]


def keys(*tokens: int) -> list[PageKey]:
    return page_keys(list(tokens), RecipeFingerprint(bytes(32)), 1)


@given(left=st.lists(st.integers(0, 2), max_size=9), right=st.lists(st.integers(0, 2), max_size=9))
def test_common_pages_is_the_common_prefix(left: list[int], right: list[int]) -> None:
    same = 0
    while same < min(len(left), len(right)) and left[same] == right[same]:
        same += 1
    assert common_pages(keys(*left), keys(*right)) == same


def test_most_leading_pages_win_over_load() -> None:
    router = Router(max_rows=4)
    router.choose("r0", keys(9), {"b": 1}, LIVE)
    assert router.choose("r1", keys(1, 2, 3), {"a": 1, "b": 2, "c": 0}, LIVE) == "b"


def test_without_pages_the_least_loaded_takes_it() -> None:
    router = Router(max_rows=4)
    assert [router.choose(f"r{i}", keys(i), {}, LIVE) for i in range(4)] == ["a", "b", "c", "a"]
    router.leave("r1")
    assert router.choose("r4", keys(44), {}, LIVE) == "b"


def test_rows_of_one_context_meet() -> None:
    router = Router(max_rows=4)
    first = router.choose("r0", keys(1, 2, 3, 7), {}, LIVE)
    router.choose("other", keys(5), {}, LIVE)
    assert router.choose("r1", keys(1, 2, 3, 8), {}, LIVE) == first
    assert router.choose("r2", keys(1, 2, 3), {}, LIVE) == first


def test_a_crowded_worker_is_passed_over() -> None:
    router = Router(max_rows=2)
    chosen = [router.choose(f"r{i}", keys(1, 2), {"a": 2}, LIVE) for i in range(6)]
    assert chosen[:4] == ["a"] * 4
    assert "a" not in chosen[4:5]


def test_dead_workers_get_nothing() -> None:
    router = Router(max_rows=2)
    assert router.choose("r", keys(1), {"a": 1}, ["b"]) == "b"
    with pytest.raises(Unavailable):
        router.choose("r", keys(1), {}, [])
