"""Consecutive layers of a decode step in one launch, where nothing between them needs to be decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .block import BlockRows, BlockStep
from .decode import PreparedDecode

try:
    from . import cpu_layers
except ModuleNotFoundError as exc:  # without numba there are no block steps either
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_layers = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RowCall:
    """One row's attention in one layer; `prepared` has a `call`."""

    prepared: PreparedDecode
    position: int
    base: tuple[int, ...]
    """Of the segments now."""
    append: bool
    """Whether the token's key and value are to be stored first."""


@dataclass(frozen=True)
class LayersDone:
    """What became of a run of layers."""

    attending: float
    """Share of the time that attention took, 0 to 1."""
    not_finite: tuple[tuple[int, int], ...]
    """(layer of the run, row) whose new key or value is not finite as stored; that row's results are worth
    nothing from there on."""


def run_layers(
    rows: BlockRows, steps: Sequence[BlockStep], calls: Sequence[Sequence[RowCall]]
) -> LayersDone:
    """Attention of a layer, then the block after it, for each of steps; calls: per step, one for each
    row. Reads q, k and v of the first layer from `rows`, updates rows.x and what the last step writes.

    Bits are those of `PreparedDecode.attend` and `BlockStep.run`, one after the other, and of
    `append_tokens` where keys are stored. Raises InternalError if a page is absent.
    """
    attending, wrong = cpu_layers.run(rows.buffers, [step.plan for step in steps], calls)
    return LayersDone(attending, tuple(wrong))
