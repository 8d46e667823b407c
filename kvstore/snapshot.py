"""What a snapshot of a context's pages looks like, and whether one fits here. Pure: no files.

A snapshot is a directory:

    manifest.json     what is in it and what made it; written last, so without it there is no snapshot
    tokens.bin        uint32 [n_tokens], little-endian: the tokens that name the pages
    checksums.bin     uint64 [n_pages, n_leaves], little-endian: xxh3_64 of every leaf
    pages-00000.bin   whole pages in order, at most 64 MiB (or one page); pages-00001.bin and so on
    document          the text, UTF-8, unless it was left out

Page keys are not in it: they are computed from the tokens and the recipe, and the last one, which
depends on all others, is compared with the manifest's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.errors import DataLoss, FailedPrecondition
from ..core.page_key import PageKey, Recipe, RecipeFingerprint, page_keys
from .page import Bytes, Checksums, PageGeometry, page_checksums

FORMAT = "longreach-snapshot"
FORMAT_VERSION = 1
PART_BYTES = 64 << 20
"""Longest file of pages, unless a single page is longer."""
MANIFEST, TOKENS, CHECKSUMS, DOCUMENT = "manifest.json", "tokens.bin", "checksums.bin", "document"

_MEANINGS = {
    "model_fingerprint": "another model",
    "tokenizer_fingerprint": "another tokenizer or chat template",
    "kv_dtype": "another KV format",
    "page_tokens": "another page size",
    "attention_fingerprint": "other layer policies",
    "rope_fingerprint": "other rotary positions",
    "device_class": "another kind of device",
    "kernel_revision": "another revision of the kernels",
    "tenant": "another tenant",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Part):
    """One file of the snapshot."""

    name: str = Field(pattern=r"^[a-z0-9-]+(\.[a-z]+)?$")
    n_bytes: int = Field(ge=0)
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")
    """xxh3_128 of its bytes, in hex."""


class PagesEntry(FileEntry):
    """A file of whole pages."""

    n_pages: int = Field(gt=0)


class Manifest(_Part):
    """What is in a snapshot."""

    format: Literal["longreach-snapshot"]
    format_version: int
    longreach: str
    """Version that wrote it."""
    created: str
    """UTC, ISO 8601."""
    model: str
    """`model.name` where it was written, for people."""
    recipe: dict[str, str | int]
    """Every field of the recipe by name."""
    fingerprint: str
    """Of the recipe, in hex."""
    geometry: dict[str, str | int]
    n_tokens: int = Field(gt=0)
    n_pages: int = Field(gt=0)
    last_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    context_id: str
    tokens: FileEntry
    checksums: FileEntry
    document: FileEntry | None
    parts: tuple[PagesEntry, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        sizes = PageGeometry.from_dict(dict(self.geometry))
        expected = {
            "n_tokens": (self.n_tokens, self.n_pages * sizes.page_tokens),
            "pages of all parts": (sum(part.n_pages for part in self.parts), self.n_pages),
            "bytes of tokens": (self.tokens.n_bytes, 4 * self.n_tokens),
            "bytes of checksums": (self.checksums.n_bytes, 8 * self.n_pages * sizes.n_leaves),
        }
        for part in self.parts:
            expected[f"bytes of {part.name}"] = (part.n_bytes, part.n_pages * sizes.page_nbytes)
        for what, (given, right) in expected.items():
            if given != right:
                raise ValueError(f"{what}: {given} instead of {right}")
        return self

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files but the manifest."""
        document = () if self.document is None else (self.document,)
        return (self.tokens, self.checksums, *document, *self.parts)

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


