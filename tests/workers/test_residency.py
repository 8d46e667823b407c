from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.core.errors import BankTooSmall
from longreach.workers.residency import Residency


def leaves(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_a_miss_is_fetched_into_a_free_slot_and_then_hits() -> None:
    residency = Residency(4)
    plan = residency.plan(leaves(7, 9))
    assert plan.leaves.tolist() == [7, 9]
    assert plan.slots.tolist() == [0, 1]
    assert plan.n_hits == 0
    again = residency.plan(leaves(7, 9))
    assert (again.n_hits, len(again.leaves)) == (2, 0)


def test_the_least_recently_used_leaf_leaves_first() -> None:
    residency = Residency(3)
    for leaf in (1, 2, 3):
        residency.plan(leaves(leaf))
    residency.plan(leaves(1))
    plan = residency.plan(leaves(4))
    assert plan.evicted.tolist() == [2]


def test_equal_age_goes_to_the_lower_slot() -> None:
    residency = Residency(3)
    residency.plan(leaves(5, 6, 7))
    plan = residency.plan(leaves(8))
    assert plan.evicted.tolist() == [5]
    assert plan.slots.tolist() == [0]


def test_an_unsafe_leaf_is_never_evicted_until_it_is_safe() -> None:
    residency = Residency(2)
    residency.place(leaves(1, 2))
    with pytest.raises(BankTooSmall, match=r"raise cache\.device_pages"):
        residency.plan(leaves(3))
    residency.mark_safe(leaves(1))
    assert residency.plan(leaves(3)).evicted.tolist() == [1]


def test_what_a_pass_needs_is_never_evicted_for_the_same_pass() -> None:
    residency = Residency(2)
    residency.plan(leaves(1, 2))
    plan = residency.plan(leaves(2, 3))
    assert plan.evicted.tolist() == [1]
    assert residency.slots_of(leaves(2))[0] >= 0


def test_a_refused_plan_changes_nothing() -> None:
    residency = Residency(2)
    residency.plan(leaves(1, 2))
    with pytest.raises(BankTooSmall):
        residency.plan(leaves(3, 4, 5))
    assert residency.plan(leaves(1, 2)).n_hits == 2


def test_forget_frees_slots_even_of_unsafe_leaves() -> None:
    residency = Residency(1)
    residency.place(leaves(1))
    residency.forget(leaves(1))
    assert residency.n_unsafe == 0
    assert residency.plan(leaves(2)).slots.tolist() == [0]


def test_fits_counts_slots_that_others_pin() -> None:
    residency = Residency(4)
    residency.place(leaves(1, 2))
    assert residency.fits(leaves(3, 4))
    assert not residency.fits(leaves(3, 4, 5))
    assert residency.fits(leaves(1, 3, 4))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["plan", "place", "safe", "forget"]),
            st.sets(st.integers(0, 30), min_size=1, max_size=6),
        ),
        max_size=60,
    )
)
def test_any_history_keeps_slots_and_leaves_in_agreement(
    history: list[tuple[str, set[int]]],
) -> None:
    residency = Residency(8)
    unsafe: set[int] = set()
    resident: dict[int, int] = {}
    for act, chosen in history:
        wanted = leaves(*sorted(chosen))
        if act == "plan":
            try:
                plan = residency.plan(wanted)
            except BankTooSmall:
                assert len(chosen | unsafe) > 8
                continue
            assert not unsafe & set(plan.evicted.tolist())
            for leaf in plan.evicted.tolist():
                del resident[leaf]
            resident.update(zip(plan.leaves.tolist(), plan.slots.tolist(), strict=True))
            assert chosen <= set(resident)
        elif act == "place":
            fresh = leaves(*sorted(chosen - set(resident)))
            before = dict(resident)
            try:
                slots = residency.place(fresh)
            except BankTooSmall:
                assert len(fresh) + len(unsafe) > 8
                continue
            resident = {k: v for k, v in before.items() if v not in set(slots.tolist())}
            resident.update(zip(fresh.tolist(), slots.tolist(), strict=True))
            assert unsafe <= set(resident)
            unsafe |= set(fresh.tolist())
        elif act == "safe":
            residency.mark_safe(wanted)
            unsafe -= chosen
        else:
            residency.forget(wanted)
            unsafe -= chosen
            for leaf in chosen:
                resident.pop(leaf, None)
        assert len(set(resident.values())) == len(resident) == residency.n_resident
        for leaf in range(31):
            assert int(residency.slots_of(leaves(leaf))[0]) == resident.get(leaf, -1)
        assert residency.n_unsafe == len(unsafe)


@settings(max_examples=100)
@given(st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), max_size=30))
def test_touching_is_planning_where_everything_is_resident(passes: list[set[int]]) -> None:
    planned, touched = Residency(6), Residency(6)
    for wanted in passes:
        mine = leaves(*sorted(wanted))
        before = touched.slots_of(mine).copy()
        hit = touched.touch(mine)
        assert hit == bool((before >= 0).all())
        if not hit:
            assert np.array_equal(touched.slots_of(mine), before)
            touched.plan(mine)
        plan = planned.plan(mine)
        assert hit == (len(plan.leaves) == 0)
        everything = leaves(*range(10))
        assert np.array_equal(planned.slots_of(everything), touched.slots_of(everything))
