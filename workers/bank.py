"""The device bank: memory cut into leaf slots, per layer. Bounded by `device_pages` (DESIGN 4)."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..kvstore.page import PageGeometry
from .memory import huge_zeros

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_RAW = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Bank:
    """KV slots of every layer: `layers[l]` is [n_slots, 2, page_tokens, head_dim] in KV dtype.

    n_slots = device_pages * n_kv_heads. No policy here: see residency.py.
    """

    def __init__(self, geometry: PageGeometry, device_pages: int) -> None:
        self.geometry = geometry
        self.n_slots = device_pages * geometry.n_kv_heads
        shape = (geometry.n_layers, self.n_slots, 2, geometry.page_tokens, geometry.head_dim)
        # zeros: untouched slots must never hold NaN that a masked product could spread
        self.tensor = huge_zeros(shape, TORCH_DTYPE[geometry.kv_dtype])
        self.layers: tuple[Tensor, ...] = tuple(self.tensor.unbind(0))
        # numpy knows no bfloat16; and torch would wake its threads for a few bytes
        self._raw = self.tensor.view(_RAW[self.tensor.dtype]).numpy()
        self._bytes = (
            self.tensor.view(torch.uint8)
            .numpy()
            .reshape(geometry.n_layers, self.n_slots, geometry.leaf_nbytes)
        )

    def write(
        self, layer: int, slots: np.ndarray, offset: np.ndarray, k: Tensor, v: Tensor
    ) -> None:
        """Append tokens; this is where KV is rounded to the recipe's format, once (DESIGN 6.5).

        slots, offset: int64 [Hkv, T], the slot and place inside it of each token; k, v [Hkv, T, D].
        """
        raw = self._raw[layer]
        for side, values in enumerate((k, v)):
            rounded = values.detach().to(self.tensor.dtype).contiguous()
            raw[slots, side, offset] = rounded.view(_RAW[rounded.dtype]).numpy()

    def load(self, layer: int, slots: np.ndarray, memory: Tensor, rows: np.ndarray) -> None:
        """Copy leaves out of a mapped memory [n_rows, 2, P, D] into slots."""
        self.layers[layer][torch.from_numpy(slots)] = memory[torch.from_numpy(rows)]

    def checksum(self, layer: int, slot: int) -> int:
        return xxhash.xxh3_64_intdigest(self._bytes[layer, slot])

    def page_bytes(self, slots: np.ndarray) -> np.ndarray:
        """Bytes of one page from its slots [n_layers, Hkv]: uint8 [page_nbytes], leaf after leaf."""
        layers = np.arange(self.geometry.n_layers)[:, None]
        return self._bytes[layers, slots].reshape(-1)  # type: ignore[no-any-return]
