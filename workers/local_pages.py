"""Pages this worker knows by a local number: name, users, and where their bytes can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.page_key import PageKey

if TYPE_CHECKING:
    from ..kvstore.page_client import PageHandle


class LocalPages:
    """Page ids are small integers, reused after the last user lets go.

    A page has a home once it is safe in the store and mapped here: `home_memory` is an index into the
    client's memories, `home_row` the row of its first leaf there. Before that its only copy is in
    the device bank.
    """

    def __init__(self) -> None:
        self.page_of_key: dict[PageKey, int] = {}
        self.keys: list[PageKey | None] = []
        self.handles: list[PageHandle | None] = []
        self.users = np.zeros(0, dtype=np.int64)
        self.complete = np.zeros(0, dtype=bool)
        self.home_memory = np.zeros(0, dtype=np.int64)
        self.home_row = np.zeros(0, dtype=np.int64)
        self._group: list[str] = []
        self._group_pages: dict[str, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self.keys) - len(self._free)

    def new(self, key: PageKey | None, group: str) -> int:
        """A page with one user, whose KV is yet to be computed.

        group: owner of the page's lease at the stores. A page outlives the row that brought it if
        other rows use it too, so leases end with the last page of their group, not with a row.
        """
        if not self._free:
            self._grow()
        page_id = self._free.pop()
        self.keys[page_id] = key
        self.handles[page_id] = None
        self.users[page_id] = 1
        self.complete[page_id] = False
        self.home_memory[page_id] = -1
        self.home_row[page_id] = -1
        self._group[page_id] = group
        self._group_pages[group] = self._group_pages.get(group, 0) + 1
        if key is not None:
            self.page_of_key[key] = page_id
        return page_id

    def set_key(self, page_id: int, key: PageKey) -> None:
        self.keys[page_id] = key
        self.page_of_key[key] = page_id

    def set_home(self, page_id: int, handle: PageHandle) -> None:
        self.handles[page_id] = handle
        self.home_memory[page_id] = handle.memory
        self.home_row[page_id] = handle.first_leaf_row
        self.complete[page_id] = True

    def retain(self, page_id: int) -> None:
        self.users[page_id] += 1

    def let_go(self, page_id: int) -> tuple[bool, str | None]:
        """One user less. (whether that was the last, so that the number is free again; the lease
        group that ended with it, if any)."""
        self.users[page_id] -= 1
        if self.users[page_id] > 0:
            return False, None
        key = self.keys[page_id]
        if key is not None and self.page_of_key.get(key) == page_id:
            del self.page_of_key[key]
        self.keys[page_id] = None
        self.handles[page_id] = None
        self._free.append(page_id)
        group = self._group[page_id]
        self._group_pages[group] -= 1
        if self._group_pages[group]:
            return True, None
        del self._group_pages[group]
        return True, group

    @property
    def groups(self) -> list[str]:
        """Lease groups that still have pages."""
        return list(self._group_pages)

    def group_of(self, page_id: int) -> str:
        return self._group[page_id]

    def _grow(self) -> None:
        old, new = len(self.keys), max(256, 2 * len(self.keys))
        self.keys += [None] * (new - old)
        self.handles += [None] * (new - old)
        self._group += [""] * (new - old)
        for name in ("users", "complete", "home_memory", "home_row"):
            array = getattr(self, name)
            grown = np.zeros(new, dtype=array.dtype)
            grown[:old] = array
            setattr(self, name, grown)
        # ascending order of use keeps numbers small
        self._free = list(range(new - 1, old - 1, -1))
