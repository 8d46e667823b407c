"""Bringing pages near before a row needs them. A hint: it may do nothing, and gives way to whatever a
row waits for."""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..core.errors import Cancelled, LongreachError
from ..core.page_key import PageKey
from .client_memory import ClientMemory, PageHandle
from .client_rows import PrivatePages, Row
from .page_loader import PageLoader
from .store_pool import Counters, StorePool

logger = logging.getLogger(__name__)

BATCH_PAGES = 8
"""Pages asked for at a time; the most that are under way when a row comes."""
MAX_WAITING_KEYS = 4096


class Prefetcher:
    """Thread-safe. Remote pages come into private slots, at most limit_bytes of them, and wait there
    for the row; pages of this node are announced to the store and to the kernel. One thread, started
    by the first hint."""

    def __init__(
        self,
        loader: PageLoader,
        pool: StorePool,
        memory: ClientMemory,
        private: PrivatePages,
        counters: Counters,
        owner: str,
        limit_bytes: int,
    ) -> None:
        self._loader = loader
        self._pool = pool
        self._memory = memory
        self._private = private
        self._counters = counters
        self._max_pages = limit_bytes // memory.geometry.page_nbytes
        self._row = Row("(prefetch)", f"{owner}/(prefetch)")
        self._waiting: deque[PageKey] = deque(maxlen=MAX_WAITING_KEYS)
        self._held: OrderedDict[PageKey, None] = OrderedDict()
        self._n_acquiring = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def hint(self, keys: Sequence[PageKey]) -> None:
        """These pages will be acquired soon, the first of them first. Never waits."""
        with self._changed:
            if self._closing or not self._max_pages:
                return
            known = {*self._waiting, *self._held}
            room = MAX_WAITING_KEYS - len(self._waiting)
            self._waiting.extend([key for key in keys if key not in known][:room])
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="page-prefetch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @contextlib.contextmanager
    def acquiring(self, keys: Sequence[PageKey]) -> Iterator[None]:
        """While a row acquires pages nothing is prefetched; what was for it is its own afterwards."""
        with self._changed:
            self._n_acquiring += 1
            self._row.released = True
            hooks = list(self._row.hooks)
        for hook in hooks:
            hook()
        try:
            yield
        finally:
            with self._changed:
                self._n_acquiring -= 1
                self._row.released = bool(self._n_acquiring)
                claimed = [key for key in dict.fromkeys(keys) if key in self._held]
                for key in claimed:
                    self._let_go(key)
                self._changed.notify_all()
            self._counters.add(prefetch_hits=len(claimed))

    def close(self) -> None:
        with self._changed:
            self._closing = self._row.released = True
            self._waiting.clear()
            hooks = list(self._row.hooks)
            self._changed.notify_all()
        for hook in hooks:
            hook()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        self._private.release(self._row.owner)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or (self._waiting and not self._n_acquiring)
                )
                if self._closing:
                    return
                n_batch = min(BATCH_PAGES, len(self._waiting), self._max_pages)
                batch = [self._waiting.popleft() for _ in range(n_batch)]
            try:
                self._fetch(batch)
            except Cancelled:
                with self._changed:
                    # what a row asked for in the meantime is skipped by the next look
                    self._waiting.extendleft(
                        key for key in reversed(batch) if key not in self._held
                    )
            except LongreachError as exc:
                logger.info("pages were not prefetched: %s", exc.message)
            except Exception:
                logger.exception("prefetching failed; it goes on")

    def _fetch(self, batch: list[PageKey]) -> None:
        held = self._loader.lookup(batch)
        wanted = [key for key, is_held in zip(batch, held, strict=True) if is_held]
        if not wanted:
            return
        row = self._row
        try:
            self._loader.load(wanted, row, cancellable=True, check=False)
        finally:
            # also of a batch that was cut short, whose pages so far are good
            handles, row.handles = row.handles, {}
            near = [h for h in handles.values() if not self._memory.is_private(h.memory)]
            for handle in near:
                self._advise(handle)
            pinned, row.pinned_at = row.pinned_at, set()
            self._pool.release(pinned, row.owner)
            strays, row.strays = row.strays, set()
            for link in strays:
                self._pool.release_later(link, row.owner)
            with self._changed:
                for key, handle in handles.items():
                    if handle not in near:
                        self._held[key] = None
                while len(self._held) > self._max_pages:
                    self._let_go(next(iter(self._held)))
            self._counters.add(pages_prefetched=len(handles))

    def _let_go(self, key: PageKey) -> None:
        del self._held[key]
        self._private.let_go(key, self._row.owner)

    def _advise(self, handle: PageHandle) -> None:
        """The kernel may read the page from disk now; nothing happens to one that is in memory."""
        n_bytes = self._memory.geometry.page_nbytes
        start = self._memory.slot_of(handle) * n_bytes
        advise(self._memory.memories[handle.memory], start, n_bytes)


def advise(memory: Any, start: int, n_bytes: int) -> None:
    """Tells the kernel that bytes of a mapped array will be read soon (MADV_WILLNEED)."""
    mapped = memory
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "obj", None) or getattr(mapped, "base", None)
    if mapped is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError, ValueError):
        mapped.madvise(mmap.MADV_WILLNEED, first, start + n_bytes - first)
