"""What tests of the attention kernels share. Set LONGREACH_TEST_DEVICE=cuda to run them on a GPU; else
they run in Triton's interpreter, which has to be chosen before the kernels are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.gpu_pages import DeviceAngles, DeviceMask, DevicePages
from longreach.kernels.paged import PagedKV
from longreach.kernels.rope import Rope

DEVICE = os.environ.get("LONGREACH_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

STAGES = (Stage(chunk=64, keep=512), Stage(chunk=8, keep=136))

CASES = [  # dtype, query heads per KV head, head dim, page tokens
    (torch.float32, 3, 64, 64),
    (torch.float16, 1, 80, 16),
    (torch.bfloat16, 2, 128, 32),
    (torch.float16, 8, 96, 64),
    (torch.bfloat16, 7, 64, 16),
    (torch.float32, 4, 256, 64),
    (torch.int8, 5, 80, 32),
    (torch.float8_e4m3fn, 4, 128, 128),
    (torch.uint8, 6, 64, 64),
]


def policy_of(stages: tuple[Stage, ...] = STAGES, **more: Any) -> LayerPolicy:
    return LayerPolicy(stages=stages, **{"sink": 32, "window": 128, **more})


def device_pages(*views: PagedKV) -> DevicePages:
    return DevicePages.of(
        [replace(view, memories=tuple(m.to(DEVICE) for m in view.memories)) for view in views]
    )


def angles_of(rope: Rope, n_distances: int = 4096) -> DeviceAngles:
    return DeviceAngles.of(rope, n_distances, DEVICE)


def some_blocks(q_start: int, policy: LayerPolicy, n_lists: int, n_most: int) -> list[list[int]]:
    """Up to n_most random blocks per list, ascending, on the grid that begins after the sinks. The last
    ones reach into the window, as those of a selection do."""
    n_grid = max(0, q_start - policy.sink - policy.window // 2) // policy.block_tokens
    return [
        sorted(
            policy.sink + policy.block_tokens * int(i)
            for i in {*torch.randperm(n_grid)[: n_most - 1].tolist(), n_grid - 1}
        )
        if n_grid
        else []
        for _ in range(n_lists)
    ]


def mask_of(policy: LayerPolicy, lists: list[list[list[int]]], n_kv_heads: int) -> DeviceMask:
    """Lists per row (or query block) and mask head; what is beyond a count is garbage."""
    mask = DeviceMask.empty(policy, len(lists), n_kv_heads, DEVICE)
    mask.blocks.fill_(-(1 << 30))
    for row, of_row in enumerate(lists):
        for head, blocks in enumerate(of_row):
            mask.blocks[row, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            mask.n_blocks[row, head] = len(blocks)
    return mask


class NoWork(TorchDispatchMode):
    """Refuses whatever waits for the device or allocates."""

    VIEWS = (
        "slice", "view", "select", "alias", "detach", "unsqueeze", "expand", "as_strided", "transpose",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name in self.VIEWS, f"{func} in a step that must neither wait nor allocate"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_work(monkeypatch: Any) -> Iterator[None]:
    """Holds `NoWork` over everything but the interpreter's launches, which copy their arguments."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def launched(self: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", launched)
    with NoWork():
        yield
