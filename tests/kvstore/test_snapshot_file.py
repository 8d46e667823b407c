"""Snapshots as files: written to their end or not at all, and no damage goes unnamed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from longreach.core.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    UnreadableUri,
)
from longreach.core.page_key import page_keys
from longreach.kvstore.page import page_checksums
from longreach.kvstore.snapshot import FORMAT, FORMAT_VERSION, Manifest
from longreach.kvstore.snapshot_file import SnapshotReader, SnapshotWriter

from .kv_helpers import GEOMETRY, page_of
from .test_snapshot import RECIPE

N_PAGES = 5
TOKENS = np.arange(N_PAGES * GEOMETRY.page_tokens, dtype=np.uint32)
PART_BYTES = 2 * GEOMETRY.page_nbytes
DOCUMENT = b"Ebba keeps the lighthouse."


def commit(writer: SnapshotWriter, document: bytes | None = DOCUMENT) -> Manifest:
    fingerprint = RECIPE.fingerprint()
    return writer.commit(
        TOKENS,
        document,
        format=FORMAT,
        format_version=FORMAT_VERSION,
        longreach="0.1.0",
        created="2026-01-01T00:00:00Z",
        model="tiny",
        recipe=RECIPE.model_dump(),
        fingerprint=fingerprint.hex(),
        last_key=page_keys(TOKENS, fingerprint, GEOMETRY.page_tokens)[-1].hex(),
        context_id="ctx-1",
    )


def write(uri: str, document: bytes | None = DOCUMENT) -> Manifest:
    with SnapshotWriter(uri, GEOMETRY, PART_BYTES) as writer:
        for i in range(N_PAGES):
            writer.add(page_of(i), page_checksums(page_of(i), GEOMETRY))
        return commit(writer, document)


@pytest.fixture(params=["path", "file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory, its URI, and a place without directories or renaming."""
    return {
        "path": str(tmp_path / "deep" / "snap"),
        "file": (tmp_path / "snap").as_uri(),
        "memory": f"memory://{uuid.uuid4().hex}/snap",
    }[request.param]


def test_what_was_written_is_read(uri: str) -> None:
    written = write(uri)
    reader = SnapshotReader(uri)
    assert reader.manifest == written
    assert [part.n_pages for part in written.parts] == [2, 2, 1]
    reader.check_sizes()
    assert (reader.token_ids() == TOKENS).all()
    assert reader.document() == DOCUMENT
    n_read = 0
    for i, page, checksums in reader.pages():
        assert i == n_read
        assert (page == page_of(i)).all()
        assert (checksums == page_checksums(page_of(i), GEOMETRY)).all()
        n_read += 1
    assert n_read == N_PAGES


def test_without_text(uri: str) -> None:
    write(uri, document=None)
    reader = SnapshotReader(uri)
    reader.check_sizes()
    assert reader.document() is None


def test_nothing_is_written_over(uri: str) -> None:
    write(uri)
    with pytest.raises(AlreadyExists, match="is a snapshot already"):
        SnapshotWriter(uri, GEOMETRY)


def test_one_that_does_not_end_leaves_nothing(uri: str) -> None:
    with SnapshotWriter(uri, GEOMETRY, PART_BYTES) as writer:
        writer.add(page_of(0), page_checksums(page_of(0), GEOMETRY))
    fs, path = fsspec.core.url_to_fs(uri)
    assert not fs.exists(path) or fs.find(path) == []
    parent = path.rpartition("/")[0]
    assert not fs.exists(parent) or fs.ls(parent) == []
    with pytest.raises((NotFound, FailedPrecondition)):
        SnapshotReader(uri)
    write(uri)


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(AlreadyExists, match="not empty"):
        SnapshotWriter(str(tmp_path), GEOMETRY)
    assert os.listdir(tmp_path) == ["letter"]
    (tmp_path / "empty").mkdir()
    write(str(tmp_path / "empty"))
    assert SnapshotReader(str(tmp_path / "empty")).manifest.n_pages == N_PAGES


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is nothing"):
        SnapshotReader(str(tmp_path / "absent"))
    with pytest.raises(FailedPrecondition, match=r"has no manifest\.json"):
        SnapshotReader(str(tmp_path))
    with pytest.raises(InvalidInput):
        SnapshotReader(" ")
    with pytest.raises(UnreadableUri, match="nosuch"):
        SnapshotReader("nosuch://bucket/snap")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FailedPrecondition):
        SnapshotReader(str(tmp_path / "file"))
    with pytest.raises(UnreadableUri, match="cannot be written"):
        SnapshotWriter(str(tmp_path / "file" / "snap"), GEOMETRY)


