"""What happens to a row's pages before the row is admitted, and what slow stores do to a prefill."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longreach.core.config import Config
from longreach.kvstore.store_service import StoreService

from .tiny import (
    answers,
    make_engine,
    make_tiny,
    page_client,
    prompts_of,
    request,
    run_all,
    store_pool,
    tiny_config,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_pages_of_a_queued_row_come_before_it_is_admitted(llama: Path, tmp_path: Path) -> None:
    config = tiny_config(llama, "worker.max_rows=1")
    first, second = prompts_of(200, 900)
    with store_pool(config, tmp_path) as pool:
        with page_client(config, pool, "before") as client:
            engine = make_engine(config, client)
            want = answers(engine, [first, second], 30)
            assert engine.flow.flush(10)
        with page_client(config, pool, "after", force_wire=True) as client:
            engine = make_engine(config, client)
            engine.submit(request("first", first, 30))
            engine.submit(request("second", second, 30))
            engine.step()
            deadline_s = time.monotonic() + 5
            while client.stats()["pages_prefetched"] < 14 and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert client.stats()["prefetch_hits"] == 0, "the row was admitted too early"
            done = run_all(engine)
            assert [done[name]["token_ids"] for name in ("first", "second")] == want
            assert client.stats()["prefetch_hits"] == 900 // config.cache.page_tokens
            assert done["second"]["stats"]["tokens_reused"] == 896
        assert client.stats()["private_pages"] == 0


def slow(service: StoreService, seconds: float) -> None:
    inner = service.handle

    def handle(method: str, header: dict[str, Any], buffers: Sequence[memoryview]) -> Any:
        if method in ("write", "prepare_store"):
            time.sleep(seconds)
        return inner(method, header, buffers)

    service.handle = handle  # type: ignore[method-assign]


def run_with(config: Config, tmp_path: Path, delay_s: float) -> dict[str, Any]:
    (prompt,) = prompts_of(2000)
    with store_pool(config, tmp_path) as pool:
        bound = config.store.write_behind_bytes
        with page_client(config, pool, write_behind_bytes=bound) as client:
            for service in pool.services.values():
                slow(service, delay_s)
            engine = make_engine(config, client)
            engine.submit(request("row", prompt, 5))
            return run_all(engine)["row"]


def test_slow_stores_slow_prefill_and_fail_nothing(llama: Path, tmp_path: Path) -> None:
    # a page of this model has 48 KiB; two may be under way
    config = tiny_config(llama, "store.write_behind_bytes=100000", "store.timeout_s=1")
    quick = run_with(config, tmp_path, 0.0)
    slowed = run_with(config, tmp_path, 0.1)
    assert slowed["token_ids"] == quick["token_ids"]
    # 31 pages at two stores each, two pages at a time
    assert slowed["stats"]["seconds_store"] > quick["stats"]["seconds_store"] + 2.0
