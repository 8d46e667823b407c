"""Messages between the two ends of a transport: a list of frames.

frame 0: one kind byte, then the request id (8 bytes, big endian)
frame 1: a header (core.codec); what it holds depends on the kind
frames 2..: the buffers, out of band
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.codec import pack_header, unpack_header
from ..core.errors import InvalidInput, LongreachError, as_longreach_error
from .transport import Buffer, Reply

CALL = b"C"
"""Client: one request that wants one reply. Header: method, timeout_s, body."""
OPEN = b"S"
"""Client: one request that wants a stream. Header: method, credit, body, bundle_bytes."""
CREDIT = b"K"
"""Client: `credit` more stream replies may be sent."""
CANCEL = b"X"
"""Client: the stream is not wanted any more."""
REPLY = b"R"
"""Server: the reply of a call, or one reply of a stream. Header is the service's own."""
BUNDLE = b"B"
"""Server: several replies of a stream. Header: `replies`, for each its header and number of buffers."""
ALIVE = b"A"
"""Server: the stream is open, nothing to say."""
END = b"E"
"""Server: the stream ended well."""
FAIL = b"F"
"""Server: the call or stream failed. Header: LongreachError.to_wire()."""

KINDS = frozenset((CALL, OPEN, CREDIT, CANCEL, REPLY, BUNDLE, ALIVE, END, FAIL))
STREAM_CREDIT = 8
"""Replies that a server may send ahead of the reader."""
KEEPALIVE_S = 1.0
"""Seconds between a server's signs of life on an open stream."""

Frames = Sequence[Buffer]


def as_bytes_view(buffer: Buffer) -> memoryview:
    """A flat byte view of any C-contiguous buffer. Raises InvalidInput on others."""
    view = memoryview(buffer)
    if not view.nbytes:
        return memoryview(b"")
    if not view.c_contiguous:
        raise InvalidInput(f"buffer of shape {view.shape} is not C-contiguous; copy it first")
    return view.cast("B")


def make_frames(
    kind: bytes, request_id: int, header: dict[str, Any] | None = None, buffers: Frames = ()
) -> list[Buffer]:
    """Raises InvalidInput if the header does not pack or a buffer is not contiguous."""
    try:
        packed = pack_header(header or {})
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidInput(f"header holds a value that msgpack cannot carry: {exc}") from exc
    return [kind + request_id.to_bytes(8, "big"), packed, *(as_bytes_view(b) for b in buffers)]


def fail_frames(request_id: int, exc: BaseException) -> list[Buffer]:
    """Frames of a failure; never raises."""
    error = as_longreach_error(exc)
    try:
        return make_frames(FAIL, request_id, error.to_wire())
    except LongreachError:
        plain = {name: str(value) for name, value in error.details.items()}
        return make_frames(FAIL, request_id, {**error.to_wire(), "details": plain})


def parse_tag(frames: Frames) -> tuple[bytes, int] | None:
    """Kind and request id, or None where the message is no message of ours."""
    if len(frames) < 2 or len(frames[0]) != 9:
        return None
    tag = bytes(frames[0])
    if tag[:1] not in KINDS:
        return None
    return tag[:1], int.from_bytes(tag[1:], "big")


def parse_header(frames: Frames) -> dict[str, Any]:
    """Raises InvalidInput."""
    return unpack_header(memoryview(frames[1]))


def parse_buffers(frames: Frames) -> list[memoryview]:
    return [memoryview(frame).toreadonly() for frame in frames[2:]]


def make_bundle(request_id: int, replies: Sequence[Reply]) -> list[Buffer]:
    """Frames of one or more replies of a stream. Raises InvalidInput as `make_frames` does."""
    if len(replies) == 1:
        return make_frames(REPLY, request_id, replies[0].header, replies[0].buffers)
    heads = [[reply.header, len(reply.buffers)] for reply in replies]
    buffers = [buffer for reply in replies for buffer in reply.buffers]
    return make_frames(BUNDLE, request_id, {"replies": heads}, buffers)


def parse_bundle(frames: Frames) -> list[Reply]:
    """Raises InvalidInput."""
    heads, buffers = parse_header(frames).get("replies"), iter(parse_buffers(frames))
    try:
        assert isinstance(heads, list)
        return [Reply(dict(head), [next(buffers) for _ in range(n)]) for head, n in heads]
    except (AssertionError, TypeError, ValueError, RuntimeError, StopIteration) as exc:
        raise InvalidInput("a bundle's header does not match its buffers") from exc
