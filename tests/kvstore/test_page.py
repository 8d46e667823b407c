"""Page sizes, leaf order and checksums."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from longreach.core.errors import InvalidInput
from longreach.kvstore.page import (
    PageGeometry,
    checksums_from_wire,
    checksums_to_wire,
    page_checksums,
)

SMOL = PageGeometry(30, 3, 64, 64, "float32")


def test_sizes() -> None:
    assert SMOL.leaf_nbytes == 2 * 64 * 64 * 4
    assert SMOL.n_leaves == 90
    assert SMOL.page_nbytes == 2_949_120
    assert PageGeometry(30, 3, 64, 64, "bfloat16").page_nbytes == SMOL.page_nbytes // 2
    by_channel = PageGeometry(30, 3, 64, 64, "int4c")
    assert by_channel.leaf_nbytes == 64 * (2 * 32 + 2 * 4)
    assert by_channel.row_items * 2 == by_channel.row_nbytes == 36
    assert (by_channel.open_nbytes, SMOL.open_nbytes) == (SMOL.page_nbytes, 0)


def test_dict_round_trip_and_refusals() -> None:
    assert PageGeometry.from_dict(SMOL.to_dict()) == SMOL
    for wrong in ({}, {**SMOL.to_dict(), "x": 1}, {**SMOL.to_dict(), "n_layers": 0}):
        with pytest.raises(InvalidInput):
            PageGeometry.from_dict(wrong)
    with pytest.raises(InvalidInput, match="int3"):
        PageGeometry(1, 1, 8, 8, "int3")
    for page_tokens, head_dim in ((32, 64), (96, 64), (64, 80)):
        with pytest.raises(InvalidInput, match=f"got {head_dim} and {page_tokens}"):
            PageGeometry(1, 1, page_tokens, head_dim, "int4c")


def test_every_leaf_has_its_own_checksum() -> None:
    geometry = PageGeometry(2, 3, 8, 16, "float16")
    page = np.random.default_rng(0).integers(0, 256, geometry.page_nbytes, np.uint8)
    before = page_checksums(page, geometry)
    assert before.dtype == np.uint64
    assert before.tolist() == [
        xxhash.xxh3_64_intdigest(page[i : i + geometry.leaf_nbytes].tobytes())
        for i in range(0, len(page), geometry.leaf_nbytes)
    ]
    leaf = 1 * geometry.n_kv_heads + 2  # layer 1, KV head 2
    for at in (0, geometry.leaf_nbytes - 1):
        page[leaf * geometry.leaf_nbytes + at] ^= 1
        changed = np.flatnonzero(page_checksums(page, geometry) != before)
        assert changed.tolist() == [leaf]
        page[leaf * geometry.leaf_nbytes + at] ^= 1


def test_checksums_on_the_wire() -> None:
    geometry = PageGeometry(2, 1, 8, 16)
    sums = np.array([2**64 - 1, 1], np.uint64)
    assert np.array_equal(checksums_from_wire(checksums_to_wire(sums), geometry), sums)
    for wrong in (b"", b"1234567", "12345678" * 2, None):
        with pytest.raises(InvalidInput):
            checksums_from_wire(wrong, geometry)
    with pytest.raises(InvalidInput):
        page_checksums(np.zeros(3, np.uint8), geometry)
