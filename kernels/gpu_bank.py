"""The device bank of page leaves and all that its kernels know of it: plain tensors, on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceBank:
    """Leaf slots of H = layers * KV heads banks, one after the other; `layer` is the part of one layer.

    A page's leaf of bank h lies in `memory[h, slot]` if slot_of[h, page] >= 0, else in host memory at
    host_address[page] + (first_leaf + h) * leaf_bytes.
    """

    memory: Tensor
    """uint8 [H, n_slots, leaf_bytes]"""
    owner: Tensor
    """int32 [H, n_slots]: page id, -1 = free."""
    referenced: Tensor
    """int32 [H, n_slots]: 1 = read since the hand was here."""
    pinned: Tensor
    """int32 [H, n_slots]: 1 = the only copy is here."""
    hand: Tensor
    """int32 [H]"""
    slot_of: Tensor
    """int32 [H, n_page_ids]: -1 = not in the bank."""
    address: Tensor
    """int64 [H, n_page_ids]: where kernels read the leaf, see `DevicePages.address`."""
    host_address: Tensor
    """int64 [n_page_ids]: address of a page's first leaf in pinned host memory as the device sees it; 0 = it
    has no place there, and is never promoted."""
    promote_page: Tensor
    """int32 [H, most]: what the last update promotes, and into which slots."""
    promote_slot: Tensor
    n_promote: Tensor
    """int32 [H]"""
    n_hits: Tensor
    """int64 [H]: distinct pages that updates found in the bank, since the start."""
    n_misses: Tensor
    """int64 [H]: distinct pages that updates found to be read from host memory."""
    wanted: Tensor
    """int32 [KV heads, n_page_ids]: tick of the update that last wanted the page; the layers share it, one
    after the other on one stream."""
    tick: Tensor
    """int32 [KV heads]"""
    first_leaf: int = 0
    """Index inside a page of the leaf of bank 0."""

    @property
    def n_banks(self) -> int:
        """H."""
        return self.owner.shape[0]

    @property
    def n_slots(self) -> int:
        return self.owner.shape[1]

    @property
    def n_page_ids(self) -> int:
        return self.slot_of.shape[1]

    @property
    def leaf_bytes(self) -> int:
        return self.memory.shape[2]

    @classmethod
    def empty(cls, memory: Tensor, n_kv_heads: int, n_page_ids: int, most: int) -> DeviceBank:
        """Of uint8 memory [layers * n_kv_heads, n_slots, leaf_bytes], contiguous, on the device.

        most: pages that one update promotes in a KV head at most. Raises ValueError for a leaf that is no
        multiple of 16 bytes.
        """
        n_banks, n_slots, leaf_bytes = memory.shape
        if leaf_bytes % 16 or memory.data_ptr() % 16 or not memory.is_contiguous():
            raise ValueError(f"leaves of {leaf_bytes} bytes must be whole vectors of 16 bytes")

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=memory.device)

        return cls(
            memory=memory,
            owner=full(-1, n_banks, n_slots),
            referenced=full(0, n_banks, n_slots),
            pinned=full(0, n_banks, n_slots),
            hand=full(0, n_banks),
            slot_of=full(-1, n_banks, n_page_ids),
            address=full(0, n_banks, n_page_ids, dtype=torch.int64),
            host_address=full(0, n_page_ids, dtype=torch.int64),
            promote_page=full(0, n_banks, most),
            promote_slot=full(0, n_banks, most),
            n_promote=full(0, n_banks),
            n_hits=full(0, n_banks, dtype=torch.int64),
            n_misses=full(0, n_banks, dtype=torch.int64),
            wanted=full(0, n_kv_heads, n_page_ids),
            tick=full(0, n_kv_heads),
        )

    def layer(self, index: int) -> DeviceBank:
        """The banks of one layer: views of the same memory."""
        n = self.tick.shape[0]
        mine = slice(index * n, (index + 1) * n)
        by_bank = (
            "memory owner referenced pinned hand slot_of address promote_page promote_slot n_promote "
            "n_hits n_misses"
        )
        views = {name: getattr(self, name)[mine] for name in by_bank.split()}
        return replace(self, **views, first_leaf=self.first_leaf + index * n)
