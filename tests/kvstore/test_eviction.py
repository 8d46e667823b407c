"""The order of eviction: what it must keep in the cases that matter, and random lives against a
slow model that looks at every page."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longreach.core.page_key import ROOT_KEY, PageKey
from longreach.kvstore.eviction import Choice, EvictionOrder, Where


def key(i: int) -> PageKey:
    return PageKey(b"k" + i.to_bytes(31, "big"))


def number(key: PageKey) -> int:
    return int.from_bytes(key[1:], "big")


def chain(order: EvictionOrder, numbers: range, row: str, where: Where = "arena") -> None:
    """Pages that build on each other, used by a row and let go as a lease does: tail first."""
    for i in numbers:
        order.add(key(i), key(i - 1) if i > numbers.start else ROOT_KEY)
    use(order, numbers, row, where)


def use(order: EvictionOrder, numbers: range, row: str, where: Where = "arena") -> None:
    for i in numbers:
        order.use(key(i), row)
        order.place(key(i), "pinned")
    for i in reversed(numbers):
        order.touch(key(i))
        order.place(key(i), where)


def drain(order: EvictionOrder, choice: Choice) -> list[int]:
    gone = []
    while (next_key := order.next(choice)) is not None:
        gone.append(number(next_key))
        order.remove(next_key)
    return gone


def test_the_tail_goes_before_the_head_however_recent_it_is() -> None:
    order = EvictionOrder(10)
    chain(order, range(4), "a")
    for i in range(4):  # the head is now the least recently used
        order.touch(key(i))
    assert drain(order, "lose_arena") == [3, 2, 1, 0]


def test_pages_of_several_rows_outlive_single_use() -> None:
    order = EvictionOrder(20)
    chain(order, range(3), "a")
    use(order, range(3), "b")
    for first in (10, 20, 30):
        chain(order, range(first, first + 2), f"row {first}")
    assert drain(order, "lose_arena") == [11, 10, 21, 20, 31, 30, 2, 1, 0]


def test_a_row_that_comes_twice_is_one_row() -> None:
    order = EvictionOrder(20)
    chain(order, range(1), "a")
    use(order, range(1), "a")
    assert order.n_rows(key(0)) == 1
    chain(order, range(1, 2), "b")
    assert drain(order, "lose_arena") == [0, 1]


def test_at_most_four_fifths_are_protected() -> None:
    order = EvictionOrder(5)
    for i in range(5):
        chain(order, range(i, i + 1), "a")
        use(order, range(i, i + 1), "b")
    chain(order, range(9, 10), "c")
    # page 0 had to leave the protected ones when page 4 came, with a fresh start among the others
    assert drain(order, "lose_arena") == [0, 9, 1, 2, 3, 4]


def test_a_page_with_pinned_children_goes_last() -> None:
    order = EvictionOrder(20)
    chain(order, range(2), "a")
    order.place(key(1), "pinned")
    chain(order, range(10, 11), "b")
    use(order, range(10, 11), "c")
    assert order.next("lose_arena") == key(10), "protected, but nobody needs it now"
    order.remove(key(10))
    assert order.next("lose_arena") == key(0)
    order.place(key(1), "arena")
    assert order.next("lose_arena") == key(1)


def test_a_head_leaves_the_arena_after_its_tail_has_gone_to_disk() -> None:
    order = EvictionOrder(20)
    chain(order, range(3), "a")
    left = []
    while (next_key := order.next("leave")) is not None:
        left.append(number(next_key))
        order.place(next_key, "disk")
    assert left == [2, 1, 0]
    assert drain(order, "lose_disk") == [2, 1, 0]


def test_a_page_on_disk_is_kept_for_its_child_in_the_arena() -> None:
    order = EvictionOrder(20)
    chain(order, range(2), "a")
    order.place(key(0), "disk")
    assert order.next("lose_disk") is None
    assert order.next("lose_arena") == key(1)


def test_a_parent_that_comes_back_finds_its_children() -> None:
    order = EvictionOrder(20)
    chain(order, range(2), "a")
    order.remove(key(0))
    order.add(key(0), ROOT_KEY)
    order.place(key(0), "arena")
    order.touch(key(1))
    assert drain(order, "lose_arena") == [1, 0]


def test_the_heaps_of_a_long_chain_stay_small() -> None:
    n = 4000
    order = EvictionOrder(n)
    chain(order, range(n), "a")
    for _ in range(5):
        use(order, range(n), "a")
    assert sum(len(heap) for heap in order._heaps.values()) <= 4 * (4 * n + 64)
    assert drain(order, "lose_arena") == list(reversed(range(n)))


@dataclass
class Page:
    parent: int
    where: Where = "pinned"
    tick: int = 0
    protected_at: int | None = None
    rows: list[str] = field(default_factory=list)


ABOUT: dict[Choice, set[str]] = {
    "leave": {"arena", "backed"},
    "free": {"backed"},
    "lose_arena": {"arena"},
    "lose_disk": {"disk"},
}
BLOCKING: dict[Choice, set[str]] = {
    "leave": {"arena", "backed"},
    "free": {"backed"},
    "lose_arena": {"arena", "backed", "disk"},
    "lose_disk": {"arena", "backed", "disk"},
}
NUMBERS = st.integers(1, 9)


class OrderMachine(RuleBasedStateMachine):
    """The model keeps a list of pages and looks at all of them for each answer."""

    N_SLOTS = 5

    def __init__(self) -> None:
        super().__init__()
        self.order = EvictionOrder(self.N_SLOTS)
        self.pages: dict[int, Page] = {}
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    @rule(i=NUMBERS, parent=st.integers(0, 8))
    def add(self, i: int, parent: int) -> None:
        if i not in self.pages and parent < i:  # a chain has no rings
            self.order.add(key(i), key(parent))
            self.pages[i] = Page(parent, tick=self.tick())

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from(sorted(self.pages)))
        self.order.remove(key(i))
        del self.pages[i]

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), where=st.sampled_from(["pinned", "arena", "backed", "disk"]))
    def place(self, data: st.DataObject, where: Where) -> None:
        i = data.draw(st.sampled_from(sorted(self.pages)))
        self.order.place(key(i), where)
        self.pages[i].where = where

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from(sorted(self.pages)))
        self.order.touch(key(i))
        page = self.pages[i]
        page.tick = self.tick()
        if len(page.rows) >= 2:
            page.protected_at = page.tick
        protected = [p for p in self.pages.values() if p.protected_at is not None]
        if len(protected) > self.N_SLOTS * 4 // 5:
            oldest = min(protected, key=lambda p: p.protected_at or 0)
            oldest.protected_at = None
            oldest.tick = self.tick()

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), row=st.sampled_from("abc"))
    def use(self, data: st.DataObject, row: str) -> None:
        i = data.draw(st.sampled_from(sorted(self.pages)))
        self.order.use(key(i), row)
        if row not in self.pages[i].rows:
            self.pages[i].rows.append(row)

    @invariant()
    def answers_agree(self) -> None:
        for choice, about in ABOUT.items():
            found = []
            for i, page in self.pages.items():
                children = {p.where for p in self.pages.values() if p.parent == i}
                if page.where in about and not children & BLOCKING[choice]:
                    rank = ("pinned" in children, page.protected_at is not None, page.tick)
                    found.append((rank, key(i)))
            assert self.order.next(choice) == (min(found)[1] if found else None), choice


OrderMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestOrder = OrderMachine.TestCase
