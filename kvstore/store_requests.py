"""What requests to a store carry: fields are checked here, and pages described for replies."""

from __future__ import annotations

from typing import Any

from ..core.errors import InvalidInput
from ..core.page_key import PageKey
from .page import checksums_to_wire
from .page_table import HeldPage

Header = dict[str, Any]
MAX_KEYS = 100_000
"""Keys in one request (6.4 million tokens of 64-token pages)."""


def keys_of(header: Header) -> list[PageKey]:
    keys = header.get("keys")
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise InvalidInput(f"`keys` must be a list of at most {MAX_KEYS} page keys")
    return [as_key(key) for key in keys]


def as_key(key: Any) -> PageKey:
    if not isinstance(key, bytes) or len(key) != 32:
        raise InvalidInput(f"a page key is 32 bytes, got {key!r:.80}")
    return PageKey(key)


def text_of(header: Header, field: str) -> str:
    value = header.get(field)
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"`{field}` must be text, got {value!r:.80}")
    return value


def lease_of(header: Header) -> float:
    value = header.get("lease_s")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:
        raise InvalidInput(f"`lease_s` must be seconds above 0, got {value!r:.80}")
    return float(value)


def number_of(header: Header, field: str) -> int:
    value = header.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(f"`{field}` must be a whole number, got {value!r:.80}")
    return value


def located(page: HeldPage) -> Header:
    """Slots are numbered through: those of the arena first, then those of the disk."""
    return {
        "slot": page.slot,
        "checksums": checksums_to_wire(page.checksums),
        "recipe": page.recipe,
    }
