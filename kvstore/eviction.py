"""Which held page goes next. Pure: no clock, no bytes; the caller says what happened to each page.

Three things decide, in this order:

- The chain. A page is of use only with the pages before it, so a page goes after all pages that
  build on it. Those that are pinned cannot go: a page with only such children goes last of all.
- Sharing. A page that two or more rows have used is protected: pages used once go first. At most
  80 % of the slots are protected; beyond that the least recently used of them is so no longer.
- Recency.

Every operation is O(log n): one heap per question, whose outdated entries are skipped when met.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from ..core.page_key import PageKey

Where = Literal["pinned", "arena", "backed", "disk"]
"""Of a page: it cannot move now; only the arena has it; arena and disk have it; only the disk."""
Choice = Literal["leave", "free", "lose_arena", "lose_disk"]

PROTECTED_SHARE = 0.8
N_RECENT_ROWS = 4
"""Rows remembered per page, to count each once; a row that comes back later may count twice."""

_LOOSE = frozenset[Where]({"arena", "backed", "disk"})
_IN_ARENA = frozenset[Where]({"arena", "backed"})
_CHOICES: dict[Choice, tuple[frozenset[Where], frozenset[Where]]] = {
    # question: (pages it is about, children that keep a page from being the answer)
    "leave": (_IN_ARENA, _IN_ARENA),
    "free": (frozenset({"backed"}), frozenset({"backed"})),
    "lose_arena": (frozenset({"arena"}), _LOOSE),
    "lose_disk": (frozenset({"disk"}), _LOOSE),
}
_Rank = tuple[bool, bool, int]


@dataclass(eq=False, slots=True)
class _Node:
    key: PageKey
    parent_key: PageKey
    where: Where
    tick: int
    protected: bool = False
    n_rows: int = 0
    recent_rows: tuple[str, ...] = ()


class EvictionOrder:
    """Pages of one store. n_slots: what 80 % refers to."""

    def __init__(self, n_slots: int) -> None:
        self._max_protected = max(1, int(n_slots * PROTECTED_SHARE))
        self._nodes: dict[PageKey, _Node] = {}
        # also for parents that are not held: they may come, or come back
        self._children: dict[PageKey, dict[Where, int]] = {}
        self._protected: OrderedDict[PageKey, _Node] = OrderedDict()
        self._ticks = itertools.count()
        self._n_pinned = 0
        self._heaps: dict[Choice, list[tuple[_Rank, PageKey]]] = {c: [] for c in _CHOICES}

    @property
    def n_pinned(self) -> int:
        """Pages that cannot move now."""
        return self._n_pinned

    def __contains__(self, key: PageKey) -> bool:
        return key in self._nodes

    def add(self, key: PageKey, parent_key: PageKey) -> None:
        """A page is held from now on; it is pinned until `place` says otherwise."""
        self._nodes[key] = _Node(key, parent_key, "pinned", next(self._ticks))
        self._n_pinned += 1
        self._count_child(parent_key, "pinned", 1)

    def remove(self, key: PageKey) -> None:
        node = self._nodes.pop(key)
        self._n_pinned -= node.where == "pinned"
        self._protected.pop(key, None)
        self._count_child(node.parent_key, node.where, -1)

    def place(self, key: PageKey, where: Where) -> None:
        """Where the page is now. Its recency stays."""
        node = self._nodes[key]
        if node.where == where:
            return
        before, node.where = node.where, where
        self._n_pinned += (where == "pinned") - (before == "pinned")
        self._push(node)
        self._count_child(node.parent_key, where, 1)
        self._count_child(node.parent_key, before, -1)

    def touch(self, key: PageKey) -> None:
        """The page is the most recently used. Rows let go of their pages from the tail to the head,
        so the head of a context is the most recent, and the last to lose its protection."""
        node = self._nodes[key]
        node.tick = next(self._ticks)
        if node.n_rows >= 2:
            node.protected = True
            self._protected[key] = node
            self._protected.move_to_end(key)
        self._push(node)
        if len(self._protected) > self._max_protected:
            _, oldest = self._protected.popitem(last=False)
            oldest.protected = False
            # to the recent end of the others: it has a last chance to be used again
            oldest.tick = next(self._ticks)
            self._push(oldest)

    def use(self, key: PageKey, row: str) -> None:
        """A row uses the page; what that means for its rank comes with the next `touch`. row: any
        name that is the row's own."""
        node = self._nodes[key]
        if row not in node.recent_rows:
            node.n_rows += 1
            node.recent_rows = (*node.recent_rows, row)[-N_RECENT_ROWS:]

    def n_rows(self, key: PageKey) -> int:
        """Rows that have used the page."""
        return self._nodes[key].n_rows

    def next(self, choice: Choice) -> PageKey | None:
        """The page to take next, which stays as it is; None if there is none.

        leave: to leave the arena. free: the same, of those that the disk has too. lose_arena,
        lose_disk: to be forgotten, of those that only the arena or only the disk has.
        """
        heap = self._heaps[choice]
        while heap:
            rank, key = heap[0]
            node = self._nodes.get(key)
            if node is not None and self._answers(choice, node) and rank == self._rank(node):
                return key
            heapq.heappop(heap)
        return None

    def most_valuable_first(self) -> list[PageKey]:
        nodes = sorted(self._nodes.values(), key=lambda n: (n.protected, n.tick), reverse=True)
        return [node.key for node in nodes]

    def _rank(self, node: _Node) -> _Rank:
        has_pinned_child = self._children.get(node.key, {}).get("pinned", 0) > 0
        return (has_pinned_child, node.protected, node.tick)

    def _answers(self, choice: Choice, node: _Node) -> bool:
        about, blocking = _CHOICES[choice]
        if node.where not in about:
            return False
        children = self._children.get(node.key)
        return not children or not any(children.get(where, 0) for where in blocking)

    def _push(self, node: _Node) -> None:
        if node.where == "pinned":
            return
        entry = (self._rank(node), node.key)
        for choice, heap in self._heaps.items():
            if self._answers(choice, node):
                heapq.heappush(heap, entry)
                if len(heap) > 4 * len(self._nodes) + 64:
                    self._rebuild(choice)

    def _rebuild(self, choice: Choice) -> None:
        """Without the outdated entries; their number pays for it."""
        nodes = self._nodes.values()
        heap = [(self._rank(n), n.key) for n in nodes if self._answers(choice, n)]
        heapq.heapify(heap)
        self._heaps[choice] = heap

    def _count_child(self, parent_key: PageKey, where: Where, change: int) -> None:
        counts = self._children.setdefault(parent_key, {})
        counts[where] = counts.get(where, 0) + change
        if not counts[where]:
            del counts[where]
        if not counts:
            del self._children[parent_key]
        parent = self._nodes.get(parent_key)
        # it may have become an answer, or its rank has changed: at the ends of the counts
        if parent is not None and counts.get(where, 0) <= 1:
            self._push(parent)
