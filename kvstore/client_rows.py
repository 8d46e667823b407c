"""Which row holds which pages at a client, so that one call frees all of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.page_key import PageKey
from .client_memory import ClientMemory, PageHandle
from .page import Checksums
from .store_link import StoreLink


@dataclass(eq=False, slots=True)
class Row:
    """What one row holds. `owner` names its leases at the stores and is never used twice."""

    name: str
    owner: str
    handles: dict[PageKey, PageHandle] = field(default_factory=dict)
    pinned_at: set[StoreLink] = field(default_factory=set)
    strays: set[StoreLink] = field(default_factory=set)
    """Stores that may pin pages for it late, because a request was given up there."""
    hooks: set[Callable[[], None]] = field(default_factory=set)
    """Called when the row is released: they end what still fetches for it."""
    n_users: int = 0
    released: bool = False
    lost: bool = False


class RowTable:
    """Thread-safe. A row that is released while calls on it are running is cleaned up by the last
    of them; those that can be cancelled are."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._rows: dict[str, Row] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def enter(self, name: str) -> Row:
        """The row, made if need be; pair with `leave`."""
        with self._lock:
            row = self._rows.get(name)
            if row is None:
                owner = f"{self._owner}/{name}/{next(self._numbers)}"
                row = self._rows[name] = Row(name, owner)
            row.n_users += 1
            return row

    def leave(self, row: Row) -> bool:
        """True: the caller was the last user of a released row and must clean it up."""
        with self._lock:
            row.n_users -= 1
            return row.released and not row.n_users

    def remove(self, name: str, force: bool = False) -> Row | None:
        """The row if the caller must clean it up now; None if there is none or, without force, if
        it is in use."""
        with self._lock:
            row = self._rows.pop(name, None)
            if row is None:
                return None
            row.released = True
            hooks = list(row.hooks)
            busy = bool(row.n_users) and not force
        for hook in hooks:  # without the lock: a hook may wait for one that a user of it holds
            hook()
        return None if busy else row

    def cancel_all(self) -> None:
        """Ends what can be ended of every row; the rows stay."""
        with self._lock:
            hooks = [hook for row in self._rows.values() for hook in row.hooks]
        for hook in hooks:
            hook()

    def on_release(self, row: Row, hook: Callable[[], None]) -> None:
        """Calls the hook when the row is released, at once if it was already."""
        with self._lock:
            row.hooks.add(hook)
            released = row.released
        if released:
            hook()

    def forget_hook(self, row: Row, hook: Callable[[], None]) -> None:
        with self._lock:
            row.hooks.discard(hook)

    def note(self, row: Row, handle: PageHandle, link: StoreLink | None) -> None:
        """The row holds this page, pinned at that store (None: a private copy)."""
        with self._lock:
            row.handles[handle.key] = handle
            if link is not None:
                row.pinned_at.add(link)

    def note_pin(self, row: Row, link: StoreLink) -> None:
        with self._lock:
            row.pinned_at.add(link)

    def holding(self, key: PageKey) -> list[Row]:
        with self._lock:
            return [row for row in self._rows.values() if key in row.handles]

    def memories(self) -> set[int]:
        """Those that some row's pages lie in."""
        with self._lock:
            return {h.memory for row in self._rows.values() for h in row.handles.values()}

    def get(self, name: str) -> Row | None:
        return self._rows.get(name)

    def names(self) -> list[str]:
        with self._lock:
            return list(self._rows)

    def owners_by_link(self) -> dict[StoreLink, dict[str, Row]]:
        with self._lock:
            found: dict[StoreLink, dict[str, Row]] = {}
            for row in self._rows.values():
                for link in row.pinned_at:
                    found.setdefault(link, {})[row.owner] = row
            return found


@dataclass(eq=False, slots=True)
class _PrivatePage:
    handle: PageHandle
    owners: set[str]


class PrivatePages:
    """Pages in private slots, shared by the rows that hold them. Thread-safe."""

    def __init__(self, memory: ClientMemory) -> None:
        self._memory = memory
        self._pages: dict[PageKey, _PrivatePage] = {}
        self._spoiled: list[_PrivatePage] = []
        self._lock = threading.Lock()

    def share(self, key: PageKey, owner: str) -> PageHandle | None:
        with self._lock:
            page = self._pages.get(key)
            if page is None:
                return None
            page.owners.add(owner)
            return page.handle

    def keep(
        self,
        key: PageKey,
        memory: int,
        slot: int,
        checksums: Checksums,
        store_id: str,
        owner: str,
    ) -> PageHandle:
        """A filled slot becomes the copy of its page, unless another thread was first."""
        with self._lock:
            page = self._pages.get(key)
            if page is None:
                handle = self._memory.handle(key, memory, slot, checksums, store_id)
                page = self._pages[key] = _PrivatePage(handle, set())
            else:
                self._memory.give_back_private(memory, slot)
            page.owners.add(owner)
            return page.handle

    def let_go(self, key: PageKey, owner: str) -> None:
        """One owner needs one page no more."""
        with self._lock:
            page = self._pages.get(key)
            spoiled = [page for page in self._spoiled if page.handle.key == key]
            self._leave([page, *spoiled] if page is not None else spoiled, owner)

    def spoil(self, handle: PageHandle) -> None:
        """The bytes went bad: nobody else gets this copy; its slot is free when its rows are."""
        with self._lock:
            page = self._pages.get(handle.key)
            if page is not None and page.handle is handle:
                self._spoiled.append(self._pages.pop(handle.key))

    def release(self, owner: str) -> None:
        with self._lock:
            self._leave([*self._pages.values(), *self._spoiled], owner)

    def _leave(self, pages: list[_PrivatePage], owner: str) -> None:
        """With the lock held. Pages that nobody needs any more give their slots back."""
        for page in pages:
            page.owners.discard(owner)
            if page.owners:
                continue
            if self._pages.get(page.handle.key) is page:
                del self._pages[page.handle.key]
            else:
                self._spoiled.remove(page)
            self._free(page)

    def _free(self, page: _PrivatePage) -> None:
        self._memory.give_back_private(page.handle.memory, self._memory.slot_of(page.handle))
