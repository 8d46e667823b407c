"""What a decode step finds out once for all layers: in which of them the rows read something new."""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import is_due


def begin_step(
    position: Tensor, fresh: Tensor, schedule: Tensor, page_tokens: int, changed: Tensor
) -> None:
    """changed int32 [n_layers]: 1 where a row's selection is recomputed at this position, or its window
    reaches a new page; else what every row reads in the layer was read in the step before.

    position, fresh: int64 [B]; schedule: int32 [2, n_layers], each layer's refresh offset and the
    interval of its last stage (1 where it has none).
    """
    n_layers = changed.shape[0]
    _begin_kernel[(n_layers,)](
        position,
        fresh,
        schedule,
        changed,
        position.shape[0],
        N_LAYERS=n_layers,
        PAGE_TOKENS=page_tokens,
        BLOCK=triton.next_power_of_2(position.shape[0]),
        num_warps=1,
    )


def schedule_of(pairs: list[tuple[int, int]], device: torch.device) -> Tensor:
    """`begin_step`'s schedule of (offset, interval) per layer."""
    return torch.tensor(pairs, dtype=torch.int32).T.contiguous().to(device)


@triton.jit(do_not_specialize=["n_rows"])
def _begin_kernel(
    position_ptr,
    fresh_ptr,
    schedule_ptr,
    changed_ptr,
    n_rows,
    N_LAYERS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    row = tl.arange(0, BLOCK)
    position = tl.load(position_ptr + row, mask=row < n_rows, other=-1)
    fresh = tl.load(fresh_ptr + row, mask=row < n_rows, other=0)
    offset = tl.load(schedule_ptr + layer)
    refresh = tl.load(schedule_ptr + N_LAYERS + layer)
    new = is_due(position, fresh, offset, refresh)
    new = new | ((position >= 0) & (position % PAGE_TOKENS == 0))
    tl.store(changed_ptr + layer, tl.max(new.to(tl.int32), 0))
