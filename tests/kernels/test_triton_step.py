"""What a step finds out for all layers at once: the same as the CPU's schedule, position by position."""

from __future__ import annotations

import torch

from longreach.kernels.gpu_ops import begin_step, schedule_of
from longreach.workers.scheduler import refresh_level

N_LAYERS, PAGE = 6, 64


def test_a_layer_changes_when_its_last_stage_is_due_or_a_page_begins() -> None:
    refreshes = (16, 4)
    offsets = [layer * refreshes[0] // N_LAYERS for layer in range(N_LAYERS)]
    schedule = schedule_of([(offset, refreshes[-1]) for offset in offsets], torch.device("cpu"))
    changed = torch.zeros(N_LAYERS, dtype=torch.int32)
    for position in range(120, 150):
        rows = torch.tensor([-1, position, -1])  # two places are empty
        begin_step(rows, torch.zeros(3, dtype=torch.int64), schedule, PAGE, changed)
        want = [
            refresh_level(refreshes, position, layer, N_LAYERS, False) < 2 or position % PAGE == 0
            for layer in range(N_LAYERS)
        ]
        assert changed.bool().tolist() == want


def test_a_row_that_is_new_changes_all_layers_and_empty_places_none() -> None:
    schedule = schedule_of([(0, 8)] * N_LAYERS, torch.device("cpu"))
    changed = torch.full((N_LAYERS,), 7, dtype=torch.int32)
    begin_step(torch.tensor([-1, -1]), torch.tensor([1, 1]), schedule, PAGE, changed)
    assert changed.tolist() == [0] * N_LAYERS
    begin_step(torch.tensor([-1, 101]), torch.tensor([0, 1]), schedule, PAGE, changed)
    assert changed.tolist() == [1] * N_LAYERS
