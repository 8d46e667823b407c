"""What a page's bytes look like, and their checksums. No header inside: the bytes are the leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from ..core.errors import InvalidInput
from ..core.stage import KV_BLOCK

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Checksums = np.ndarray[Any, np.dtype[np.uint64]]

_ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "float8": 1,
    "int4": 1,
    "int4c": 2,
}
"""Bytes of a stored number, or of what holds two of them; int4c has none of one size."""
_SCALE_BYTES = {"int8": 4, "int4": 4}
"""What a stored key or value has besides its elements."""


@dataclass(frozen=True)
class PageGeometry:
    """Sizes of a page: `page_tokens` tokens of every layer and KV head.

    A leaf is one layer and KV head of a page, [2 (K, V), page_tokens, row], keys unrotated. A row is
    head_dim elements (float8 is e4m3); int8 rows end with the bytes of a float32 scale, and so do int4
    rows, which hold the first half of a head in low and the second in high bits of bytes. int4c pages hold
    keys by blocks of 64 tokens (`kernels/by_channel.py`), which come to as many bytes as its values' rows.
    Leaf index inside a page = layer * n_kv_heads + kv_head.
    """

    n_layers: int
    n_kv_heads: int
    page_tokens: int
    head_dim: int
    kv_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kv_dtype not in _ITEM_BYTES:
            raise InvalidInput(f"kv_dtype {self.kv_dtype!r} is none of {', '.join(_ITEM_BYTES)}")
        for name in ("n_layers", "n_kv_heads", "page_tokens", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise InvalidInput(f"page geometry: {name} must be a positive int, got {value!r}")
        if self.block_tokens > 1 and (self.head_dim % 32 or self.page_tokens % self.block_tokens):
            raise InvalidInput(
                f"kv_dtype {self.kv_dtype} needs heads of a multiple of 32 elements and pages of a multiple "
                f"of {self.block_tokens} tokens; got {self.head_dim} and {self.page_tokens}"
            )

    @property
    def block_tokens(self) -> int:
        """Tokens that are rounded together."""
        return KV_BLOCK if self.kv_dtype == "int4c" else 1

    @property
    def open_nbytes(self) -> int:
        """Bytes of a row's block that is not full yet: float32, of all layers."""
        rows = 2 * self.block_tokens * self.n_leaves
        return 4 * rows * self.head_dim if self.block_tokens > 1 else 0

    @property
    def row_nbytes(self) -> int:
        """Bytes of one stored key or value."""
        if self.kv_dtype == "int4c":
            return self.head_dim // 2 + self.head_dim // 16
        scale = _SCALE_BYTES.get(self.kv_dtype, 0)
        n_items = self.head_dim // 2 if self.kv_dtype == "int4" else self.head_dim
        return n_items * _ITEM_BYTES[self.kv_dtype] + scale

    @property
    def row_items(self) -> int:
        """Elements of the KV dtype in a row."""
        return self.row_nbytes // _ITEM_BYTES[self.kv_dtype]

    @property
    def leaf_nbytes(self) -> int:
        return 2 * self.page_tokens * self.row_nbytes

    @property
    def n_leaves(self) -> int:
        return self.n_layers * self.n_kv_heads

    @property
    def page_nbytes(self) -> int:
        return self.n_leaves * self.leaf_nbytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PageGeometry:
        """Raises InvalidInput on missing, unknown or wrong values."""
        try:
            return cls(**values)
        except TypeError as exc:
            raise InvalidInput(f"page geometry {values!r}: {exc}") from exc


def page_checksums(page_bytes: Bytes, geometry: PageGeometry) -> Checksums:
    """xxh3_64 of every leaf. page_bytes: uint8 [page_nbytes], contiguous. Returns uint64 [n_leaves].

    Raises InvalidInput if the page has another size.
    """
    if page_bytes.nbytes != geometry.page_nbytes:
        raise InvalidInput(
            f"a page of this model has {geometry.page_nbytes} bytes, got {page_bytes.nbytes}"
        )
    leaves = page_bytes.reshape(geometry.n_leaves, geometry.leaf_nbytes)
    # one C call per leaf, at memory speed (13 GB/s measured): nothing here runs per token
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(leaf.data) for leaf in leaves), np.uint64, geometry.n_leaves
    )


def has_checksums(page_bytes: Bytes, geometry: PageGeometry, checksums: Checksums) -> bool:
    """Whether every leaf has its checksum. Raises as page_checksums does."""
    return bool(np.array_equal(page_checksums(page_bytes, geometry), checksums))


def checksums_to_wire(checksums: Checksums) -> bytes:
    return checksums.astype("<u8", copy=False).tobytes()


def checksums_from_wire(data: Any, geometry: PageGeometry) -> Checksums:
    """Raises InvalidInput unless data is little-endian uint64 [n_leaves]."""
    if not isinstance(data, bytes) or len(data) != 8 * geometry.n_leaves:
        raise InvalidInput(f"checksums must be {8 * geometry.n_leaves} bytes")
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)
