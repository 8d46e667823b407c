"""K and V of one layer of one row, read where they lie: the device bank or mapped arenas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import InternalError
from . import by_channel

Which = Literal["k", "v"]
SCALE_BYTES = 4
TORCH_DTYPE = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "int4": torch.uint8,
    "int4c": by_channel.DTYPE,
}
"""Of memory in each format of `cache.kv_dtype`; uint8 and uint16 only mark it."""
RAW = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.uint8,
    torch.uint8: torch.uint8,
    by_channel.DTYPE: torch.int16,
}
"""Integers of an element's size: numpy knows no bfloat16."""
MOST_OF = {
    torch.float32: torch.finfo(torch.float32).max,
    torch.float16: 65519.996,
    torch.bfloat16: 3.3961775e38,
    torch.int8: torch.finfo(torch.float32).max,
    torch.float8_e4m3fn: 463.99997,
    torch.uint8: torch.finfo(torch.float32).max,
    by_channel.DTYPE: torch.finfo(torch.float16).max,
}
"""By KV dtype, the largest float32 that rounds to a finite number of it."""


def stored_items(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of the KV dtype in one stored key or value: int8 rows end with the bytes of a float32
    scale, and uint8 ones, which are 4-bit numbers, have half as many bytes before it. For uint16, which is
    int4c, see `by_channel`."""
    if dtype == by_channel.DTYPE:
        return by_channel.row_nbytes(head_dim) // dtype.itemsize
    if dtype == torch.uint8:
        return head_dim // 2 + SCALE_BYTES
    return head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)


def head_dim_of(n_items: int, dtype: torch.dtype) -> int:
    """The inverse of `stored_items`."""
    if dtype == by_channel.DTYPE:
        return by_channel.head_dim_of(n_items * dtype.itemsize)
    if dtype == torch.uint8:
        return 2 * (n_items - SCALE_BYTES)
    return n_items - (SCALE_BYTES if dtype == torch.int8 else 0)


def pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [..., D] float32 as they are stored, [..., stored_items], rounded to nearest even.

    NaN and infinities stay visible: in the number, or in the scale of formats that have one.
    """
    if dtype == torch.int8:
        whole, scale = _whole(x, 127)
        return torch.cat((whole.to(torch.int8), scale.view(torch.int8)), dim=-1)
    if dtype == torch.uint8:
        whole, scale = _whole(x, 7)
        # halves share bytes as RoPE pairs them: both partners of a pair are in one byte
        low, high = (whole + 8).to(torch.uint8).chunk(2, dim=-1)
        return torch.cat((low | (high << 4), scale.view(torch.uint8)), dim=-1)
    return x.to(dtype)


def _whole(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-most, most], as float32, and the row's scale."""
    scale = x.abs().amax(dim=-1, keepdim=True) / most
    whole = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-most, most)
    return whole.nan_to_num(0.0), scale


def unpack(stored: Tensor) -> Tensor:
    """Rows of `pack` -> float32 [..., D]."""
    if stored.dtype not in (torch.int8, torch.uint8):
        return stored.float()
    whole, scale = stored[..., :-SCALE_BYTES], stored[..., -SCALE_BYTES:]
    if stored.dtype == torch.uint8:
        whole = torch.cat((whole & 15, whole >> 4), dim=-1).float() - 8.0
    return whole.float() * scale.contiguous().view(torch.float32)


@dataclass(frozen=True)
class OpenBlock:
    """Tokens of a row's latest block of 64, which is not rounded yet, or not for those that read it here."""

    kv: Tensor
    """float32 [2 (K, V), Hkv, 64, D], contiguous but for a slice of heads."""
    first: int
    """Its first token: this one and later ones are read here, earlier ones in pages."""


def block_start(position: int) -> int:
    """First token of a position's block."""
    return position // by_channel.BLOCK_TOKENS * by_channel.BLOCK_TOKENS


