"""Metrics of the stores by tier: names with units, numbers from `stats`, and no scrape that hangs."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster.tier_metrics import StoreCollector, families, tiered
from longreach.core.clock import ManualClock

from .fakes import GEOMETRY
from .kv_cluster import N_PAGES, RECIPE, KvCluster

pytestmark = pytest.mark.timeout(60)

TIERED: dict[str, Any] = {
    "arena_slots": 100,
    "arena_pages": 60,
    "disk_slots": 1000,
    "disk_pages": 300,
    "pages_held": 360,
    "pages_pinned": 5,
    "leases": 2,
    "writes_open": 1,
    "pages_stored": 400,
    "hits_arena": 70,
    "hits_disk": 30,
    "misses": 4,
    "evictions": 40,
    "promotions": 6,
    "demotions": 8,
    "spilled": 3,
    "corrupt_arena": 1,
    "corrupt_disk": 2,
    "disk_errors": 9,
    "store_full": 11,
    "leases_expired": 12,
    "scrub_checked": 13,
    "scrub_bad": 14,
    "repair_under_replicated": 15,
    "repair_pages_pushed": 16,
    "repair_bytes_pushed": 17,
    "repair_failures": 37,
    "repair_to_move": 20,
    "repair_dropped_surplus": 21,
    "repair_time_to_whole_s": 2.5,
    "repair_failures_unreachable": 18,
    "scrub_failed_deadline": 19,
    "label": "text is no number",
}


def samples(stats: dict[str, Any], page_bytes: int = 10) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families(stats, page_bytes)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_every_number_has_its_name_store_and_tier() -> None:
    found = samples({"store-0": TIERED})
    assert found == {
        ("longreach_kv_up", "store-0"): 1,
        ("longreach_kv_pages", "store-0", "arena"): 60,
        ("longreach_kv_pages", "store-0", "disk"): 300,
        ("longreach_kv_bytes", "store-0", "arena"): 600,
        ("longreach_kv_bytes", "store-0", "disk"): 3000,
        ("longreach_kv_capacity_bytes", "store-0", "arena"): 1000,
        ("longreach_kv_capacity_bytes", "store-0", "disk"): 10000,
        ("longreach_kv_pinned_pages", "store-0"): 5,
        ("longreach_kv_leases", "store-0"): 2,
        ("longreach_kv_queue_open_writes", "store-0"): 1,
        ("longreach_kv_stored_pages_total", "store-0"): 400,
        ("longreach_kv_hits_total", "store-0", "arena"): 70,
        ("longreach_kv_hits_total", "store-0", "disk"): 30,
        ("longreach_kv_misses_total", "store-0"): 4,
        ("longreach_kv_evictions_total", "store-0"): 40,
        ("longreach_kv_promotions_total", "store-0"): 6,
        ("longreach_kv_demotions_total", "store-0"): 8,
        ("longreach_kv_spilled_total", "store-0"): 3,
        ("longreach_kv_corrupt_total", "store-0", "arena"): 1,
        ("longreach_kv_corrupt_total", "store-0", "disk"): 2,
        ("longreach_kv_disk_errors_total", "store-0"): 9,
        ("longreach_kv_store_full_total", "store-0"): 11,
        ("longreach_kv_leases_expired_total", "store-0"): 12,
        ("longreach_kv_scrub_checked_total", "store-0"): 13,
        ("longreach_kv_scrub_bad_total", "store-0"): 14,
        ("longreach_kv_repair_under_replicated", "store-0"): 15,
        ("longreach_kv_repair_pages_pushed_total", "store-0"): 16,
        ("longreach_kv_repair_bytes_pushed_total", "store-0"): 17,
        ("longreach_kv_repair_pages_to_move", "store-0"): 20,
        ("longreach_kv_repair_pages_dropped_total", "store-0"): 21,
        ("longreach_kv_repair_whole_seconds", "store-0"): 2.5,
        ("longreach_kv_failures_total", "store-0", "repair", "unreachable"): 18,
        ("longreach_kv_failures_total", "store-0", "scrub", "deadline"): 19,
    }


def test_names_carry_units_and_counters_end_in_total() -> None:
    for family in families({"store-0": TIERED}, 10):
        assert re.fullmatch(r"longreach_kv_[a-z_]+", family.name)
        assert family.documentation
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
            assert family.type in ("counter", "gauge")
            assert set(sample.labels) <= {"store", "tier", "phase", "reason"}
            assert "mib" not in sample.name


def test_a_store_without_tiers_is_all_arena() -> None:
    plain = {"n_slots": 8, "pages_held": 3, "corrupt_detected": 2}
    found = samples({"store-0": plain})
    assert found["longreach_kv_bytes", "store-0", "arena"] == 30
    assert found["longreach_kv_capacity_bytes", "store-0", "arena"] == 80
    assert found["longreach_kv_corrupt_total", "store-0", "arena"] == 2
    assert ("longreach_kv_bytes", "store-0", "disk") not in found
    assert tiered(TIERED)["arena_pages"] == 60


def test_a_store_that_does_not_answer_is_down_and_has_no_numbers() -> None:
    found = samples({"store-0": None, "store-1": TIERED})
    assert found["longreach_kv_up", "store-0"] == 0
    assert {key[1] for key in found if key[0] != "longreach_kv_up"} == {"store-1"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KvCluster]:
    with KvCluster(tmp_path, 2, 64, RECIPE, "gateway.metrics_port=0") as made:
        yield made


def scrape(cluster: KvCluster) -> dict[tuple[str, ...], float]:
    port = cluster.gateway.metrics._server.server_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_has_the_gateway_and_its_stores(cluster: KvCluster) -> None:
    cluster.read()
    found = scrape(cluster)
    assert found[("longreach_workers_live",)] == 1
    for name in cluster.names:
        assert found["longreach_kv_up", name] == 1
        assert found["longreach_kv_pages", name, "arena"] == N_PAGES
        assert found["longreach_kv_bytes", name, "arena"] == N_PAGES * GEOMETRY.page_nbytes
        assert found["longreach_kv_stored_pages_total", name] == N_PAGES
    # the gateway's own statistics stay its own: nobody is asked for them
    assert not [name for name in cluster.client.stats().gateway if "kv_" in name]


def test_a_scrape_does_not_hang_on_a_silent_store(cluster: KvCluster) -> None:
    cluster.stores["store-0"].awake.clear()
    started_s = time.monotonic()
    found = scrape(cluster)
    assert time.monotonic() - started_s < 4
    assert found["longreach_kv_up", "store-0"] == 0
    assert found["longreach_kv_up", "store-1"] == 1
    assert ("longreach_kv_pages", "store-0", "arena") not in found
    assert found[("longreach_workers_live",)] == 1


def test_a_lost_store_stays_visible(cluster: KvCluster) -> None:
    assert scrape(cluster)["longreach_kv_up", "store-0"] == 1
    cluster.runtime.lose_store("store-0")
    time.sleep(1.1)  # longer than answers are kept
    assert scrape(cluster)["longreach_kv_up", "store-0"] == 0


def test_scrapes_that_come_together_ask_once(cluster: KvCluster) -> None:
    clock = ManualClock()
    collector = StoreCollector(cluster.runtime.stores, GEOMETRY.page_nbytes, clock)
    threads = [threading.Thread(target=lambda: list(collector.collect())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [method for method, _ in cluster.stores["store-0"].asked] == ["stats"]
    clock.advance(0.9)
    list(collector.collect())
    assert len(cluster.stores["store-0"].asked) == 1
    clock.advance(0.2)
    list(collector.collect())
    assert len(cluster.stores["store-0"].asked) == 2
