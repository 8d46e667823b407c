"""What operators and repairers ask a store about its pages: list, verify, scrub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from ..core.errors import InvalidInput
from .scrubber import Scrubber
from .shard import StoreShard
from .store_requests import Header, as_key, keys_of, number_of
from .transport import Reply

MAX_LISTED = 10_000
PAGES_PER_REPLY = 64


class StoreInspection:
    """lock guards the shard."""

    def __init__(
        self, shard: StoreShard, lock: AbstractContextManager[bool], scrubber: Scrubber
    ) -> None:
        self._shard = shard
        self._lock = lock
        self._scrubber = scrubber

    def list(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """Held pages in key order after `after` (none: from the first), at most `limit`; `next` is what
        to ask for then, none at the end."""
        limit, after = number_of(header, "limit"), header.get("after")
        if not 0 < limit <= MAX_LISTED:
            raise InvalidInput(f"`limit` must be 1 to {MAX_LISTED}, got {limit}")
        after = None if after is None else as_key(after)
        with self._lock:
            keys = self._shard.keys_after(after, limit + 1)
            pages = [self._shard.table.pages[key] for key in keys[:limit]]
            listed = [
                {
                    "key": page.key,
                    "parent": page.parent_key,
                    "recipe": page.recipe,
                    "n_pins": page.n_pins,
                    "tier": self._shard.slots.tier(page.slot),
                    "n_rows_used": self._shard.table.order.n_rows(page.key),
                }
                for page in pages
            ]
        return Reply({"pages": listed, "next": keys[limit - 1] if len(keys) > limit else None})

    def verify(self, header: Header) -> Iterator[Reply]:
        """Checks pages now: `keys`, or all. A reply every 64 pages."""
        if header.get("keys") is not None:
            keys = keys_of(header)
        else:
            with self._lock:
                keys = self._shard.keys_after(None)
        return self._verify(keys)

    def _verify(self, keys: Sequence[bytes]) -> Iterator[Reply]:
        for first in range(0, len(keys), PAGES_PER_REPLY):
            part = keys[first : first + PAGES_PER_REPLY]
            bad = [
                {"key": key, "tier": copy.tier, "reason": copy.reason}
                for key in part
                for copy in self._scrubber.check(as_key(key))
            ]
            yield Reply({"checked": len(part), "bad": bad})

    def scrub(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """The state of the background check; `start` begins a round now."""
        if header.get("start"):
            self._scrubber.start_round()
        return Reply(self._scrubber.state())
