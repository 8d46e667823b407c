"""Reading what a client names by URI: through fsspec, bounded in size and in time."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import Empty, Full, Queue

import fsspec

from ..core.errors import ContextTooLong, UnreadableUri

CHUNK_BYTES = 1 << 20
_AHEAD = 4


def read_uri(
    uri: str, *, max_bytes: int, timeout_s: float, protocols: tuple[str, ...]
) -> Generator[bytes, None, None]:
    """Chunks of the bytes at `uri`. Closing the iterator stops the reading.

    timeout_s bounds each wait for the next chunk. Raises UnreadableUri (missing, refused
    protocol, silent for too long) or ContextTooLong (more than max_bytes).
    """
    check_protocols(uri, protocols)
    chunks: Queue[bytes | Exception | None] = Queue(maxsize=_AHEAD)
    gone = threading.Event()
    # file systems know no common deadline: a thread waits for them, we wait for the thread
    threading.Thread(target=_pump, args=(uri, chunks, gone), name="uri", daemon=True).start()
    n_bytes = 0
    try:
        while True:
            try:
                chunk = chunks.get(timeout=timeout_s)
            except Empty:
                raise UnreadableUri(
                    f"{uri}: no data for {timeout_s:g} s (gateway.uri_timeout_s)", uri=uri
                ) from None
            if chunk is None:
                return
            if isinstance(chunk, Exception):
                raise UnreadableUri(f"{uri}: {_cause(chunk)}", uri=uri) from chunk
            n_bytes += len(chunk)
            if n_bytes > max_bytes:
                raise ContextTooLong(f"{uri}: more than {max_bytes} bytes", uri=uri)
            yield chunk
    finally:
        gone.set()


def _pump(uri: str, chunks: Queue[bytes | Exception | None], gone: threading.Event) -> None:
    def put(item: bytes | Exception | None) -> bool:
        while not gone.is_set():
            try:
                chunks.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False

    try:
        with fsspec.open(uri, "rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                if not put(bytes(chunk)):
                    return
        put(None)
    except Exception as exc:  # file systems raise anything
        put(exc)


def check_protocols(uri: str, protocols: tuple[str, ...]) -> None:
    """Raises UnreadableUri for a URI of a protocol that is not allowed."""
    if not uri.strip() or "\x00" in uri:
        raise UnreadableUri("the URI is empty or holds a zero byte", uri=uri)
    for part in uri.split("::"):
        protocol, separator, _ = part.partition("://")
        name = protocol if separator else ("file" if part == uri else part)
        if name not in protocols:
            raise UnreadableUri(
                f"{uri}: protocol '{name}' is not allowed (gateway.uri_protocols: "
                f"{', '.join(protocols)})",
                uri=uri,
            )


def _cause(exc: Exception) -> str:
    if isinstance(exc, FileNotFoundError):
        return "no such file"
    if isinstance(exc, IsADirectoryError):
        return "is a directory"
    return f"{type(exc).__name__}: {exc}"
