"""The stores a client knows now. Membership may change at any time, from any thread."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..core.clock import Clock
from ..core.errors import LongreachError
from ..core.page_key import PageKey
from .client_memory import ClientMemory
from .fetch_plan import REASONS
from .membership import Membership
from .placement import rank
from .store_link import StoreLink, WrapChannel

logger = logging.getLogger(__name__)

COUNTERS = (
    "pages_stored",
    "pages_loaded",
    "bytes_written",
    "bytes_read_inplace",
    "bytes_read_wire",
    "corrupt_detected",
    "replica_reads",
    "duplicate_stores",
    "mismatched_duplicates",
    "pages_under_replicated",
    "leases_lost",
    "pages_unavailable",
    "hedges_sent",
    "hedges_won",
    "hedge_wasted_bytes",
    "pages_prefetched",
    "prefetch_hits",
    *(f"failed_load_{reason}" for reason in REASONS),
)


class Counters:
    """Named totals that many threads add to."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        with self._lock:
            self._totals.update(amounts)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._totals)


@dataclass(eq=False)
class StorePool:
    """Links by store id. The dict is replaced, never changed, so readers need no lock."""

    memory: ClientMemory
    node_id: str
    timeout_s: float
    force_wire: bool
    clock: Clock
    wrap_channel: WrapChannel | None = None
    links: dict[str, StoreLink] = field(default_factory=dict)
    membership: Membership = field(default_factory=lambda: Membership(0))
    _n_failures_before: int = 0
    _unreleased: list[tuple[StoreLink, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, stores: Membership | Mapping[str, str]) -> None:
        """The stores are these now; a membership older than the last is ignored, addresses alone
        mean stores of equal weight. A store whose address is unchanged keeps its link."""
        with self._lock:
            if not isinstance(stores, Membership):
                stores = Membership.of(stores, self.membership.epoch)
            if stores.epoch < self.membership.epoch:
                return
            before = self.links
            self.links = {
                store_id: before[store_id]
                if store_id in before and before[store_id].address == address
                else StoreLink(
                    store_id,
                    address,
                    self.memory,
                    self.node_id,
                    self.timeout_s,
                    self.force_wire,
                    self.clock,
                    self.wrap_channel,
                )
                for store_id, address in stores.addresses().items()
            }
            self.membership = stores
            gone = [link for link in before.values() if link not in self.links.values()]
            self._n_failures_before += sum(link.n_failures for link in gone)
            self._unreleased = [(link, o) for link, o in self._unreleased if link not in gone]
        for link in gone:
            link.close()

    def live(self) -> dict[str, StoreLink]:
        """Stores not in a cool-down."""
        return {store_id: link for store_id, link in self.links.items() if link.live}

    def live_or_all(self) -> dict[str, StoreLink]:
        """When every store failed lately, trying is better than giving up."""
        return self.live() or dict(self.links)

    def rank(self, key: PageKey, links: Mapping[str, StoreLink]) -> list[StoreLink]:
        """All of these stores in the key's order of preference; those that left meanwhile last."""
        ranked = rank(key, [member for member in self.membership if member.store_id in links])
        return [links[i] for i in ranked] + [links[i] for i in links if i not in ranked]

    def release(self, links: Iterable[StoreLink], owner: str) -> None:
        """Frees an owner's pins; what cannot be told now is told later."""
        for link in links:
            try:
                told = link.live
                link.release(owner)
            except LongreachError:
                told = False
            if not told and not link.closed:
                with self._lock:
                    self._unreleased.append((link, owner))

    def release_later(self, link: StoreLink, owner: str) -> None:
        """Frees an owner's pins with the next `release_again`."""
        with self._lock:
            self._unreleased.append((link, owner))

    def release_again(self) -> None:
        with self._lock:
            waiting, self._unreleased = self._unreleased, []
        for link, owner in waiting:
            self.release([link], owner)

    def n_failures(self) -> int:
        return self._n_failures_before + sum(link.n_failures for link in self.links.values())

    def close(self, owner: str) -> None:
        """Frees what is left of the owner's pins, whoever they were for; a store that does not answer
        lets the leases run out."""
        for link in self.links.values():
            try:
                link.farewell(f"{owner}/")
            except LongreachError as exc:
                logger.info("store %s is left without a farewell: %s", link.store_id, exc.message)
            link.close()
