"""Stores without room: a row waits its turn, its pages free the others, no answer changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from longreach.core.errors import StoreFull
from longreach.workers.model_source import model_geometry

from .tiny import (
    hf_greedy,
    make_engine,
    make_tiny,
    page_client,
    prompts_of,
    request,
    store_pool,
    tiny_config,
)

N_NEW = (150, 4)
"""The first row answers for so long that the second comes to the end of the room."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("full-llama"))


def test_of_rows_without_room_the_last_is_told_that_the_stores_are_full_and_fits_later(
    llama: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        llama, "cache.device_pages=14", "store.timeout_s=1.5", "worker.prefill_chunk_tokens=64"
    )
    page_nbytes = model_geometry(config).page_nbytes
    config = config.model_copy(
        update={"store": config.store.model_copy(update={"capacity_bytes": 24 * page_nbytes})}
    )
    prompts = prompts_of(20 * 64, 22 * 64)
    expected = [hf_greedy(llama, [p], n)[0] for p, n in zip(prompts, N_NEW, strict=True)]
    with store_pool(config, tmp_path) as pool, page_client(config, pool) as client:
        engine = make_engine(config, client)
        waiting = [0, 1]
        refused: list[str] = []
        done: dict[int, list[int]] = {}
        while len(done) < 2:
            # what the dispatcher does with a row that found no room: again when another has ended
            for i in waiting:
                engine.submit(request(f"{i}", prompts[i], N_NEW[i]))
            waiting = []
            while engine.n_rows:
                for event in engine.step():
                    if event.error is not None:
                        assert isinstance(event.error, StoreFull), event.error
                        assert event.error.retryable
                        assert "page slots" in event.error.message
                        refused.append(event.row_id)
                        waiting.append(int(event.row_id))
                    if event.kind == "done":
                        done[int(event.row_id)] = event.payload["token_ids"]
        # whichever needed the room: the row that came last gave way
        assert refused == ["1"]
        assert [done[0], done[1]] == expected
