"""Snapshots in directories and at fsspec URIs: written a page at a time, read back checked."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
import xxhash

from ..core.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidInput,
    LongreachError,
    NotFound,
    ResourceExhausted,
    UnreadableUri,
)
from .page import Bytes, Checksums, PageGeometry, checksums_to_wire
from .snapshot import (
    CHECKSUMS,
    DOCUMENT,
    MANIFEST,
    PART_BYTES,
    TOKENS,
    FileEntry,
    Manifest,
    PagesEntry,
    bad_leaf,
    decode,
    encode,
    pages_per_part,
)

MAX_MANIFEST_BYTES = 64 << 20


class _Out:
    """A file being written, with its size and checksum so far."""

    def __init__(self, fs: Any, folder: str, name: str) -> None:
        self.name = name
        self.n_bytes = 0
        self._digest = xxhash.xxh3_128()
        self._file: BinaryIO = fs.open(f"{folder}/{name}", "wb")

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.n_bytes += len(data)

    def close(self) -> FileEntry:
        self._file.close()
        return FileEntry(name=self.name, n_bytes=self.n_bytes, xxh3=self._digest.hexdigest())

    def abandon(self) -> None:
        with suppress(Exception):
            self._file.close()


class SnapshotWriter:
    """Add pages in order, then `commit`. Leaving the `with` block before that removes what was written.

    In a local directory everything is written beside the target and renamed; elsewhere files are
    written in place. In both cases the manifest comes last.
    """

    def __init__(self, uri: str, geometry: PageGeometry, part_bytes: int = PART_BYTES) -> None:
        """Raises AlreadyExists if something is there, UnreadableUri if nothing can be written."""
        self.uri = uri
        self._geometry = geometry
        self._pages_per_part = pages_per_part(geometry, part_bytes)
        self._fs, self._target = _open_fs(uri)
        self._local = "file" in _protocols(self._fs)
        self._folder = self._target
        self._parts: list[PagesEntry] = []
        self._part: _Out | None = None
        self._n_in_part = 0
        self._committed = False
        try:
            self._refuse_existing()
            if self._local:
                self._folder = f"{self._target}.part-{uuid.uuid4().hex[:8]}"
            self._fs.makedirs(self._folder, exist_ok=True)
            self._checksums = _Out(self._fs, self._folder, CHECKSUMS)
        except Exception as exc:
            raise _as_error(exc, uri, "cannot be written") from exc

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._committed:
            return
        self._checksums.abandon()
        if self._part is not None:
            self._part.abandon()
        with suppress(Exception):
            self._fs.rm(self._folder, recursive=True)

    def add(self, page: Bytes, checksums: Checksums) -> None:
        """The next page: uint8 [page_nbytes] with uint64 [n_leaves], which must be those of its bytes."""
        try:
            if self._part is None:
                name = f"pages-{len(self._parts):05d}.bin"
                self._part = _Out(self._fs, self._folder, name)
            self._part.write(page.data)
            self._checksums.write(checksums_to_wire(checksums))
            self._n_in_part += 1
            if self._n_in_part == self._pages_per_part:
                self._end_part()
        except Exception as exc:
            raise _as_error(exc, self.uri, "cannot be written") from exc

    def commit(self, token_ids: np.ndarray, document: bytes | None, **fields: Any) -> Manifest:
        """Make it a snapshot. fields: those of the manifest that are not files or sizes."""
        try:
            self._end_part()
            checksums = self._checksums.close()
            tokens = self._whole(TOKENS, token_ids.astype("<u4").tobytes())
            text = None if document is None else self._whole(DOCUMENT, document)
            manifest = Manifest(
                **fields,
                geometry=self._geometry.to_dict(),
                n_tokens=len(token_ids),
                n_pages=sum(part.n_pages for part in self._parts),
                checksums=checksums,
                tokens=tokens,
                document=text,
                parts=tuple(self._parts),
            )
            self._whole(MANIFEST, encode(manifest))
            if self._local:
                os.rename(self._folder, self._target)
            self._committed = True
            return manifest
        except Exception as exc:
            raise _as_error(exc, self.uri, "cannot be written") from exc

    def _end_part(self) -> None:
        if self._part is not None:
            entry = self._part.close()
            self._parts.append(PagesEntry(**entry.model_dump(), n_pages=self._n_in_part))
            self._part, self._n_in_part = None, 0

    def _whole(self, name: str, data: bytes) -> FileEntry:
        file = _Out(self._fs, self._folder, name)
        file.write(data)
        return file.close()

    def _refuse_existing(self) -> None:
        if self._fs.exists(f"{self._target}/{MANIFEST}"):
            raise AlreadyExists(
                f"{self.uri} is a snapshot already; delete it or choose another name"
            )
        # elsewhere an unfinished one may have left files: they are written over
        if self._local and self._fs.exists(self._target) and self._fs.ls(self._target):
            raise AlreadyExists(f"{self.uri} is not empty; choose another name")


class SnapshotReader:
    """Everything read is checked against the manifest first. Raises NotFound, FailedPrecondition (no
    snapshot, another format version), DataLoss (damaged), UnreadableUri."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fs, self._folder = _open_fs(uri)
        self.manifest = self._manifest()
        self.geometry = PageGeometry.from_dict(dict(self.manifest.geometry))

    def check_sizes(self) -> None:
        """That every file is there and as long as it was: seconds, before gigabytes are read."""
        for entry in self.manifest.files:
            try:
                size = int(self._fs.info(f"{self._folder}/{entry.name}")["size"])
            except FileNotFoundError:
                raise DataLoss(f"{self.uri}/{entry.name} is missing") from None
            except Exception as exc:
                raise _as_error(exc, f"{self.uri}/{entry.name}", "cannot be read") from exc
            if size != entry.n_bytes:
                raise DataLoss(
                    f"{self.uri}/{entry.name} has {size} bytes, {entry.n_bytes} were written"
                )

    def token_ids(self) -> np.ndarray:
        """uint32 [n_tokens]."""
        return np.frombuffer(self._whole(self.manifest.tokens), "<u4")

    def document(self) -> bytes | None:
        entry = self.manifest.document
        return None if entry is None else self._whole(entry)

    def pages(self) -> Iterator[tuple[int, Bytes, Checksums]]:
        """(page index, uint8 [page_nbytes], uint64 [n_leaves]) in order, every leaf checked."""
        n_bytes, n_sums = self.geometry.page_nbytes, 8 * self.geometry.n_leaves
        for _ in self._pieces(self.manifest.checksums, 1 << 20):
            pass  # whole and right, or a leaf would be blamed for its checksum
        sums = self._pieces(self.manifest.checksums, n_sums)
        page_index = 0
        for part in self.manifest.parts:
            for at, data in enumerate(self._pieces(part, n_bytes)):
                page, checksums = np.frombuffer(data, np.uint8), np.frombuffer(next(sums), "<u8")
                leaf = bad_leaf(page, checksums, self.geometry)
                if leaf is not None:
                    raise DataLoss(
                        f"{self.uri}/{part.name} is damaged: page {page_index} (the file's {at}), "
                        f"leaf {leaf} does not have its checksum"
                    )
                yield page_index, page, checksums.astype(np.uint64, copy=False)
                page_index += 1

    def _manifest(self) -> Manifest:
        path = f"{self._folder}/{MANIFEST}"
        try:
            with self._fs.open(path, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            if not self._fs.exists(self._folder):
                raise NotFound(f"{self.uri}: there is nothing") from None
            raise FailedPrecondition(
                f"{self.uri} has no {MANIFEST}: it is no snapshot, or was not written to its end"
            ) from None
        except Exception as exc:
            raise _as_error(exc, self.uri, "cannot be read") from exc
        return decode(data, self.uri)

    def _whole(self, entry: FileEntry) -> bytes:
        return b"".join(self._pieces(entry, 1 << 20))

    def _pieces(self, entry: FileEntry, n_bytes: int) -> Iterator[bytes]:
        """The file in pieces of n_bytes; its checksum is compared at the end."""
        digest, name = xxhash.xxh3_128(), f"{self.uri}/{entry.name}"
        left = entry.n_bytes
        try:
            with self._fs.open(f"{self._folder}/{entry.name}", "rb") as file:
                while left:
                    data = file.read(min(n_bytes, left))
                    if len(data) < min(n_bytes, left):
                        raise DataLoss(f"{name} ends {left - len(data)} bytes early")
                    left -= len(data)
                    digest.update(data)
                    yield data
        except FileNotFoundError:
            raise DataLoss(f"{name} is missing") from None
        except (LongreachError, GeneratorExit):
            raise
        except Exception as exc:
            raise _as_error(exc, name, "cannot be read") from exc
        if digest.hexdigest() != entry.xxh3:
            raise DataLoss(f"{name} is damaged: its bytes do not have the checksum {entry.xxh3}")


def _open_fs(uri: str) -> tuple[Any, str]:
    if not uri.strip() or "\x00" in uri:
        raise InvalidInput("the snapshot's URI is empty or holds a zero byte", field="uri")
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except Exception as exc:
        raise _as_error(exc, uri, "cannot be opened") from exc
    return fs, cast(str, path).rstrip("/")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _as_error(exc: Exception, uri: str, what: str) -> LongreachError:
    """File systems raise anything."""
    if isinstance(exc, LongreachError):
        return exc
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"{uri}: no space is left: {exc.strerror}")
    return UnreadableUri(f"{uri} {what}: {type(exc).__name__}: {exc}", uri=uri)
