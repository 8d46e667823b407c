"""Uploads in chunks: what a client sends, and the check that all of it arrived.

gRPC for Python may end the iterator of requests as quietly for a client that was cut off as for one
that has finished (the message that fails arrives before the news of the cancellation). So the end
of an upload is a message of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from ..core.errors import InvalidInput
from .proto import contexts_pb2


class UploadPart(Protocol):
    """A message with the alternatives `chunk` and `end` in its oneof `part`."""

    chunk: bytes
    end: contexts_pb2.UploadEnd

    def WhichOneof(self, oneof_group: Any) -> Any: ...


def upload_parts(make: Any, chunks: Iterable[bytes]) -> Iterator[Any]:
    """Messages `make(chunk=...)`, then `make(end=...)`."""
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        yield make(chunk=chunk)
    yield make(end=contexts_pb2.UploadEnd(n_bytes=n_bytes))


def whole_upload(parts: Iterable[UploadPart]) -> Iterator[bytes]:
    """The bytes of an upload. Raises InvalidInput unless its end follows and names their number."""
    n_bytes = 0
    ended = False
    for part in parts:
        kind = part.WhichOneof("part")
        if ended or kind not in ("chunk", "end"):
            raise InvalidInput(
                f"part: {kind or 'nothing'} where a chunk or the one end belongs", field="part"
            )
        if kind == "chunk":
            n_bytes += len(part.chunk)
            yield part.chunk
        elif part.end.n_bytes != n_bytes:
            raise InvalidInput(
                f"end: it names {part.end.n_bytes} bytes but {n_bytes} arrived; send them again",
                field="end",
            )
        else:
            ended = True
    if not ended:
        raise InvalidInput(
            f"end: the stream stopped after {n_bytes} bytes without its end; nothing was kept",
            field="end",
        )
