"""Blocks of tokens that are not rounded yet, or not for those who read them now: formats that round a block
together when it is full keep the latest one of every row here, as it was appended."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.ops import OpenBlock, block_start
from ..kvstore.page import PageGeometry
from .row import Row


class OpenBlocks:
    """One block per row and layer, float32: rounding happens once, and a block is small. It lives as long as
    the row's attempt; a later one makes it again, since prefill begins at a block's edge and decode replays
    from the prompt's end."""

    def __init__(self, geometry: PageGeometry) -> None:
        n_tokens = geometry.block_tokens
        self._n_layers = geometry.n_layers
        self._shape = (2, geometry.n_kv_heads, n_tokens, geometry.head_dim)
        self._rows: dict[str, Tensor] = {}

    def of(self, layer: int, row: Row) -> Tensor:
        """float32 [2 (K, V), Hkv, block_tokens, D]."""
        if row.row_id not in self._rows:
            # zeros: places that no token has yet must not hold NaN
            self._rows[row.row_id] = torch.zeros(self._n_layers, *self._shape)
        return self._rows[row.row_id][layer]

    def view(self, layer: int, row: Row, position: int) -> OpenBlock:
        """For queries of the block of `position`."""
        return OpenBlock(self.of(layer, row), block_start(position))

    def show(self, layer: int, row: Row, start: int, k: Tensor, v: Tensor, position: int) -> None:
        """Make the block of `position` the row's, of tokens start … (k, v [Hkv, T, D]) as far as they are in
        it; those before them stay."""
        block = block_start(position)
        first, last = max(start, block), min(start + k.shape[1], block + self._shape[2])
        here, there = slice(first - block, last - block), slice(first - start, last - start)
        # in numpy: torch would wake its threads, which then spin beside our own
        mine = self.of(layer, row).numpy()
        for side, values in enumerate((k, v)):
            mine[side, :, here] = values.detach().numpy()[:, there]

    def close(self, row: Row) -> None:
        self._rows.pop(row.row_id, None)
