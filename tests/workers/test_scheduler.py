from __future__ import annotations

import numpy as np
import pytest

from longreach.core.stage import LayerPolicy, Stage
from longreach.workers.row import Row, RowRequest, RowState
from longreach.workers.sampling import Sampling
from longreach.workers.scheduler import (
    chunk_end,
    min_device_pages,
    plan_step,
    prefill_start,
    query_blocks,
    refresh_level,
)


def row(order: int, state: RowState) -> Row:
    request = RowRequest(f"row-{order}", np.zeros(8, np.uint32), 8, Sampling())
    return Row(request, [], 8, 0.0, order, state=state)


def test_rows_are_admitted_in_order_while_there_is_room() -> None:
    rows = [row(0, RowState.DECODE), row(1, RowState.QUEUED), row(2, RowState.QUEUED)]
    plan = plan_step(rows, max_rows=2, is_ready=lambda r: True)
    assert [r.order for r in plan.admit] == [1]
    assert [r.order for r in plan.decode] == [0]


def test_the_earliest_prefilling_row_goes_first() -> None:
    rows = [row(3, RowState.PREFILL), row(1, RowState.PREFILL), row(2, RowState.DECODE)]
    plan = plan_step(rows, 8, lambda r: True)
    assert plan.prefill is rows[1]


def test_a_waiting_row_is_opened_again_only_when_its_page_has_settled() -> None:
    rows = [row(0, RowState.PREFILL), row(1, RowState.WAITING)]
    assert plan_step(rows, 8, lambda r: False).admit == ()
    assert plan_step(rows, 8, lambda r: True).admit == (rows[1],)


@pytest.mark.parametrize(
    ("start", "n_prompt", "chunk", "end"),
    [
        (0, 1000, 512, 512),
        (512, 1000, 512, 1000),
        (0, 1000, 100, 64),
        (64, 1000, 200, 256),
        (0, 1000, 1, 64),
        (960, 1000, 64, 1000),
        (0, 40, 512, 40),
    ],
)
def test_chunks_end_on_query_blocks_or_at_the_prompts_end(
    start: int, n_prompt: int, chunk: int, end: int
) -> None:
    assert chunk_end(start, n_prompt, chunk) == end


@pytest.mark.parametrize(
    ("n_prompt", "existing", "start"),
    [(1000, 0, 0), (1000, 960, 960), (1024, 1024, 960), (1000, 48, 0), (1000, 112, 64), (1, 0, 0)],
)
def test_the_last_block_is_always_recomputed(n_prompt: int, existing: int, start: int) -> None:
    assert prefill_start(n_prompt, existing) == start


def test_refresh_is_keyed_by_position_and_spread_over_layers() -> None:
    refreshes = (16, 8, 4)
    levels = [refresh_level(refreshes, p, layer=0, n_layers=4, first=False) for p in range(32)]
    assert levels[0] == 0
    assert levels[16] == 0
    assert levels[8] == 1
    assert levels[4] == levels[12] == 2
    assert [levels.count(level) for level in range(4)] == [2, 2, 4, 24]
    full = [
        next(p for p in range(16) if refresh_level(refreshes, p, layer, 4, False) == 0)
        for layer in range(4)
    ]
    assert sorted(full) == [0, 4, 8, 12]


def test_the_first_decode_step_refreshes_everything() -> None:
    assert refresh_level((16, 8, 4), 3, layer=1, n_layers=4, first=True) == 0


def test_the_smallest_bank_is_sink_window_and_eight_pages() -> None:
    stages = (Stage(chunk=64, keep=256), Stage(chunk=8, keep=64))
    policy = LayerPolicy(stages=stages, sink=64, window=128)
    assert min_device_pages((policy,), 64) == 1 + 2 + 8


@pytest.mark.parametrize(
    ("start", "end", "question", "want"),
    [
        (0, 130, 130, [(0, 64), (64, 128), (128, 130)]),
        (0, 130, 64, [(0, 64), (64, 80), (80, 96), (96, 112), (112, 128), (128, 130)]),
        (128, 150, 64, [(128, 144), (144, 150)]),
        (0, 64, 128, [(0, 64)]),
        (64, 192, 128, [(64, 128), (128, 144), (144, 160), (160, 176), (176, 192)]),
    ],
)
def test_query_blocks(start: int, end: int, question: int, want: list[tuple[int, int]]) -> None:
    assert query_blocks(start, end, question, 16) == want


def test_the_next_rows_in_the_queue_are_named() -> None:
    rows = [row(0, RowState.DECODE), *(row(i, RowState.QUEUED) for i in range(1, 6))]
    plan = plan_step(rows, 2, lambda r: True)
    assert [r.order for r in plan.admit] == [1]
    assert [r.order for r in plan.queued] == [2, 3]
