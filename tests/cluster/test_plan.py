"""What a batch needs is said before it runs; what can never fit is refused with the numbers."""

from __future__ import annotations

import pytest

from longreach.cluster.plan import Rates, RowSize, check_policies, check_row, plan_rows
from longreach.core.config import Config, load_config
from longreach.core.errors import ContextTooLong, EmptyContext, FailedPrecondition
from longreach.core.page_key import RecipeFingerprint, page_keys
from longreach.kvstore.page import PageGeometry

GEOMETRY = PageGeometry(n_layers=2, n_kv_heads=1, page_tokens=10, head_dim=8)
RATES = Rates(prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0)


def config(*sets: str) -> Config:
    pages = 100 * GEOMETRY.page_nbytes
    return load_config(sets=[f"store.capacity_bytes={pages}", "cache.device_pages=8", *sets])


def row(name: str, tokens: list[int], n_context: int, max_tokens: int = 10) -> RowSize:
    keys = page_keys(tokens, RecipeFingerprint(bytes(32)), 10)
    return RowSize(name, len(tokens), n_context, max_tokens, tuple(keys))


def test_shared_pages_are_computed_and_held_once() -> None:
    document = list(range(95))
    rows = [row("a", [*document, 1001], 95), row("b", [*document, 1002, 1003], 95)]
    plan = plan_rows(rows, config(), GEOMETRY, RATES)
    # nine full pages are the same; each row has its own last page and one for its answer
    assert plan.n_rows == 2
    assert plan.prompt_tokens == 96 + 97
    assert plan.reused_tokens == 90
    assert plan.n_pages == 9 + 2 * 2
    assert plan.largest_row_pages == 11
    assert plan.store_bytes == 13 * GEOMETRY.page_nbytes * 2
    assert plan.device_bytes == 8 * GEOMETRY.page_nbytes
    assert plan.fits
    assert plan.prefill_s == pytest.approx((96 + 97 - 90) / 100)
    assert plan.decode_s == pytest.approx(2.0)
    assert plan.total_s == pytest.approx(plan.prefill_s + plan.decode_s)


def test_two_workers_need_half_the_time() -> None:
    rows = [row("a", list(range(50)), 50)]
    one = plan_rows(rows, config(), GEOMETRY, RATES)
    two = plan_rows(rows, config("worker.count=2"), GEOMETRY, RATES)
    assert two.total_s == pytest.approx(one.total_s / 2)


def test_a_row_at_the_limit_fits_and_one_page_more_does_not() -> None:
    # 2 stores of 100 slots in 2 copies hold 100 pages
    fits = RowSize("a", 990, 900, 10)
    check_row(fits, config(), GEOMETRY)
    with pytest.raises(ContextTooLong, match="101 pages"):
        check_row(RowSize("a", 991, 900, 10), config(), GEOMETRY)
    check_row(RowSize("a", 1980, 900, 10), config("store.replicas=1"), GEOMETRY)
    # one store cannot hold two copies: then one copy is all there is
    check_row(RowSize("a", 990, 900, 10), config("store.count=1"), GEOMETRY)


def disk(n_pages: int, *sets: str) -> Config:
    return config(
        "store.disk_dir=/d", f"store.disk_bytes={n_pages * GEOMETRY.page_nbytes + 7}", *sets
    )


def test_both_tiers_count() -> None:
    # 2 stores of 100 slots in memory and 50 on disk, in 2 copies
    check_row(RowSize("a", 1490, 900, 10), disk(50), GEOMETRY)
    with pytest.raises(
        ContextTooLong, match=rf"in memory and {50 * GEOMETRY.page_nbytes + 7} on disk hold 150"
    ):
        check_row(RowSize("a", 1491, 900, 10), disk(50), GEOMETRY)
    # every page is on disk as well: the larger of the two decides
    through = "store.disk_write=through"
    check_row(RowSize("a", 1190, 900, 10), disk(120, through), GEOMETRY)
    with pytest.raises(ContextTooLong, match="hold 120"):
        check_row(RowSize("a", 1191, 900, 10), disk(120, through), GEOMETRY)


@pytest.mark.parametrize(
    ("tokens", "mode", "in_arenas", "on_disk"),
    [(90, "demote", 20, 0), (1290, "demote", 200, 60), (1290, "through", 200, 260)],
)
def test_bytes_by_tier(tokens: int, mode: str, in_arenas: int, on_disk: int) -> None:
    rows = [row("a", list(range(tokens)), tokens)]
    plan = plan_rows(rows, disk(150, f"store.disk_write={mode}"), GEOMETRY, RATES)
    assert plan.arena_bytes == in_arenas * GEOMETRY.page_nbytes
    assert plan.disk_bytes == on_disk * GEOMETRY.page_nbytes
    assert plan.arena_capacity_bytes == 200 * GEOMETRY.page_nbytes
    assert plan.disk_capacity_bytes == 300 * GEOMETRY.page_nbytes
    assert plan.fits


def test_context_limits() -> None:
    limited = config("model.max_context_tokens=50")
    check_row(RowSize("a", 60, 50, 10), limited, GEOMETRY)
    with pytest.raises(ContextTooLong, match="51 tokens") as caught:
        check_row(RowSize("a", 60, 51, 10), limited, GEOMETRY)
    assert caught.value.details == {"tokens": 51, "limit": 50}
    with pytest.raises(EmptyContext):
        check_row(RowSize("a", 5, 0, 10), limited, GEOMETRY)


def test_refused_rows_are_listed_and_do_not_count() -> None:
    rows = [row("good", list(range(20)), 20), RowSize("huge", 10_000, 10_000, 10)]
    plan = plan_rows(rows, config(), GEOMETRY, RATES)
    assert plan.n_rows == 1
    assert [name for name, _ in plan.refused] == ["huge"]
    assert plan.prompt_tokens == 20


def test_more_than_the_stores_hold_is_told() -> None:
    rows = [row(f"r{i}", list(range(1000 * i, 1000 * i + 500)), 500) for i in range(3)]
    assert not plan_rows(rows, config(), GEOMETRY, RATES).fits


def test_search_over_keys_elsewhere_is_refused() -> None:
    stages = "[{scorer: search, chunk: 64, keep: 640}]"
    sparse = config(
        f"attention.policies=[{{stages: {stages}, window: 256}}]", "cache.page_tokens=64"
    )
    check_policies(sparse, stores_local=True)
    with pytest.raises(FailedPrecondition, match="'search'"):
        check_policies(sparse, stores_local=False)
    check_policies(config(), stores_local=False)


def test_blocks_that_are_not_rounded_yet_are_counted() -> None:
    geometry = PageGeometry(n_layers=2, n_kv_heads=1, page_tokens=64, head_dim=32, kv_dtype="int4c")
    rows = [RowSize(name, 640, 600, 10) for name in "abc"]
    settings = config("cache.kv_dtype=int4c", "worker.max_rows=2")
    plan = plan_rows(rows, settings, geometry, RATES)
    # two rows run at once; K and V of 64 tokens in float32
    blocks = 2 * geometry.n_leaves * 2 * 64 * 32 * 4
    assert plan.device_bytes == 8 * geometry.page_nbytes + blocks
