"""What a decode worker uses: pages from and to the stores, with replicas, leases and checks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..core.clock import Clock, SystemClock
from ..core.errors import DeadlineExceeded, InvalidInput, LongreachError, Unavailable
from ..core.page_key import PageKey, RecipeFingerprint
from .byte_budget import ByteBudget
from .client_memory import ClientMemory, PageHandle
from .client_rows import PrivatePages, Row, RowTable
from .hedge import Hedging
from .membership import Membership
from .page import Bytes, PageGeometry
from .page_loader import PageLoader
from .page_share import FetchParts
from .page_storer import PageStorer
from .prefetcher import Prefetcher
from .store_link import WrapChannel
from .store_pool import Counters, StorePool

__all__ = ["PageClient", "PageHandle"]
logger = logging.getLogger(__name__)

N_STORE_THREADS = 4
N_CALL_THREADS = 32
"""At most; a share of a batch that waits for a silent store keeps one."""
WRITE_BEHIND_BYTES = 256 << 20
PREFETCH_BYTES = 64 << 20
MAINTENANCE_S = 2.0


class PageClient:
    """Pages of one worker. Thread-safe.

    `memories` are uint8 arrays that handles point into: arenas of stores on this node, mapped in
    place, and private memories for pages that came over the wire. Entries are only appended. A dead
    store's arena stays readable for as long as a row has pages there; after that it is empty. Pages
    that a row acquired or stored are pinned until `release(row)`; leases are renewed in the background
    for as long as the client lives.
    """

    def __init__(
        self,
        channels: Mapping[str, str] | Membership,
        geometry: PageGeometry,
        recipe: RecipeFingerprint,
        replicas: int,
        lease_s: float,
        timeout_s: float,
        node_id: str,
        owner: str,
        *,
        force_wire: bool = False,
        clock: Clock | None = None,
        wrap_channel: WrapChannel | None = None,
        hedge: bool = True,
        write_behind_bytes: int = WRITE_BEHIND_BYTES,
        prefetch_bytes: int = PREFETCH_BYTES,
    ) -> None:
        """channels: the stores, or only their addresses by id. owner: unique among the clients of the
        stores; a store frees all pins of `owner` on `release` with prefix. timeout_s: of one call, and
        of one batch of pages. force_wire: treat every store as if it were on another node. hedge: ask
        a replica too when a store is silent for long. write_behind_bytes: pages whose store may be
        waiting or running; more make `store` wait. prefetch_bytes: pages held for no row yet."""
        if replicas < 1:
            raise InvalidInput(f"replicas must be at least 1, got {replicas}")
        self.geometry = geometry
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._memory = ClientMemory(geometry)
        self._pool = StorePool(
            self._memory, node_id, timeout_s, force_wire, self._clock, wrap_channel
        )
        self._owner = owner
        self._rows = RowTable(owner)
        self._private = PrivatePages(self._memory)
        self._counters = Counters()
        # two pools: a store may wait for a load's calls, never the other way round
        self._calls = ThreadPoolExecutor(N_CALL_THREADS, "page-call")
        self._stores = ThreadPoolExecutor(N_STORE_THREADS, "page-store")
        self._writing = ByteBudget(write_behind_bytes)
        parts = FetchParts(
            self._pool,
            self._memory,
            self._rows,
            self._private,
            self._counters,
            recipe,
            lease_s,
            self._calls,
            Hedging(hedge),
        )
        self._loader = PageLoader(parts, replicas, timeout_s)
        self._prefetcher = Prefetcher(
            self._loader,
            self._pool,
            self._memory,
            self._private,
            self._counters,
            owner,
            prefetch_bytes,
        )
        self._storer = PageStorer(
            self._pool,
            self._memory,
            self._rows,
            self._private,
            self._loader,
            self._counters,
            recipe,
            replicas,
            lease_s,
        )
        self._pool.update(channels)
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._maintain, name="page-keeper", daemon=True)
        self._keeper.start()

    @property
    def memories(self) -> list[Bytes]:
        return self._memory.memories

    def page_bytes(self, handle: PageHandle) -> Bytes:
        """Where the page lies: uint8 [page_nbytes], a view."""
        return self._memory.page_of(handle)

    def lookup(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which pages at least one live store holds. Stores that do not answer count as empty."""
        return self._loader.lookup(keys) if keys else []

    def acquire(
        self, keys: Sequence[PageKey], row: str, timeout_s: float | None = None
    ) -> list[PageHandle | None]:
        """Pins pages for a row and checks every leaf. keys: those needed first in front. None: no good
        copy came within timeout_s (the client's if None); recompute.

        Raises Cancelled if another thread releases the row meanwhile.
        """
        state = self._enter(row)
        try:
            with self._prefetcher.acquiring(keys):
                found = self._loader.load(keys, state, timeout_s, cancellable=True)
            self._counters.add(pages_loaded=len(found))
            return [found.get(key) for key in keys]
        finally:
            self._leave(state)

    def prefetch(self, keys: Sequence[PageKey]) -> None:
        """A hint that these pages will be acquired soon, the first of them first: pages of other nodes
        are fetched behind, the kernel reads those on this node's disk. Never waits."""
        self._prefetcher.hint(keys)

    def store(self, key: PageKey, parent_key: PageKey, page: Bytes, row: str) -> Future[PageHandle]:
        """Write-behind. The future resolves when min(replicas, live stores) hold the page, to a
        handle on the stored bytes, pinned for the row; if another writer was first, those are its
        bytes. page: uint8 [page_nbytes], contiguous, unchanged until then.

        Waits while write_behind_bytes are under way, then raises DeadlineExceeded. The future
        raises StoreFull or StoreUnreachable if no store took the page.
        """
        if page.nbytes != self.geometry.page_nbytes or not page.flags.c_contiguous:
            raise InvalidInput(
                f"a page is {self.geometry.page_nbytes} contiguous bytes, got {page.nbytes}"
            )
        if not self._writing.take(page.nbytes, self._timeout_s):
            raise DeadlineExceeded(
                f"{self._writing.used} bytes are waiting to be stored and no page was within "
                f"{self._timeout_s:.0f} s; the stores are too slow or gone"
            )
        state = None
        try:
            state = self._enter(row)
            return self._stores.submit(self._store, key, parent_key, page.reshape(-1), state)
        except BaseException:
            self._writing.give_back(page.nbytes)
            if state is not None:
                self._leave(state)
            raise

    def report_corrupt(self, handle: PageHandle) -> PageHandle | None:
        """A leaf of this page failed its check after it was handed out. The copy is dropped; a
        verified one takes its place for every row that holds the page, or None is returned."""
        self._counters.add(corrupt_detected=1)
        if self._memory.is_private(handle.memory):
            self._private.spoil(handle)
        else:
            link = self._pool.links.get(handle.store_id)
            try:
                if link is not None and link.live:
                    link.report_corrupt(handle.key)
            except LongreachError as exc:
                logger.warning("a corrupt page could not be reported: %s", exc.message)
        replacement: PageHandle | None = None
        for held in self._rows.holding(handle.key):
            state = self._enter(held.name)
            try:
                replacement = self._loader.load([handle.key], state).get(handle.key)
            finally:
                self._leave(state)
        if replacement is not None:
            self._counters.add(replica_reads=1)
        return replacement

    def release(self, row: str) -> None:
        """Frees every page of a row. Its handles must not be used any more."""
        state = self._rows.remove(row)
        if state is not None:
            self._clean_up(state)

    def release_former(self, prefix: str) -> None:
        """Frees the pins of dead clients whose owner starts with `prefix` (a worker that was killed
        could not do it itself); stores that do not answer let those leases run out."""
        for link in self._pool.live().values():
            try:
                link.call("release", {"owner": prefix, "prefix": True}, n_attempts=2)
            except LongreachError as exc:
                logger.warning("a former worker's pins were not released: %s", exc.message)

    def lost(self, row: str) -> bool:
        """Whether a store ended a lease of this row (it was cut off for longer than lease_s): its
        handles may point at other pages' bytes; release the row and acquire again."""
        state = self._rows.get(row)
        return state is not None and state.lost

    def drop(self, keys: Sequence[PageKey]) -> None:
        """Every live store forgets these pages; pinned ones keep their bytes until released."""
        for link in self._pool.live().values():
            try:
                link.call("drop", {"keys": list(keys)}, n_attempts=2)
            except LongreachError as exc:
                logger.warning("pages were not dropped everywhere: %s", exc.message)

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Marks pages as used lately at every live store."""
        for link in self._pool.live().values():
            try:
                link.call("touch", {"keys": list(keys)}, n_attempts=2)
            except LongreachError as exc:
                logger.info("touch: %s", exc.message)

    def update_stores(self, stores: Membership | Mapping[str, str]) -> None:
        """The stores are these now: a store died, came back at another address, drains or joined.
        A membership older than the last is ignored; addresses alone mean stores of equal weight."""
        self._pool.update(stores)

    def stats(self) -> dict[str, int | float]:
        return {
            **self._counters.snapshot(),
            "store_failures": self._pool.n_failures(),
            "stores_live": len(self._pool.live()),
            "rows": len(self._rows.names()),
            "private_pages": self._memory.n_private_used(),
            "write_behind_bytes": self._writing.used,
        }

    def close(self) -> None:
        """Releases everything. Memories stay readable for as long as someone holds them."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._prefetcher.close()
        self._rows.cancel_all()
        self._stores.shutdown(wait=True, cancel_futures=True)
        self._keeper.join(timeout=self._timeout_s)
        for name in self._rows.names():
            # by force: stores that were cancelled before they began never leave their row
            state = self._rows.remove(name, force=True)
            if state is not None:
                self._clean_up(state)
        self._calls.shutdown(wait=True)
        self._pool.close(self._owner)

    def _store(self, key: PageKey, parent_key: PageKey, page: Bytes, state: Row) -> PageHandle:
        try:
            return self._storer.store(key, parent_key, page, state)
        finally:
            self._writing.give_back(page.nbytes)
            self._leave(state)

    def _enter(self, row: str) -> Row:
        if self._closing.is_set():
            raise Unavailable("the page client is closed")
        return self._rows.enter(row)

    def _leave(self, state: Row) -> None:
        if self._rows.leave(state):
            self._clean_up(state)

    def _clean_up(self, state: Row) -> None:
        self._pool.release(state.pinned_at, state.owner)
        for link in state.strays:
            self._pool.release_later(link, state.owner)
        self._private.release(state.owner)

    def _maintain(self) -> None:
        renew_every_s = self._lease_s / 3
        next_renewal_s = self._clock.monotonic_s() + renew_every_s
        while not self._closing.wait(min(MAINTENANCE_S, renew_every_s)):
            try:
                if self._clock.monotonic_s() >= next_renewal_s:
                    next_renewal_s = self._clock.monotonic_s() + renew_every_s
                    self._renew()
                self._pool.release_again()
                now_s = self._clock.monotonic_s()
                self._memory.sweep(self._rows.memories, now_s, 2 * self._timeout_s)
            except Exception:
                logger.exception("page maintenance failed; it goes on")

    def _renew(self) -> None:
        for link, rows in self._rows.owners_by_link().items():
            if not link.live:
                continue
            try:
                ended = link.renew(list(rows), self._lease_s)
            except LongreachError as exc:
                logger.warning("leases were not renewed: %s", exc.message)
                continue
            for owner in ended:
                # an owner without pins has no lease; only a row with pages there lost something
                row = rows[owner]
                if any(h.store_id == link.store_id for h in list(row.handles.values())):
                    row.lost = True
                    self._counters.add(leases_lost=1)
