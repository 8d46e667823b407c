"""Documents that a batch names by a local path: the client sends them along, the gateway may be elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path


class LocalDocuments:
    """Rewrites batch lines: a `context_uri` that is a file here becomes the id of its upload.

    A path is taken relative to the current directory, else to the batch's own. Lines that name no
    such file, malformed ones among them, stay as they are: the gateway answers them, row by row.
    """

    def __init__(self, base: Path, upload: Callable[[Path], str]) -> None:
        self._base = base
        self._upload = upload
        self._ids: dict[Path, str] = {}

    def rewrite(self, line: bytes) -> bytes:
        if b'"context_uri"' not in line:
            return line
        try:
            row = json.loads(line)
        except ValueError:
            return line
        uri = row.get("context_uri") if isinstance(row, dict) else None
        path = self._find(uri) if isinstance(uri, str) else None
        if path is None or "context_id" in row:
            return line
        if path not in self._ids:
            self._ids[path] = self._upload(path)
        del row["context_uri"]
        row["context_id"] = self._ids[path]
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def _find(self, uri: str) -> Path | None:
        if "://" in uri or not uri:
            return None
        for path in (Path(uri), self._base / uri):
            try:
                if path.is_file():
                    return path.resolve()
            except (OSError, ValueError):
                return None  # too long, or not a path at all
        return None

    @property
    def found(self) -> bool:
        """Whether any line seen so far named a local file."""
        return bool(self._ids)

    def lines(self, batch: Path) -> Iterator[bytes]:
        """The batch's lines, rewritten. Raises OSError if it cannot be read."""
        with batch.open("rb") as file:
            for line in file:
                yield self.rewrite(line)
