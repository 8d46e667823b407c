"""What a decoder block does outside its attention, for a few rows of one token each, in one call.

A call runs from one attention to the next: the output projection, the MLP and both residual sums of
a layer, then the norm and the q, k, v of the layer after it (or the model's last norm). As modules
these are a dozen small operations a layer, which take longer than reading the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_weights import AfterAttention, BeforeAttention, Norm

try:
    from . import cpu_block
except ModuleNotFoundError as exc:  # without numba the model's own modules do the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_block = None  # type: ignore[assignment]


def has_block_kernel() -> bool:
    """Whether a BlockStep can be made."""
    return cpu_block is not None


class BlockStep:
    """From one attention to the next. All weights are float32, contiguous, on the CPU; they are
    read where they are and must not move."""

    def __init__(self, after: AfterAttention | None, before: BeforeAttention | Norm) -> None:
        """after: None in front of the first layer; before: the model's last norm behind the last."""
        if cpu_block is None:
            raise RuntimeError("blocks need numba: ask has_block_kernel first")
        self.plan = cpu_block.Plan(after, before)

    def run(self, rows: BlockRows, attended: Tensor | None = None) -> None:
        """Updates rows.x, writes rows.out; attended: n * H * D numbers, the heads of a row together,
        float32 and contiguous, or ValueError.

        A row has the same bits whatever rows stand beside it and however many threads there are.
        """
        n_attended = rows.n_rows * self.plan.n_attended
        if attended is None:
            if n_attended:
                raise ValueError("a block behind an attention wants what was attended")
        elif attended.dtype != torch.float32 or not attended.is_contiguous():
            raise ValueError(
                f"a block wants contiguous float32, not {attended.dtype} {attended.stride()}"
            )
        elif attended.numel() != n_attended:
            raise ValueError(f"a block wants {n_attended} numbers, not {tuple(attended.shape)}")
        self.plan.run(rows.buffers, attended)


class BlockRows:
    """What the steps of a model work in for n rows. For one thread at a time."""

    def __init__(self, n_rows: int, steps: Sequence[BlockStep]) -> None:
        """steps: those that will run here."""
        if cpu_block is None:
            raise RuntimeError("blocks need numba: ask has_block_kernel first")
        self.n_rows = n_rows
        self.buffers = cpu_block.Buffers(n_rows, [step.plan for step in steps])

    @property
    def x(self) -> Tensor:
        """[n, hidden]: what the layers add to."""
        return self.buffers.x

    def out_of(self, step: BlockStep) -> Tensor:
        """[n, N] that a step writes: q, k, v side by side, or the last hidden state. The next step
        of the same width writes over it."""
        return self.buffers.outs[step.plan.n_out]
