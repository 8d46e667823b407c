"""Bytes on the wire: msgpack headers; page bytes travel out of band, never pickled."""

from __future__ import annotations

from typing import Any

import msgpack

from .errors import InvalidInput

WIRE_VERSION = 1
MAX_HEADER_BYTES = 16 << 20
"""Bound on one header. Page bytes are not part of it."""


def pack_header(header: dict[str, Any]) -> bytes:
    """One version byte, then msgpack.

    Values are plain: str, int, float, bool, bytes, list, dict, None.
    """
    packed: bytes = msgpack.packb(header, use_bin_type=True)
    return bytes((WIRE_VERSION,)) + packed


def unpack_header(data: bytes | memoryview) -> dict[str, Any]:
    """Inverse of pack_header. Raises InvalidInput on any malformed input, never anything else."""
    if len(data) > MAX_HEADER_BYTES:
        raise InvalidInput(f"header of {len(data)} bytes exceeds {MAX_HEADER_BYTES}")
    if not len(data) or data[0] != WIRE_VERSION:
        version = data[0] if len(data) else None
        raise InvalidInput(f"wire version {version}, this side speaks {WIRE_VERSION}")
    try:
        # the default limits follow len(data): a short message cannot claim a huge list
        header = msgpack.unpackb(data[1:], raw=False, strict_map_key=False)
    except Exception as exc:
        raise InvalidInput(f"malformed header: {exc}") from exc
    if not isinstance(header, dict):
        raise InvalidInput(f"header must be a map, got {type(header).__name__}")
    for key in header:
        if not isinstance(key, str):
            raise InvalidInput(f"header keys must be strings, got {type(key).__name__}")
    return header
