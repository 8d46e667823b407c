"""Pages in the memory of a worker whose kernels run on the CPU: one bank and one residency per layer."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..core.errors import BankTooSmall
from ..kernels.ops import TORCH_DTYPE, block_start, first_not_finite
from ..kvstore.page import Bytes, PageGeometry
from ..kvstore.page_client import PageClient
from .bank import Bank
from .local_pages import LocalPages
from .open_blocks import OpenBlocks
from .page_errors import not_finite
from .page_reader import PageReader
from .residency import Residency
from .row import Row


class CpuMemory:
    """A `PageMemory`: leaves of all pages share a bank per layer, least recently used ones leave first."""

    def __init__(
        self, geometry: PageGeometry, device_pages: int, client: PageClient | None
    ) -> None:
        self.geometry = geometry
        self.pages = LocalPages()
        self.bank = Bank(geometry, device_pages)
        self.residency = [Residency(self.bank.n_slots) for _ in range(geometry.n_layers)]
        self._open = OpenBlocks(geometry) if geometry.block_tokens > 1 else None
        self.reader = PageReader(
            geometry, self.bank, self.pages, self.residency, client, self._open
        )
        self._heads = np.arange(geometry.n_kv_heads, dtype=np.int64)

    @property
    def n_slots(self) -> int:
        return self.bank.n_slots * self.geometry.n_layers

    @property
    def n_used(self) -> int:
        return sum(residency.n_resident for residency in self.residency)

    def place(self, page_id: int) -> None:
        leaves = self._leaves(np.array([page_id]))
        try:
            for residency in self.residency:
                residency.place(leaves)
        except BankTooSmall:
            for residency in self.residency:
                residency.forget(leaves)
            raise

    def may_pin(self) -> bool:
        return all(r.may_pin(self.geometry.n_kv_heads) for r in self.residency)

    def adopt(self, page_id: int) -> None:
        pass  # read through its home when it is needed, and checked then

    def mark_safe(self, page_id: int) -> None:
        leaves = self._leaves(np.array([page_id]))
        for residency in self.residency:
            residency.mark_safe(leaves)

    def forget(self, page_ids: np.ndarray) -> None:
        leaves = self._leaves(page_ids)
        for residency in self.residency:
            residency.forget(leaves)

    def page_bytes(self, page_id: int) -> Bytes:
        leaves = self._leaves(np.array([page_id]))
        return self.bank.page_bytes(np.stack([r.slots_of(leaves) for r in self.residency]))

    def pages_of_row(self, row: Row) -> int:
        leaves = self._leaves(row.page_ids.array)
        resident = [int((r.slots_of(leaves) >= 0).sum()) for r in self.residency]
        return max(resident, default=0) // self.geometry.n_kv_heads

    def close(self, row: Row) -> None:
        self.reader.close(row)
        if self._open is not None:
            self._open.close(row)

    def append(self, layer: int, row: Row, start: int, k: Tensor, v: Tensor) -> None:
        """Write K and V of tokens start … (k, v [Hkv, T, D]) into the bank.

        Tokens of pages that existed already are skipped: stored KV is never overwritten. A format that rounds
        blocks gets those that are full now; the last one is open to readers as it was appended. Raises
        NumericalError naming layer and position if a number is not finite in the KV format.
        """
        page_tokens = self.geometry.page_tokens
        skip = max(0, row.n_existing_pages * page_tokens - start)
        n_tokens = k.shape[1]
        self.show(layer, row, start, k, v, start + n_tokens - 1)
        if skip >= n_tokens:
            return
        if self._open is not None:
            self._seal(layer, row, start, k, v, skip)
            return
        positions = np.arange(start + skip, start + n_tokens)
        pages = row.page_ids.array[positions // page_tokens]
        leaves = pages[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        slots = self.residency[layer].slots_of(leaves)
        wrong = self.bank.write(layer, slots, positions % page_tokens, k[:, skip:], v[:, skip:])
        if wrong >= 0:
            raise not_finite(row, layer, int(positions[wrong]), self.geometry)

    def show(self, layer: int, row: Row, start: int, k: Tensor, v: Tensor, position: int) -> None:
        """Queries of the block of `position` are next: they see its tokens, of start … (k, v), as they were
        appended. Nothing to do in formats that round token by token."""
        if self._open is not None:
            self._open.show(layer, row, start, k, v, position)

    def _seal(self, layer: int, row: Row, start: int, k: Tensor, v: Tensor, skip: int) -> None:
        assert self._open is not None
        block_tokens, page_tokens = self.geometry.block_tokens, self.geometry.page_tokens
        wrong = first_not_finite(k[:, skip:], v[:, skip:], TORCH_DTYPE[self.geometry.kv_dtype])
        if wrong >= 0:
            raise not_finite(row, layer, start + skip + wrong, self.geometry)
        first, last = block_start(start + skip), block_start(start + k.shape[1])
        if first == last:
            return
        if start > first:  # decode: the block's other tokens came before
            k, v = self._open.of(layer, row).unbind(0)
            start = first
        blocks = np.arange(first, last, block_tokens)
        pages = row.page_ids.array[blocks // page_tokens]
        leaves = pages[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        slots = self.residency[layer].slots_of(leaves)
        part = slice(first - start, last - start)
        at = blocks % page_tokens // block_tokens
        self.bank.seal(layer, slots, at, k[:, part], v[:, part])

    def _leaves(self, page_ids: np.ndarray) -> np.ndarray:
        """Leaf numbers of pages, all KV heads: [n * Hkv]."""
        return (page_ids[:, None] * self.geometry.n_kv_heads + self._heads).reshape(-1)
