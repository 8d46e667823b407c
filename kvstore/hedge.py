"""When a silent store is asked no longer alone. Pure: the caller hands in seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

FLOOR_S = 0.05
"""No hedge before so much silence: pauses of this length are a busy machine, not a slow store."""
CEILING_S = 1.0
"""So much silence is always worth a hedge; also where nothing is known of a store yet."""
QUANTILE = 0.98
N_GAPS = 256
"""Gaps remembered per store and kind."""
MIN_GAPS = 16
"""Fewer say nothing about a quantile."""
BUDGET = 0.1
"""Hedges per request, on average."""
MAX_SAVED = 8.0
"""Hedges that may be saved up while all stores are quick."""
AVOID_S = 2.0
"""How long a store that lost a race without a word is asked last."""


class GapEstimate:
    """A high quantile of a store's latest gaps, in seconds."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=N_GAPS)
        self._n_since = 0
        self._quantile_s: float | None = None

    def add(self, gap_s: float) -> None:
        self._gaps.append(gap_s)
        self._n_since += 1
        # sorting at every page would cost more than a slightly old estimate does
        if len(self._gaps) >= MIN_GAPS and (self._quantile_s is None or self._n_since >= 16):
            ordered = sorted(self._gaps)
            self._quantile_s = ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)]
            self._n_since = 0

    @property
    def patience_s(self) -> float:
        """Silence after which a hedge is worth its request."""
        if self._quantile_s is None:
            return CEILING_S
        return min(max(self._quantile_s, FLOOR_S), CEILING_S)


@dataclass(slots=True)
class _Store:
    first: GapEstimate
    later: GapEstimate
    avoid_until_s: float = float("-inf")


class Hedging:
    """What is known of every store's pauses, and what hedges may still cost. Not thread-safe."""

    def __init__(self, enabled: bool = True, budget: float = BUDGET) -> None:
        self.enabled = enabled
        self._budget = budget
        self._saved = 1.0
        self._stores: dict[str, _Store] = {}

    def request(self) -> None:
        """A request was made that is no hedge: it earns its part of one."""
        self._saved = min(self._saved + self._budget, MAX_SAVED)

    def may_hedge(self) -> bool:
        """Takes one hedge from the budget if there is one."""
        if not self.enabled or self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True

    def gap(self, store_id: str, gap_s: float, first: bool) -> None:
        """A store was silent for so long before a page. first: since the request, not since a page."""
        store = self._store(store_id)
        (store.first if first else store.later).add(gap_s)

    def patience_s(self, store_id: str, first: bool) -> float:
        """Silence of a store after which its share should be hedged."""
        store = self._store(store_id)
        return (store.first if first else store.later).patience_s

    def lost(self, store_id: str, now: float) -> None:
        """A hedge came back before this store had said anything."""
        self._store(store_id).avoid_until_s = now + AVOID_S

    def slow(self, now: float) -> set[str]:
        """Stores that are asked last for now."""
        return {store_id for store_id, s in self._stores.items() if s.avoid_until_s > now}

    def keep(self, store_ids: set[str]) -> None:
        """Forgets stores that are gone."""
        for store_id in set(self._stores) - store_ids:
            del self._stores[store_id]

    def _store(self, store_id: str) -> _Store:
        store = self._stores.get(store_id)
        if store is None:
            store = self._stores[store_id] = _Store(GapEstimate(), GapEstimate())
        return store
