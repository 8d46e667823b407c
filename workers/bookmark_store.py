"""Groups of bookmark keys from and to the stores: taken before they are made again, written behind.

Nothing depends on a group: one that is lost, damaged or refused by full stores is made again from its pages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ..core.errors import LongreachError
from ..core.page_key import PageKey
from ..kvstore.page import Bytes, has_checksums
from ..kvstore.page_client import PageClient, PageHandle
from .bookmark_groups import BookmarkGroups
from .row import Row

_log = logging.getLogger(__name__)
TAKEN_GROUPS = 4
"""Taken together at most: rows that decode wait for it."""


@dataclass
class _Write:
    name: PageKey
    page_keys: Sequence[PageKey]
    page: Bytes
    lease: str
    future: Future[PageHandle] | None = None


class BookmarkStore:
    """For the engine's one thread. is_writing: whether any of these pages is on its way to the stores."""

    def __init__(
        self,
        groups: BookmarkGroups,
        client: PageClient,
        is_writing: Callable[[Sequence[PageKey]], bool],
    ) -> None:
        self.groups = groups
        self._client = client
        self._is_writing = is_writing
        self._held: dict[str, list[int]] = {}
        """By row, groups that the stores are said to hold and that were not asked for yet."""
        self._writes: list[_Write] = []

    def take(self, row: Row, first: int, n_pages: int) -> list[tuple[range, np.ndarray]]:
        """Stored keys of the next groups of the row's first n_pages pages, beginning with the one of page
        `first`: their pages and float32 [L, n, Hkv, D], checked. Empty if they have to be made; a group is
        asked for once."""
        group = first // self.groups.n_pages
        held = self._held_of(row, first, n_pages)
        wanted = [g for g in held if g < group + TAKEN_GROUPS]
        if group not in wanted:
            return []
        del held[: len(wanted)]
        names = [self._name(row, g) for g in wanted]
        lease = f"{row.lease}/bookmarks"
        try:
            found = zip(wanted, self._client.acquire(names, lease), strict=True)
            taken = [(g, self._checked(handle)) for g, handle in found if handle is not None]
        except LongreachError as exc:
            _log.warning("bookmark keys are made again: %s", exc.message)
            return []
        finally:
            self._client.release(lease)
        pages_of, unpack = self.groups.pages_of, self.groups.unpack
        return [(pages_of(g), unpack(page)) for g, page in taken if page is not None]

    def put(self, row: Row, group: int, keys: np.ndarray) -> None:
        """Store the keys [L, n, Hkv, D] of a group whose last page has a name, once its pages are stored."""
        pages = self.groups.pages_of(group)
        name = self._name(row, group)
        if any(write.name == name for write in self._writes):
            return
        page_keys = row.keys[pages.start : pages.stop]
        lease = f"{row.lease}/bookmarks-{group}"
        self._writes.append(_Write(name, page_keys, self.groups.pack(keys), lease))

    def is_named(self, row: Row, group: int) -> bool:
        """Whether all its pages are the prompt's: those of answers belong to one row, and end with it."""
        return self.groups.pages_of(group).stop <= len(row.keys)

    def poll(self) -> int:
        """Begin the writes whose turn it is, take note of those that ended; how many are left."""
        left = []
        for write in self._writes:
            if write.future is None and not self._is_writing(write.page_keys):
                self._begin(write)
            if write.future is None or not write.future.done():
                left.append(write)
                continue
            if (failure := write.future.exception()) is not None:
                _log.warning("bookmark keys %s not stored: %s", write.name.hex()[:12], failure)
            self._client.release(write.lease)
        self._writes = left
        return len(left)

    def close(self, row: Row) -> None:
        self._held.pop(row.row_id, None)

    def _begin(self, write: _Write) -> None:
        parent = write.page_keys[-1]  # evicted before the page that it is of
        try:
            write.future = self._client.store(write.name, parent, write.page, write.lease)
        except LongreachError as exc:
            write.future = Future()
            write.future.set_exception(exc)

    def _held_of(self, row: Row, first: int, n_pages: int) -> list[int]:
        if row.row_id not in self._held:
            per_group = self.groups.n_pages
            last = min(n_pages, len(row.keys)) // per_group
            groups = range(first // per_group, last)
            found = self._client.lookup([self._name(row, g) for g in groups])
            self._held[row.row_id] = [g for g, here in zip(groups, found, strict=True) if here]
        return self._held[row.row_id]

    def _checked(self, handle: PageHandle) -> Bytes | None:
        """A copy of the page, checked as one that goes into the bank is."""
        page = self._client.page_bytes(handle).copy()
        if has_checksums(page, self.groups.geometry, handle.checksums):
            return page
        self._client.report_corrupt(handle)
        return None

    def _name(self, row: Row, group: int) -> PageKey:
        return self.groups.name(row.keys[self.groups.pages_of(group).stop - 1])
