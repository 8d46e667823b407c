"""Prometheus metrics of the stores and their tiers, read from their `stats` when scraped.

Names are `longreach_kv_*` with units; what only grows ends in _total. A store that does not answer within
the deadline has `longreach_kv_up` 0 and no other numbers: gaps, never stale values.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..core.clock import Clock, SystemClock
from ..core.errors import LongreachError
from ..kvstore.transport import Channel
from .store_calls import STAT_TIMEOUT_S, ask_all

CACHE_S = 1.0
"""Scrapes closer than this share one answer of the stores."""
TIERS = ("arena", "disk")

Numbers = Mapping[str, Any]
Family = GaugeMetricFamily | CounterMetricFamily


class _Metric(NamedTuple):
    """stat: key of the store's statistics; `{tier}` in it makes a label. Counters end in _total."""

    name: str
    help: str
    stat: str


_METRICS = (
    _Metric("longreach_kv_pages", "Pages held", "{tier}_pages"),
    _Metric("longreach_kv_pinned_pages", "Pages that rows hold now", "pages_pinned"),
    _Metric("longreach_kv_leases", "Owners that hold pages or write them", "leases"),
    _Metric("longreach_kv_queue_open_writes", "Pages being written", "writes_open"),
    _Metric("longreach_kv_queue_waiting_moves", "Pages waiting to change tier", "moves_waiting"),
    _Metric("longreach_kv_stored_pages_total", "Pages completed", "pages_stored"),
    _Metric("longreach_kv_hits_total", "Pages found", "hits_{tier}"),
    _Metric("longreach_kv_misses_total", "Pages asked for and not held", "misses"),
    _Metric("longreach_kv_evictions_total", "Pages forgotten for want of room", "evictions"),
    _Metric("longreach_kv_promotions_total", "Pages moved from disk to arena", "promotions"),
    _Metric("longreach_kv_demotions_total", "Pages moved from arena to disk", "demotions"),
    _Metric("longreach_kv_spilled_total", "New pages that went to disk", "spilled"),
    _Metric("longreach_kv_corrupt_total", "Pages that failed a check", "corrupt_{tier}"),
    _Metric("longreach_kv_disk_errors_total", "Failed reads and writes of the disk", "disk_errors"),
    _Metric("longreach_kv_store_full_total", "New pages that found no room", "store_full"),
    _Metric("longreach_kv_leases_expired_total", "Leases that ran out", "leases_expired"),
    _Metric("longreach_kv_scrub_checked_total", "Pages the scrub checked", "scrub_checked"),
    _Metric("longreach_kv_scrub_bad_total", "Bad pages the scrub found", "scrub_bad"),
    _Metric(
        "longreach_kv_repair_under_replicated",
        "Pages with too few copies",
        "repair_under_replicated",
    ),
    _Metric("longreach_kv_repair_pages_to_move", "Pages in wrong places", "repair_to_move"),
    _Metric(
        "longreach_kv_repair_pages_dropped_total",
        "Copies that were not needed any more",
        "repair_dropped_surplus",
    ),
    _Metric(
        "longreach_kv_repair_whole_seconds",
        "From the last loss of a store until every page had its copies",
        "repair_time_to_whole_s",
    ),
    _Metric("longreach_kv_repair_pages_pushed_total", "Copies made", "repair_pages_pushed"),
    _Metric("longreach_kv_repair_bytes_pushed_total", "Bytes of copies", "repair_bytes_pushed"),
)
_BYTES = (
    _Metric("longreach_kv_bytes", "Bytes of pages held", "{tier}_pages"),
    _Metric("longreach_kv_capacity_bytes", "Bytes of page slots", "{tier}_slots"),
)
_FAILURES = _Metric("longreach_kv_failures_total", "Failed operations", "failed")
_FAILED = re.compile(r"(?P<phase>[a-z]+)_fail(?:ed|ures)_(?P<reason>\w+)")
"""How a store names its counts of failures, e.g. repair_failures_store_full."""


def families(stats: Mapping[str, Numbers | None], page_bytes: int) -> Iterable[Family]:
    """Metrics of all stores. stats: by store id; None for one that does not answer."""
    up = GaugeMetricFamily("longreach_kv_up", "Whether the store answers", labels=["store"])
    for store, numbers in stats.items():
        up.add_metric([store], float(numbers is not None))
    yield up
    known = {store: tiered(numbers) for store, numbers in stats.items() if numbers is not None}
    for metric in _METRICS:
        yield _family(metric, known, 1)
    for metric in _BYTES:
        yield _family(metric, known, page_bytes)
    failures = _new(_FAILURES, ["store", "phase", "reason"])
    for store, numbers in known.items():
        for (phase, reason), value in failures_of(numbers).items():
            failures.add_metric([store, phase, reason], value)
    yield failures


def failures_of(numbers: Numbers) -> dict[tuple[str, str], float]:
    """A store's counts of failed operations by (phase, reason)."""
    named = ((_FAILED.fullmatch(name), value) for name, value in numbers.items())
    return {(found["phase"], found["reason"]): value for found, value in named if found}


def tiered(numbers: Numbers) -> Numbers:
    """A store's numbers by tier, also where it has no disk tier and speaks of slots and pages alone."""
    plain = {
        "arena_pages": numbers.get("pages_held", 0),
        "arena_slots": numbers.get("n_slots", 0),
        "corrupt_arena": numbers.get("corrupt_detected", 0),
    }
    return {**plain, **numbers}


def _family(metric: _Metric, stats: Mapping[str, Numbers], factor: int) -> Family:
    by_tier = "{tier}" in metric.stat
    family = _new(metric, ["store", "tier"] if by_tier else ["store"])
    for store, numbers in stats.items():
        for tier in TIERS if by_tier else ("",):
            value = numbers.get(metric.stat.format(tier=tier))
            if isinstance(value, int | float):
                family.add_metric([store, tier] if by_tier else [store], factor * value)
    return family


def _new(metric: _Metric, labels: list[str]) -> Family:
    if metric.name.endswith("_total"):
        return CounterMetricFamily(metric.name, metric.help, labels=labels)
    return GaugeMetricFamily(metric.name, metric.help, labels=labels)


class StoreCollector(Collector):
    """Thread-safe. A scrape takes at most STAT_TIMEOUT_S, whatever the stores do."""

    def __init__(
        self,
        stores: Callable[[], Mapping[str, Channel]],
        page_bytes: int,
        clock: Clock | None = None,
    ) -> None:
        self._stores = stores
        self._page_bytes = page_bytes
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._known: dict[str, Numbers | None] = {}
        self._known_s = float("-inf")

    def collect(self) -> Iterable[Family]:
        return families(self._stats(), self._page_bytes)

    def _stats(self) -> dict[str, Numbers | None]:
        with self._lock:  # a second scrape waits for the first one's answer
            if self._clock.monotonic_s() - self._known_s >= CACHE_S:
                answers = ask_all(self._stores(), "stats", {}, STAT_TIMEOUT_S)
                lost: dict[str, Numbers | None] = dict.fromkeys(self._known)
                self._known = lost | {
                    store: None if isinstance(answer, LongreachError) else answer
                    for store, answer in answers.items()
                }
                self._known_s = self._clock.monotonic_s()
            return self._known
