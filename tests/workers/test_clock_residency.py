from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.workers.clock_residency import ClockBank


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


class Walk:
    """The same decisions, slot after slot: what `ClockBank` states with prefix sums."""

    def __init__(self, n_slots: int) -> None:
        self.n = n_slots
        self.owner = [-1] * n_slots
        self.referenced = [False] * n_slots
        self.pinned = [False] * n_slots
        self.hand = 0

    def victims(self, want: int, read: set[int]) -> list[int]:
        taken: list[int] = []
        at = self.hand
        for _ in range(2 * self.n):
            if len(taken) == want:
                break
            s, at = at, (at + 1) % self.n
            if s in taken:
                continue
            free = self.owner[s] < 0
            if free or not (self.referenced[s] or self.pinned[s] or s in read):
                taken.append(s)
                self.hand = at
            elif s not in read:
                self.referenced[s] = False
        return taken

    def give(self, page: int, slot: int) -> None:
        self.owner[slot], self.referenced[slot] = page, True

    def plan(self, pages: list[int], most: int) -> tuple[list[int], list[int], list[int]]:
        read = {self.owner.index(page) for page in pages if page in self.owner}
        for slot in read:
            self.referenced[slot] = True
        missing = [page for page in pages if page not in self.owner][:most]
        slots = self.victims(len(missing), read)
        evicted = [self.owner[slot] for slot in slots if self.owner[slot] >= 0]
        missing = missing[: len(slots)]
        for page, slot in zip(missing, slots, strict=True):
            self.give(page, slot)
        return missing, slots, evicted

    def place(self, page: int) -> int:
        slots = self.victims(1, set())
        if not slots:
            return -1
        self.give(page, slots[0])
        self.pinned[slots[0]] = True
        return slots[0]

    def mark_safe(self, page: int) -> None:
        if page in self.owner:
            self.pinned[self.owner.index(page)] = False

    def forget(self, page: int) -> None:
        if page in self.owner:
            slot = self.owner.index(page)
            self.owner[slot], self.referenced[slot], self.pinned[slot] = -1, False, False


def test_missing_pages_take_free_slots_and_then_hit() -> None:
    bank = ClockBank(4)
    plan = bank.plan(ids(7, 9), 8)
    assert (plan.missing.tolist(), plan.slots.tolist()) == ([7, 9], [0, 1])
    assert (plan.n_hits, plan.n_misses) == (0, 2)
    again = bank.plan(ids(7, 9), 8)
    assert (again.n_hits, again.n_misses, len(again.slots)) == (2, 0, 0)


def test_the_hand_passes_referenced_slots_once() -> None:
    bank = ClockBank(3)
    bank.plan(ids(1, 2, 3), 3)
    # all are referenced: the first round clears, the second takes where it began
    assert bank.plan(ids(4), 1).evicted.tolist() == [1]
    assert bank.hand == 1
    # 2 is read again, 3 is not: the hand passes 2
    assert bank.plan(ids(2, 5), 2).evicted.tolist() == [3]


def test_what_exceeds_most_or_finds_no_slot_is_left_to_the_host() -> None:
    bank = ClockBank(2)
    plan = bank.plan(ids(3, 5, 8), 1)
    assert (plan.missing.tolist(), plan.n_misses) == ([3], 3)
    plan = bank.plan(ids(3, 5, 8), 9)
    assert (plan.missing.tolist(), plan.n_hits, plan.n_misses) == ([5], 1, 2)
    assert bank.plan(ids(3, 5, 8), 9).missing.tolist() == []


def test_a_pinned_page_stays_until_it_is_safe() -> None:
    bank = ClockBank(2)
    assert (bank.place(1), bank.place(2)) == (0, 1)
    assert bank.place(3) == -1
    assert bank.plan(ids(4), 1).missing.tolist() == []
    bank.mark_safe(ids(1))
    assert bank.plan(ids(4), 1).evicted.tolist() == [1]
    bank.forget(ids(2))
    assert bank.place(5) == 1


def test_the_planner_knows_large_page_ids() -> None:
    bank = ClockBank(2)
    bank.place(100_000)
    assert bank.slots_of(ids(100_000, 200_000)).tolist() == [0, -1]


_pages = st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True).map(sorted)
_events = st.one_of(
    st.tuples(st.just("plan"), _pages, st.integers(0, 6)),
    st.tuples(st.just("place"), st.integers(0, 11)),
    st.tuples(st.just("safe"), st.integers(0, 11)),
    st.tuples(st.just("forget"), st.integers(0, 11)),
)


@settings(max_examples=300)
@given(st.integers(1, 8), st.lists(_events, max_size=25))
def test_any_history_is_the_sequential_walk(n_slots: int, events: list[tuple]) -> None:
    """Also: no page or slot twice, pinned pages and those of the step never leave, the same twice."""
    bank, twin, walk = ClockBank(n_slots), ClockBank(n_slots), Walk(n_slots)
    for event in events:
        if event[0] == "plan":
            pages, most = ids(*event[1]), event[2]
            pinned = set(bank.owner[bank.pinned].tolist())
            before = set(bank.owner.tolist())
            plan = bank.plan(pages, most)
            same = twin.plan(pages, most)
            assert plan.slots.tolist() == same.slots.tolist()
            assert (plan.missing.tolist(), plan.slots.tolist(), plan.evicted.tolist()) == walk.plan(
                event[1], most
            )
            assert not set(plan.evicted.tolist()) & (pinned | set(event[1]))
            assert len(set(plan.slots.tolist())) == len(plan.slots) <= most
            assert plan.n_hits == len(before & set(event[1]))
            assert plan.n_hits + plan.n_misses == len(pages)
        elif event[0] == "place":
            if bank.slots_of(ids(event[1]))[0] < 0:
                slot = bank.place(event[1])
                assert slot == twin.place(event[1]) == walk.place(event[1])
        elif event[0] == "safe":
            for one in (bank, twin):
                one.mark_safe(ids(event[1]))
            walk.mark_safe(event[1])
        else:
            for one in (bank, twin):
                one.forget(ids(event[1]))
            walk.forget(event[1])
        assert bank.owner.tolist() == walk.owner
        assert bank.referenced.tolist() == walk.referenced
        assert bank.pinned.tolist() == walk.pinned
        assert bank.hand == walk.hand
        held = bank.owner[bank.owner >= 0]
        assert len(set(held.tolist())) == len(held)
        assert bank.slots_of(held).tolist() == np.flatnonzero(bank.owner >= 0).tolist()