@dataclass(frozen=True)
class PagedKV:
    """Where the pages of one layer lie. Reading never depends on which memory holds a page."""

    memories: tuple[Tensor, ...]
    """Each [n_leaf_rows, 2 (K, V), page_tokens, stored items] in the KV dtype, contiguous; 0 = device
    bank. See `pack`."""
    memory: Tensor
    """int64 [Hkv, n_pages]: index into memories."""
    row: Tensor
    """int64 [Hkv, n_pages]: leaf row inside that memory, -1 = absent."""
    page_tokens: int
    n_tokens: int
    """Valid tokens; later slots of the last page hold garbage, maybe NaN."""
    open: OpenBlock | None = None
    """Of formats that round blocks: the block of the queries that read this view."""

    def until(self, position: int) -> PagedKV:
        """The view of a query at `position`, whose key is the last."""
        block = self.open and replace(self.open, first=block_start(position))
        return replace(self, n_tokens=position + 1, open=block)

    def of_heads(self, heads: slice) -> PagedKV:
        """The view of some KV heads."""
        block = self.open and replace(self.open, kv=self.open.kv[:, heads])
        return replace(self, memory=self.memory[heads], row=self.row[heads], open=block)

    @property
    def n_kv_heads(self) -> int:
        return self.row.shape[0]

    @property
    def head_dim(self) -> int:
        return head_dim_of(self.memories[0].shape[-1], self.kv_dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored key or value."""
        return self.memories[0].shape[-1] * self.memories[0].element_size()

    @property
    def kv_dtype(self) -> torch.dtype:
        return self.memories[0].dtype


def absent_page(view: PagedKV) -> InternalError:
    """The error of reading a page that has no row: residency did not bring it near."""
    return InternalError(
        f"a page that is needed is absent: {int((view.row < 0).sum())} of {view.row.numel()} "
        f"leaves have row -1 ({view.n_tokens} tokens); make it resident before the kernel runs"
    )


def gather_tokens(view: PagedKV, token_ids: Tensor, which: Which = "k") -> Tensor:
    """K or V of single tokens, as float32.

    token_ids: int64 [n] (the same for all KV heads) or [Hkv, n]; ids outside [0, n_tokens) give
    zeros, so that padding and garbage slots never leak. Returns [Hkv, n, D].
    Raises InternalError if a page is absent.
    """
    n_kv_heads = view.n_kv_heads
    ids = token_ids.expand(n_kv_heads, -1) if token_ids.dim() == 1 else token_ids
    valid = (ids >= 0) & (ids < view.n_tokens)
    safe = ids.masked_fill(~valid, 0)
    page = safe // view.page_tokens
    slot = safe % view.page_tokens
    if page.numel() == 0 or not view.row.shape[1]:
        return torch.zeros(*ids.shape, view.head_dim)
    out = torch.zeros(*ids.shape, view.head_dim)
    side = 0 if which == "k" else 1
    if view.open is not None:
        at = safe - view.open.first
        here = valid & (at >= 0)
        head = torch.arange(n_kv_heads)[:, None].expand_as(at)
        out[here] = view.open.kv[side, head[here], at[here]]
        valid &= at < 0
    row = view.row.gather(1, page)
    if bool((row[valid] < 0).any()):
        raise absent_page(view)
    memory = view.memory.gather(1, page)
    for i, leaves in enumerate(view.memories):
        here = valid & (memory == i)
        if bool(here.any()):
            out[here] = _rows(leaves, side, row[here], slot[here])
    return out


def _rows(leaves: Tensor, side: int, row: Tensor, slot: Tensor) -> Tensor:
    if leaves.dtype != by_channel.DTYPE:
        return unpack(leaves[row, side, slot])
    gather = by_channel.gather_values if side else by_channel.gather_keys
    return gather(leaves, row, slot)


def gather_blocks(view: PagedKV, starts: Tensor, block_tokens: int, which: Which = "k") -> Tensor:
    """K or V of runs of block_tokens tokens. starts: int64 [n] or [Hkv, n], -1 = padding.

    Returns [Hkv, n * block_tokens, D] float32; padding and tokens beyond n_tokens are zeros.
    """
    return gather_tokens(view, block_token_ids(starts, block_tokens), which)


def block_token_ids(starts: Tensor, block_tokens: int) -> Tensor:
    """Token ids of blocks: [..., n] -> [..., n * block_tokens]; a start of -1 gives ids of -1."""
    ids = starts[..., None] + torch.arange(block_tokens)
    return ids.masked_fill(starts[..., None] < 0, -1).flatten(-2)
