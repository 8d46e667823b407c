"""Bookmark keys as pages of the store: those of consecutive pages together, under a name of their own (pure).

A group is as many pages as have keys that fit one page's bytes. Its name follows from the prompt and the
weights alone, so whoever has both finds it; other weights or other layers give other names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..core.page_key import PageKey
from ..kvstore.page import Bytes, PageGeometry

TAG = b"bookmark keys 1"
"""Raised with the layout."""
_KEY = np.dtype("<f4")


@dataclass(frozen=True)
class BookmarkGroups:
    """Keys of these layers in a store of this geometry. fingerprint: of the bookmarks' weights."""

    geometry: PageGeometry
    layers: tuple[int, ...]
    fingerprint: bytes

    @property
    def key_nbytes(self) -> int:
        """Keys of one page, all layers."""
        sizes = self.geometry
        return len(self.layers) * sizes.n_kv_heads * sizes.head_dim * _KEY.itemsize

    @property
    def n_pages(self) -> int:
        """Pages of a group: about `page_tokens` of them in 16 bit, a quarter of it in 4."""
        return self.geometry.page_nbytes // self.key_nbytes

    def ended_by(self, pages: range) -> range:
        """Numbers of the groups whose last page is one of these."""
        return range(pages.start // self.n_pages, pages.stop // self.n_pages)

    def pages_of(self, group: int) -> range:
        return range(group * self.n_pages, (group + 1) * self.n_pages)

    def name(self, last_key: PageKey) -> PageKey:
        """Of the group whose last page has this name, which stands for all pages before it too."""
        digest = hashlib.sha256(TAG)
        digest.update(last_key)
        digest.update(repr(self.layers).encode())
        digest.update(self.fingerprint)
        return PageKey(digest.digest())

    def pack(self, keys: np.ndarray) -> Bytes:
        """keys float32 [L, n_pages, Hkv, D] -> uint8 [page_nbytes], padded with zeros."""
        page = np.zeros(self.geometry.page_nbytes, dtype=np.uint8)
        data = np.ascontiguousarray(keys, dtype=_KEY).reshape(-1).view(np.uint8)
        page[: len(data)] = data
        return page

    def unpack(self, page: Bytes) -> np.ndarray:
        """What `pack` was given: a view."""
        sizes, n_bytes = self.geometry, self.n_pages * self.key_nbytes
        shape = (len(self.layers), self.n_pages, sizes.n_kv_heads, sizes.head_dim)
        return page[:n_bytes].view(_KEY).reshape(shape)