def pages_per_part(geometry: PageGeometry, part_bytes: int = PART_BYTES) -> int:
    return max(1, part_bytes // geometry.page_nbytes)


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. They end with their own checksum, so that no byte of it can change
    without notice."""
    return _sealed(manifest.model_dump(mode="json"))


def decode(data: bytes, source: str) -> Manifest:
    """Raises DataLoss if the bytes are not as they were written, FailedPrecondition if they are of
    another format version. source: named in errors."""
    try:
        tree = json.loads(data)
        digest = tree.pop("xxh3")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DataLoss(f"{source}/{MANIFEST} is damaged: {type(exc).__name__}: {exc}") from exc
    if _sealed(tree) != data:
        raise DataLoss(
            f"{source}/{MANIFEST} is damaged: its bytes do not have the checksum {digest!r:.40}"
        )
    if tree.get("format") != FORMAT or tree.get("format_version") != FORMAT_VERSION:
        raise FailedPrecondition(
            f"{source} is of format {tree.get('format')!r} version {tree.get('format_version')!r}; "
            f"this release reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise DataLoss(f"{source}/{MANIFEST}: {where}: {first['msg']}") from exc


def _sealed(tree: Mapping[str, Any]) -> bytes:
    plain = json.dumps(tree, indent=1, sort_keys=True).encode()
    digest = xxhash.xxh3_128_hexdigest(plain)
    return json.dumps({**tree, "xxh3": digest}, indent=1, sort_keys=True).encode() + b"\n"


def check_fits(manifest: Manifest, recipe: Recipe, model: str, source: str) -> None:
    """Raises FailedPrecondition naming the first field of the recipe that differs, with both values:
    pages of another recipe hold other bytes. model: the name of the model here."""
    here = recipe.model_dump()
    for field in [*here, *(name for name in manifest.recipe if name not in here)]:
        there, ours = manifest.recipe.get(field), here.get(field)
        if there == ours:
            continue
        meaning = _MEANINGS.get(field, "another recipe")
        if field == "model_fingerprint":
            meaning += f" ({manifest.model} there, {model} here)"
        raise FailedPrecondition(
            f"{source} is of {meaning}: {field} is {_short(there)} in the snapshot and {_short(ours)} here; "
            "restore it on a cluster with the configuration that wrote it",
            field=field,
            snapshot=str(there),
            here=str(ours),
        )
    if manifest.fingerprint != recipe.fingerprint().hex():
        raise FailedPrecondition(
            f"{source} names its recipe {manifest.fingerprint[:16]}, its fields give "
            f"{recipe.fingerprint().hex()[:16]}: another release wrote it",
            field="fingerprint",
        )


def _short(value: Any) -> str:
    """A fingerprint is told by its beginning; `details` hold all of it."""
    return f"{value[:16]!r}…" if isinstance(value, str) and len(value) > 20 else repr(value)


def check_geometry(manifest: Manifest, geometry: PageGeometry, source: str) -> None:
    """Raises FailedPrecondition if pages of the snapshot have other sizes than those here."""
    if manifest.geometry != geometry.to_dict():
        raise FailedPrecondition(
            f"{source} has pages of {manifest.geometry}, this cluster's are {geometry.to_dict()}"
        )


def keys_of(
    manifest: Manifest, token_ids: np.ndarray, fingerprint: RecipeFingerprint, source: str
) -> list[PageKey]:
    """Names of the pages, computed. Raises DataLoss if the tokens do not give the last one."""
    keys = page_keys(token_ids, fingerprint, PageGeometry.from_dict(manifest.geometry).page_tokens)
    if len(keys) != manifest.n_pages or keys[-1].hex() != manifest.last_key:
        raise DataLoss(
            f"{source}: the tokens of {manifest.tokens.name} do not give the key "
            f"{manifest.last_key[:16]} of page {manifest.n_pages - 1}"
        )
    return keys


def bad_leaf(page: Bytes, checksums: Checksums, geometry: PageGeometry) -> int | None:
    """Index of the first leaf that is not as it was written. checksums: uint64 [n_leaves]."""
    bad = np.flatnonzero(page_checksums(page, geometry) != checksums)
    return int(bad[0]) if len(bad) else None
