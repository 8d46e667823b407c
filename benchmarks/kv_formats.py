"""How keys and values may be rounded: the formats of `cache.kv_dtype`, and layouts that no kernel reads yet.

Every function takes keys or values [..., T, D] float32 and gives them back as a reader finds them, by what
stores and reads pages. Formats that round blocks are a little better than shown: queries see their own block
as it was appended, here only one that is not full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

from torch import Tensor

from longreach.core.kv_format import KvDtype
from longreach.kernels import by_channel
from longreach.kernels.paged import TORCH_DTYPE, pack, stored_items, unpack

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """bytes_per_token: of one key and one value. built: a name of `cache.kv_dtype`, which engine and kernels
    read; the others are measured to know whether building them is worth while."""

    name: str
    keys: Rounding
    values: Rounding
    bytes_per_token: float
    built: bool


def stored(name: str) -> tuple[Rounding, Rounding]:
    """What the engine's pages do to keys and to values in a format of `cache.kv_dtype`."""
    dtype = TORCH_DTYPE[name]
    if dtype == by_channel.DTYPE:
        return partial(by_channel.rounded, keys=True), partial(by_channel.rounded, keys=False)

    def by_row(x: Tensor) -> Tensor:
        return unpack(pack(x, dtype))

    return by_row, by_row


def row_bytes(name: str, head_dim: int) -> int:
    return stored_items(head_dim, TORCH_DTYPE[name]) * TORCH_DTYPE[name].itemsize


def formats(head_dim: int) -> list[Format]:
    """float32 first."""
    made = [
        Format(name, *stored(name), 2 * row_bytes(name, head_dim), True)
        for name in get_args(KvDtype)
    ]
    mixed_bytes = row_bytes("int8", head_dim) + row_bytes("int4", head_dim)
    mixed = stored("int8")[0], stored("int4")[1]
    return [*made, Format("int8 keys, int4 values", *mixed, mixed_bytes, False)]
