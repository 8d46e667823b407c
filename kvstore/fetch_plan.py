"""Which pages of a batch are asked of which store, and what follows from their answers. Pure: no I/O,
no clock, no threads.

A share is what one store is asked for in one request. Near stores are asked first, in the order of
the page's rank; then those that should hold the page, the least busy of them; then the others. When
a share ends, what it lacked is asked of the next stores. A share may be hedged: its rest is asked of
other stores as well. The first good page decides the race, and the loser need not go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.page_key import PageKey

SEARCH_WIDTH = 8
"""Stores asked for a page, in its order of preference, before it counts as gone."""
REASONS = (
    "corrupt_wire",
    "corrupt_inplace",
    "corrupt_private",
    "wrong_recipe",
    "short",
    "missing",
    "deadline",
    "unreachable",
)
"""Why a store's copy of a page was not used."""


@dataclass(frozen=True, slots=True)
class Share:
    """Pages asked of one store in one request, those needed first in front. hedges: number of the
    share whose rest it asks for again."""

    number: int
    store_id: str
    keys: tuple[PageKey, ...]
    hedges: int | None = None


@dataclass(eq=False, slots=True)
class _Open:
    share: Share
    waiting: dict[PageKey, None]
    """What it may still bring, in order."""
    bad: list[PageKey] = field(default_factory=list)
    """What it could not bring, to be asked elsewhere when it ends."""


class FetchPlan:
    """One batch, from `begin` until `done`. The caller tells what happened to each share and starts
    those that it is given."""

    def __init__(
        self,
        keys: Iterable[PageKey],
        ranks: Mapping[PageKey, Sequence[str]],
        near: Collection[str] = (),
        n_replicas: int = 1,
        last: Collection[str] = (),
    ) -> None:
        """keys: in order of need, each once. ranks: stores of each key in its order of preference, of
        which the first n_replicas should hold it. near: stores whose pages are read in place. last:
        stores that were too slow lately, asked when no other is left."""
        self._need = {key: i for i, key in enumerate(keys)}
        self._ranks = ranks
        self._near = frozenset(near)
        self._last = frozenset(last)
        self._n_replicas = n_replicas
        self._missing = dict.fromkeys(self._need)
        self._tried: dict[PageKey, set[str]] = {key: set() for key in self._need}
        self._failed: set[PageKey] = set()
        self._open: dict[int, _Open] = {}
        self._down: set[str] = set()
        self._n_shares = 0

    @property
    def done(self) -> bool:
        """Everything has come, or nobody is left to ask."""
        return not self._missing or not self._open

    @property
    def missing(self) -> list[PageKey]:
        """Pages without a good copy so far, in order of need."""
        return list(self._missing)

    def begin(self) -> list[Share]:
        return self._assign(self._missing)

    def failed_before(self, key: PageKey) -> bool:
        """Whether another store's copy of the page was corrupt or could not be reached."""
        return key in self._failed

    def arrived(self, number: int, key: PageKey) -> bool:
        """A good page came. False if it is of no use: another share was first."""
        here = self._open.get(number)
        if here is None or key not in self._missing:
            return False
        del self._missing[key]
        owed = key in here.waiting
        for other in self._open.values():
            other.waiting.pop(key, None)
        if owed:  # a page that it lost before is welcome, but turns nothing round
            self._decide_race(here, key)
        return True

    def bad(self, number: int, key: PageKey, *, lacking: bool) -> None:
        """This store has no good copy of the page, or none at all; it is asked elsewhere when the
        share ends."""
        here = self._open.get(number)
        if here is None:
            return
        self._tried[key].add(here.share.store_id)
        if not lacking:
            self._failed.add(key)
        if key in here.waiting:
            del here.waiting[key]
            here.bad.append(key)

    def ended(self, number: int, *, failed: bool = False) -> list[Share]:
        """A share is over; what it did not bring is asked elsewhere. failed: the store is not asked
        again in this batch."""
        here = self._open.pop(number, None)
        if here is None:
            return []
        store_id = here.share.store_id
        if failed:
            self._down.add(store_id)
            self._failed.update(here.waiting)
        for key in here.waiting:
            self._tried[key].add(store_id)
        elsewhere = {key for other in self._open.values() for key in other.waiting}
        homeless = {*here.waiting, *here.bad} - elsewhere
        return self._assign(key for key in self._missing if key in homeless)

    def needless(self) -> list[int]:
        """Open shares that can bring nothing any more; they should be stopped and then `ended`."""
        return [n for n, o in self._open.items() if not o.waiting]

    def n_waiting(self, number: int) -> int:
        """Pages that a share still owes."""
        here = self._open.get(number)
        return len(here.waiting) if here is not None else 0

    def has_others(self, number: int) -> bool:
        """Whether anything that a share still owes could be asked of another store."""
        here = self._open.get(number)
        return here is not None and any(self._next_store(key) for key in here.waiting)

    def hedged(self, number: int) -> bool:
        return any(o.share.hedges == number for o in self._open.values())

    def hedge(self, number: int, may_ask: Callable[[], bool]) -> list[Share]:
        """Asks the rest of a share of other stores as well, as many requests as may_ask allows.
        Hedges are not hedged themselves."""
        here = self._open.get(number)
        if here is None or here.share.hedges is not None or self.hedged(number):
            return []
        return self._assign(list(here.waiting), hedges=number, may_ask=may_ask)

    def _decide_race(self, winner: _Open, key: PageKey) -> None:
        number, original = winner.share.number, winner.share.hedges
        if original is not None and original in self._open:
            for lost in winner.share.keys:
                self._open[original].waiting.pop(lost, None)
        for other in self._open.values():
            if other.share.hedges == number and key in other.share.keys:
                other.waiting.clear()
                other.bad.clear()

    def _assign(
        self,
        keys: Iterable[PageKey],
        hedges: int | None = None,
        may_ask: Callable[[], bool] = lambda: True,
    ) -> list[Share]:
        load = Counter({o.share.store_id: 0 for o in self._open.values()})
        for o in self._open.values():
            load[o.share.store_id] += len(o.waiting)
        parts: dict[str, list[PageKey]] = {}
        refused: set[str] = set()
        for key in keys:
            store_id = self._next_store(key, load)
            if store_id is None or store_id in refused:
                continue
            if store_id not in parts:
                if not may_ask():
                    refused.add(store_id)
                    continue
                parts[store_id] = []
            parts[store_id].append(key)
            load[store_id] += 1
        shares = []
        for store_id, part in parts.items():
            share = Share(self._n_shares, store_id, tuple(part), hedges)
            self._n_shares += 1
            self._open[share.number] = _Open(share, dict.fromkeys(part))
            shares.append(share)
        return shares

    def _next_store(self, key: PageKey, load: Mapping[str, int] | None = None) -> str | None:
        rank = self._ranks[key][:SEARCH_WIDTH]
        asked = {o.share.store_id for o in self._open.values() if key in o.waiting}
        tried = self._tried[key] | asked | self._down
        free = [store_id for store_id in rank if store_id not in tried]
        quick = [store_id for store_id in free if store_id not in self._last] or free
        near = [store_id for store_id in quick if store_id in self._near]
        if near or not quick:
            return near[0] if near else None
        holders = [s for s in rank[: self._n_replicas] if s in quick]
        if not holders:
            return quick[0]
        if load is None:
            return holders[0]
        return min(holders, key=lambda store_id: load[store_id])
