"""The format alone: what a manifest says, what does not fit, and that no byte changes without notice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.core.errors import DataLoss, FailedPrecondition
from longreach.core.page_key import Recipe, page_keys
from longreach.kvstore.page import page_checksums
from longreach.kvstore.snapshot import (
    FORMAT,
    FileEntry,
    Manifest,
    PagesEntry,
    bad_leaf,
    check_fits,
    check_geometry,
    decode,
    encode,
    keys_of,
    pages_per_part,
)

from .kv_helpers import GEOMETRY, page_of

N_PAGES = 3
TOKENS = np.arange(N_PAGES * GEOMETRY.page_tokens, dtype=np.uint32)
RECIPE = Recipe(
    model_fingerprint="m" * 8,
    tokenizer_fingerprint="t" * 8,
    kv_dtype=GEOMETRY.kv_dtype,
    n_layers=GEOMETRY.n_layers,
    n_kv_heads=GEOMETRY.n_kv_heads,
    head_dim=GEOMETRY.head_dim,
    page_tokens=GEOMETRY.page_tokens,
    attention_fingerprint="a" * 8,
    rope_fingerprint="r" * 8,
)


def manifest(**changed: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format": FORMAT,
        "format_version": 1,
        "longreach": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "model": "tiny",
        "recipe": RECIPE.model_dump(),
        "fingerprint": RECIPE.fingerprint().hex(),
        "geometry": GEOMETRY.to_dict(),
        "n_tokens": len(TOKENS),
        "n_pages": N_PAGES,
        "last_key": page_keys(TOKENS, RECIPE.fingerprint(), GEOMETRY.page_tokens)[-1].hex(),
        "context_id": "ctx-1",
        "tokens": entry("tokens.bin", 4 * len(TOKENS)),
        "checksums": entry("checksums.bin", 8 * N_PAGES * GEOMETRY.n_leaves),
        "document": None,
        "parts": (pages("pages-00000.bin", 2), pages("pages-00001.bin", 1)),
    }
    return Manifest(**{**fields, **changed})


def entry(name: str, n_bytes: int) -> FileEntry:
    return FileEntry(name=name, n_bytes=n_bytes, xxh3="0" * 32)


def pages(name: str, n_pages: int) -> PagesEntry:
    n_bytes = n_pages * GEOMETRY.page_nbytes
    return PagesEntry(name=name, n_bytes=n_bytes, xxh3="0" * 32, n_pages=n_pages)


def test_a_manifest_comes_back_as_it_was() -> None:
    made = manifest()
    assert decode(encode(made), "here") == made
    assert made.n_bytes == sum(file.n_bytes for file in made.files)
    assert len(made.files) == 4


@given(st.data())
def test_no_byte_of_a_manifest_changes_without_notice(data: st.DataObject) -> None:
    good = bytearray(encode(manifest()))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((DataLoss, FailedPrecondition), match="here"):
        decode(bytes(good), "here")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_manifest_cut_short_is_damaged(keep: int) -> None:
    with pytest.raises(DataLoss, match="damaged"):
        decode(encode(manifest())[:keep], "here")


@pytest.mark.parametrize("data", [b"[]", b"null", b"{}", b"\xff", b'{"xxh3": 3}'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(DataLoss, match=r"manifest\.json is damaged"):
        decode(data, "here")


def test_another_format_version_is_named_whatever_else_it_holds() -> None:
    later = manifest(format_version=2)
    with pytest.raises(FailedPrecondition, match=r"version 2; this release reads .* version 1"):
        decode(encode(later), "here")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"n_pages": 4}, "n_tokens"),
        ({"parts": (pages("pages-00000.bin", 2),)}, "pages of all parts: 2 instead of 3"),
        ({"tokens": entry("tokens.bin", 4)}, "bytes of tokens: 4 instead of 96"),
        ({"checksums": entry("checksums.bin", 7)}, "bytes of checksums"),
    ],
)
def test_sizes_agree_with_each_other(changed: dict[str, Any], named: str) -> None:
    made = manifest().model_copy(update=changed)
    with pytest.raises(DataLoss, match=named):
        decode(encode(made), "here")


def test_no_file_lies_outside_of_the_snapshot() -> None:
    made = manifest().model_copy(
        update={"tokens": entry("t", 96).model_copy(update={"name": "../t"})}
    )
    with pytest.raises(DataLoss, match=r"tokens\.name"):
        decode(encode(made), "here")


DIFFERENT = {
    "model_fingerprint": ("n" * 8, r"another model \(tiny there, large here\)"),
    "tokenizer_fingerprint": ("u" * 8, "another tokenizer"),
    "kv_dtype": ("float32", "another KV format"),
    "page_tokens": (64, "another page size"),
    "attention_fingerprint": ("b" * 8, "other layer policies"),
    "rope_fingerprint": ("s" * 8, "other rotary positions"),
    "device_class": ("cuda", "another kind of device"),
    "kernel_revision": (99, "another revision of the kernels"),
    "tenant": ("other", "another tenant"),
    "head_dim": (128, "another recipe"),
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_the_field_that_differs_is_named_with_both_values(field: str) -> None:
    value, meaning = DIFFERENT[field]
    here = Recipe.model_validate({**RECIPE.model_dump(), field: value})
    with pytest.raises(FailedPrecondition, match=meaning) as caught:
        check_fits(manifest(), here, "large", "here")
    assert caught.value.details["field"] == field
    assert repr(value) in caught.value.message
    assert repr(RECIPE.model_dump()[field]) in caught.value.message


def test_the_first_field_that_differs_is_the_one_named() -> None:
    changed = {"kv_dtype": "float32", "tokenizer_fingerprint": "u", "tenant": "x"}
    here = Recipe.model_validate({**RECIPE.model_dump(), **changed})
    with pytest.raises(FailedPrecondition) as caught:
        check_fits(manifest(), here, "tiny", "here")
    assert caught.value.details["field"] == "tokenizer_fingerprint"


def test_a_field_that_only_one_side_knows_differs() -> None:
    more = manifest(recipe={**RECIPE.model_dump(), "new_field": 1})
    with pytest.raises(FailedPrecondition, match="new_field is 1 in the snapshot and None here"):
        check_fits(more, RECIPE, "tiny", "here")
    forged = manifest(fingerprint="00" * 32)
    with pytest.raises(FailedPrecondition, match="its fields give"):
        check_fits(forged, RECIPE, "tiny", "here")
    check_fits(manifest(), RECIPE, "whatever it is called", "here")


def test_another_geometry_is_refused() -> None:
    check_geometry(manifest(), GEOMETRY, "here")
    other = type(GEOMETRY)(**{**GEOMETRY.to_dict(), "n_layers": 4})
    with pytest.raises(FailedPrecondition, match="n_layers"):
        check_geometry(manifest(), other, "here")


@given(at=st.integers(0, len(TOKENS) - 1), to=st.integers(0, 2**32 - 1))
def test_other_tokens_do_not_give_the_keys(at: int, to: int) -> None:
    fingerprint = RECIPE.fingerprint()
    keys = keys_of(manifest(), TOKENS, fingerprint, "here")
    assert keys == page_keys(TOKENS, fingerprint, GEOMETRY.page_tokens)
    changed = TOKENS.copy()
    changed[at] = to
    if to == TOKENS[at]:
        return
    with pytest.raises(DataLoss, match="do not give the key"):
        keys_of(manifest(), changed, fingerprint, "here")


def test_fewer_tokens_do_not_give_the_keys() -> None:
    with pytest.raises(DataLoss, match="do not give the key"):
        keys_of(manifest(), TOKENS[:-1], RECIPE.fingerprint(), "here")


def test_a_part_has_whole_pages_and_at_least_one() -> None:
    assert pages_per_part(GEOMETRY, 10 * GEOMETRY.page_nbytes + 1) == 10
    assert pages_per_part(GEOMETRY, 1) == 1
    assert pages_per_part(GEOMETRY) * GEOMETRY.page_nbytes <= 64 << 20


@given(st.integers(0, GEOMETRY.page_nbytes - 1), st.integers(1, 255))
def test_a_changed_byte_is_found_in_its_leaf(at: int, by: int) -> None:
    page = page_of(1)
    checksums = page_checksums(page, GEOMETRY)
    assert bad_leaf(page, checksums, GEOMETRY) is None
    page[at] ^= by
    assert bad_leaf(page, checksums, GEOMETRY) == at // GEOMETRY.leaf_nbytes


def test_the_manifest_is_json_for_people() -> None:
    tree = json.loads(encode(manifest()))
    assert tree["recipe"]["kv_dtype"] == "float16"
    assert tree["parts"][0] == {
        "name": "pages-00000.bin",
        "n_bytes": 2 * GEOMETRY.page_nbytes,
        "n_pages": 2,
        "xxh3": "0" * 32,
    }
