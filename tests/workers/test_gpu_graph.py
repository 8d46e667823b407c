"""Sizes of graphs, and the path without them; capture itself needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

from longreach.workers.gpu_graph import StepGraphs, bucket_of


@pytest.mark.parametrize(
    ("n", "most", "want"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 8), (5, 6, 6), (1, 1, 1)]
)
def test_a_batch_takes_the_next_power_of_two(n: int, most: int, want: int) -> None:
    assert bucket_of(n, most) == want


@pytest.mark.parametrize("enabled", [True, False])
def test_without_cuda_every_step_calls_the_body(enabled: bool) -> None:
    sizes: list[int] = []
    graphs = StepGraphs(sizes.append, 8, torch.device("cpu"), enabled)
    for n in (3, 3, 1):
        graphs.run(n)
    assert sizes == [4, 4, 1]
    assert list(graphs.sizes) == []


@pytest.mark.gpu
def test_a_captured_step_is_replayed() -> None:
    device = torch.device("cuda")
    total = torch.zeros(8, device=device)
    n_calls = 0

    def body(size: int) -> None:
        nonlocal n_calls
        n_calls += 1
        total[:size] += 1

    graphs = StepGraphs(body, 8, device, True)
    for _ in range(5):
        graphs.run(2)
    assert n_calls < 5 + 2
    assert list(graphs.sizes) == [2]
