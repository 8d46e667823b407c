"""The device bank: memory cut into leaf slots, per layer. Bounded by `device_pages` (DESIGN 4)."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..kernels.ops import TORCH_DTYPE, append_tokens, seal_blocks
from ..kvstore.page import PageGeometry
from .memory import huge_zeros


class Bank:
    """KV slots of every layer: `layers[l]` is [n_slots, 2, page_tokens, row] in KV dtype.

    n_slots = device_pages * n_kv_heads. No policy here: see residency.py.
    """

    def __init__(self, geometry: PageGeometry, device_pages: int) -> None:
        self.geometry = geometry
        self.n_slots = device_pages * geometry.n_kv_heads
        shape = (geometry.n_layers, self.n_slots, 2, geometry.page_tokens, geometry.row_items)
        # zeros: untouched slots must never hold NaN that a masked product could spread
        self.tensor = huge_zeros(shape, TORCH_DTYPE[geometry.kv_dtype])
        self.layers: tuple[Tensor, ...] = tuple(self.tensor.unbind(0))
        self._bytes = (
            self.tensor.view(torch.uint8)
            .numpy()
            .reshape(geometry.n_layers, self.n_slots, geometry.leaf_nbytes)
        )

    def write(
        self, layer: int, slots: np.ndarray, offsets: np.ndarray, k: Tensor, v: Tensor
    ) -> int:
        """Append tokens; this is where KV is rounded to the recipe's format, once (DESIGN 6.5).

        slots: int64 [Hkv, T], offsets: int64 [T], the slot and place inside it of each token; k, v
        [Hkv, T, D]. Returns the first token that is not finite once stored, or -1.
        """
        return append_tokens(self.layers[layer], slots, offsets, k, v)

    def seal(self, layer: int, slots: np.ndarray, blocks: np.ndarray, k: Tensor, v: Tensor) -> None:
        """`write` of full blocks, in formats that round them together: slots int64 [Hkv, n], blocks [n], the
        number of each in its page; k, v [Hkv, n * block_tokens, D], finite."""
        seal_blocks(self.layers[layer], slots, blocks, k, v)

    def load(self, layer: int, slots: np.ndarray, memory: Tensor, rows: np.ndarray) -> None:
        """Copy leaves out of a mapped memory [n_rows, 2, P, D] into slots."""
        # as bytes: numpy copies a leaf at once, torch element by element
        leaves = memory.view(torch.uint8).numpy().reshape(-1, self.geometry.leaf_nbytes)
        self._bytes[layer][slots] = leaves[rows]

    def checksum(self, layer: int, slot: int) -> int:
        return xxhash.xxh3_64_intdigest(self._bytes[layer, slot])

    def page_bytes(self, slots: np.ndarray) -> np.ndarray:
        """Bytes of one page from its slots [n_layers, Hkv]: uint8 [page_nbytes], leaf after leaf."""
        layers = np.arange(self.geometry.n_layers)[:, None]
        return self._bytes[layers, slots].reshape(-1)  # type: ignore[no-any-return]
