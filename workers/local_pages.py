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
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self.keys) - len(self._free)

    def new(self, key: PageKey | None) -> int:
        """A page with one user, whose KV is yet to be computed."""
        if not self._free:
            self._grow()
        page_id = self._free.pop()
        self.keys[page_id] = key
        self.handles[page_id] = None
        self.users[page_id] = 1
        self.complete[page_id] = False
        self.home_memory[page_id] = -1
        self.home_row[page_id] = -1
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

    def let_go(self, page_id: int) -> bool:
        """One user less; True if that was the last and the number is free again."""
        self.users[page_id] -= 1
        if self.users[page_id] > 0:
            return False
        key = self.keys[page_id]
        if key is not None and self.page_of_key.get(key) == page_id:
            del self.page_of_key[key]
        self.keys[page_id] = None
        self.handles[page_id] = None
        self._free.append(page_id)
        return True

    def _grow(self) -> None:
        old, new = len(self.keys), max(256, 2 * len(self.keys))
        self.keys += [None] * (new - old)
        self.handles += [None] * (new - old)
        for name in ("users", "complete", "home_memory", "home_row"):
            array = getattr(self, name)
            grown = np.zeros(new, dtype=array.dtype)
            grown[:old] = array
            setattr(self, name, grown)
        # ascending order of use keeps numbers small
        self._free = list(range(new - 1, old - 1, -1))