def read_all(path: Path) -> None:
    reader = SnapshotReader(str(path))
    reader.check_sizes()
    reader.token_ids()
    reader.document()
    for _ in reader.pages():
        pass


FILES = ("tokens.bin", "checksums.bin", "document", "pages-00000.bin", "pages-00002.bin")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_flipped_byte_anywhere_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    write(str(tmp_path / "snap"))
    path = tmp_path / "snap" / name
    good = path.read_bytes()
    rng = np.random.default_rng(3)
    for at in {0, len(good) - 1, *rng.integers(0, len(good), 20).tolist()}:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        # only the manifest's own version can be hit so that it reads as another version
        with pytest.raises((DataLoss, FailedPrecondition), match=name.replace(".", r"\.")):
            read_all(tmp_path / "snap")
    path.write_bytes(good)
    read_all(tmp_path / "snap")


def test_a_flipped_byte_of_a_page_names_file_page_and_leaf(tmp_path: Path) -> None:
    write(str(tmp_path / "snap"))
    path = tmp_path / "snap" / "pages-00001.bin"
    bad = bytearray(path.read_bytes())
    bad[GEOMETRY.page_nbytes + 4 * GEOMETRY.leaf_nbytes + 3] ^= 16
    path.write_bytes(bad)
    reader = SnapshotReader(str(tmp_path / "snap"))
    good = []
    with pytest.raises(
        DataLoss, match=r"pages-00001\.bin is damaged: page 3 \(the file's 1\), leaf 4"
    ):
        good += [i for i, _, _ in reader.pages()]
    assert [i for i, _ in zip(range(3), reader.pages(), strict=False)] == [0, 1, 2]


@pytest.mark.parametrize("name", FILES)
def test_missing_and_short_files_are_named_before_anything_is_read(
    tmp_path: Path, name: str
) -> None:
    write(str(tmp_path / "snap"))
    path = tmp_path / "snap" / name
    good = path.read_bytes()
    for wrong in (good[:-1], b"", good + b"x"):
        path.write_bytes(wrong)
        with pytest.raises(DataLoss, match=f"{name} has {len(wrong)} bytes, {len(good)} were"):
            SnapshotReader(str(tmp_path / "snap")).check_sizes()
    path.unlink()
    with pytest.raises(DataLoss, match=f"{name} is missing"):
        SnapshotReader(str(tmp_path / "snap")).check_sizes()
    with pytest.raises(DataLoss, match=name):
        read_all(tmp_path / "snap")


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    write(str(tmp_path / "snap"))
    reader = SnapshotReader(str(tmp_path / "snap"))
    reader.check_sizes()
    path = tmp_path / "snap" / "pages-00002.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataLoss, match=r"pages-00002\.bin ends 5 bytes early"):
        list(reader.pages())


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with SnapshotWriter(str(tmp_path / "snap"), GEOMETRY) as writer:
        monkeypatch.setattr("longreach.kvstore.snapshot_file._Out.write", full)
        with pytest.raises(ResourceExhausted, match="no space is left"):
            writer.add(page_of(0), page_checksums(page_of(0), GEOMETRY))
    assert os.listdir(tmp_path) == []
