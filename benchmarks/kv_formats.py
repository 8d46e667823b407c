"""How keys and values may be rounded: the formats of `cache.kv_dtype`, and layouts that no kernel reads yet.

Every function takes keys or values [..., T, D] float32 and gives them back as a reader would find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from longreach.core.config import KvDtype
from longreach.kernels.paged import pack, unpack
from longreach.workers.bank import TORCH_DTYPE

Rounding = Callable[[Tensor], Tensor]

BLOCK_TOKENS = 64
"""Tokens whose keys share a scale and an offset per channel."""
GROUP = 32
"""Elements of a value that share a scale."""
SCALE_BYTES = 2


@dataclass(frozen=True)
class Format:
    """bytes_per_token: of one key and one value. built: a name of `cache.kv_dtype`, which engine and kernels
    read; the others are measured to know whether building them is worth while."""

    name: str
    keys: Rounding
    values: Rounding
    bytes_per_token: float
    built: bool


def stored(dtype: torch.dtype) -> Rounding:
    """As a page stores rows, one by one."""
    return lambda x: unpack(pack(x, dtype))


def row_bytes(name: str, head_dim: int) -> int:
    packed = pack(torch.zeros(1, head_dim), TORCH_DTYPE[name])
    return packed.shape[1] * packed.element_size()


def per_channel(x: Tensor) -> Tensor:
    """4 bits, with a scale and an offset (float16) per channel of 64 tokens; what does not fill a block is
    left as it is, as a block that has not been sealed."""
    n_whole = x.shape[-2] // BLOCK_TOKENS * BLOCK_TOKENS
    blocks = x[..., :n_whole, :].unflatten(-2, (-1, BLOCK_TOKENS))
    low, high = blocks.amin(dim=-2, keepdim=True).half().float(), blocks.amax(dim=-2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-7).half().float()
    whole = ((blocks - low) / scale).round().clamp(0, 15)
    return torch.cat(((whole * scale + low).flatten(-3, -2), x[..., n_whole:, :]), dim=-2)


def grouped(x: Tensor) -> Tensor:
    """4 bits, with a scale (float16) per 32 elements of a row."""
    groups = x.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7).clamp(min=1e-7).half().float()
    return ((groups / scale).round().clamp(-7, 7) * scale).flatten(-2)


def formats(head_dim: int) -> list[Format]:
    """float32 first."""
    made = [
        Format(name, rounding, rounding, 2 * row_bytes(name, head_dim), True)
        for name in get_args(KvDtype)
        for rounding in [stored(TORCH_DTYPE[name])]
    ]
    int8, int4 = stored(torch.int8), stored(torch.uint8)
    half = head_dim // 2
    key_bytes = half + 2 * SCALE_BYTES * head_dim / BLOCK_TOKENS
    value_bytes = half + SCALE_BYTES * head_dim // GROUP
    mixed_bytes = row_bytes("int8", head_dim) + row_bytes("int4", head_dim)
    return [
        *made,
        Format("int8 keys, int4 values", int8, int4, mixed_bytes, False),
        Format("int4, keys by channel", per_channel, grouped, key_bytes + value_bytes, False),
    ]
