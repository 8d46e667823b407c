"""A row whose pages do not fit in memory: the engine reads them from disk in place, and answers the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from longreach.workers.model_source import model_geometry

from .tiny import answers, make_engine, make_tiny, page_client, prompts_of, store_pool, tiny_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("disk-llama"))


def test_the_same_answer_from_disk_and_after_a_restart(llama: Path, tmp_path: Path) -> None:
    config = tiny_config(llama, "cache.device_pages=12", "worker.prefill_chunk_tokens=64")
    n_bytes = model_geometry(config).page_nbytes
    (prompt,) = prompts_of(20 * 64 + 5)
    (tmp_path / "arena").mkdir()
    with store_pool(config, tmp_path / "arena") as pool, page_client(config, pool) as client:
        expected = answers(make_engine(config, client), [prompt], 20)
    sizes = {
        "capacity_bytes": 6 * n_bytes,
        "disk_dir": str(tmp_path / "disk"),
        "disk_bytes": 40 * n_bytes,
        "flush_s": 10.0,
        "promote_pages": 2,
    }
    small = config.model_copy(update={"store": config.store.model_copy(update=sizes)})
    for start in range(2):
        with store_pool(small, tmp_path / "arena") as pool, page_client(small, pool) as client:
            assert answers(make_engine(small, client), [prompt], 20) == expected
            told = [store.stats() for store in pool.services.values()]
            if start == 0:
                assert all(one["spilled"] >= 14 for one in told)
            else:
                assert all(one["pages_adopted"] >= 20 for one in told)
                assert sum(one["hits_disk"] for one in told) >= 10
