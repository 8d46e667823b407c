"""One store as a client sees it: its channel, its mapped arena, and whether it can be trusted now."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from ..core.clock import Clock
from ..core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    LongreachError,
    StoreFull,
    StoreUnreachable,
    Unavailable,
    error_from_wire,
)
from ..core.page_key import PageKey, RecipeFingerprint
from .client_memory import ClientMemory
from .greeting import Greeting, map_store
from .page import Bytes, Checksums, PageGeometry, checksums_from_wire, checksums_to_wire
from .rpc_frames import STREAM_CREDIT
from .transport import Buffer, Channel, Reply, ReplyStream, connect

logger = logging.getLogger(__name__)

WrapChannel = Callable[[str, Channel], Channel]
"""Puts something around the channel to the store of this id (fault injection)."""
COOL_DOWN_S = 2.0
MAX_COOL_DOWN_S = 30.0
HELLO_TIMEOUT_S = 2.0
"""A store that failed must answer this fast before real work is given to it again."""
BUNDLE_BYTES = 2 << 20
"""Pages that share a message, in bytes: half the cost per byte of one by one at 256 KiB."""
AHEAD_BYTES = 4 << 20
"""Pages that a store may send ahead of their reader; on a slow link, what the next call waits for."""
MAX_REPLY_BYTES = 4 << 20
"""Bound on the checksums in one reply header."""


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """A page held by a store. memory: index of the mapped arena or disk, with the page's slot there;
    None if only the wire reaches it (slot is the store's own number then)."""

    memory: int | None
    slot: int
    checksums: Checksums
    recipe: RecipeFingerprint
    duplicate: bool = False


class StoreLink:
    """Thread-safe. Every call has a deadline; a failure starts a cool-down and becomes
    StoreUnreachable."""

    def __init__(
        self,
        store_id: str,
        address: str,
        memory: ClientMemory,
        node_id: str,
        timeout_s: float,
        force_wire: bool,
        clock: Clock,
        wrap_channel: WrapChannel | None = None,
    ) -> None:
        self.store_id = store_id
        self.address = address
        self.n_failures = 0
        self.closed = False
        self._memory = memory
        self._node_id = node_id
        self._timeout_s = timeout_s
        self._force_wire = force_wire
        self._clock = clock
        channel = connect(address)
        self._channel = wrap_channel(store_id, channel) if wrap_channel else channel
        self._hello: Greeting | None = None
        self._hello_lock = threading.Lock()
        self._down_until_s = float("-inf")
        self._n_failures_in_a_row = 0
        pages_ahead = AHEAD_BYTES // memory.geometry.page_nbytes
        self._pages_ahead = min(max(pages_ahead, STREAM_CREDIT), 64)
        page_wire_bytes = memory.geometry.n_leaves * 8 + 64
        self._keys_per_call = max(1, MAX_REPLY_BYTES // page_wire_bytes)

    @property
    def live(self) -> bool:
        return not self.closed and self._clock.monotonic_s() >= self._down_until_s

    @property
    def fair_timeout_s(self) -> float:
        """Silence shorter than this is no failure of the store."""
        return min(self._timeout_s / 4, 1.0)

    @property
    def mapped(self) -> bool:
        """Whether pages of this store are read in place. Raises StoreUnreachable."""
        return self._ready().memory is not None

    @property
    def greeted(self) -> bool:
        return self._hello is not None

    def greet(self) -> None:
        """Learns where the store's pages are. Raises StoreUnreachable."""
        self._ready()

    @property
    def near(self) -> bool:
        """Whether the store is known to be mapped; asks nobody."""
        hello = self._hello
        return hello is not None and hello.memory is not None

    def close(self) -> None:
        self.closed = True
        self._channel.close()
        self._memory.retire(self.store_id)

    def call(
        self,
        method: str,
        header: dict[str, Any],
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
        n_attempts: int = 1,
    ) -> Reply:
        """n_attempts above 1 only for requests that may be repeated."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        retrying = Retrying(
            stop=stop_after_attempt(n_attempts),
            wait=wait_fixed(0.05),
            retry=retry_if_exception_type(Unavailable),
            reraise=True,
        )
        try:
            reply = retrying(self._channel.call, method, header, buffers, timeout_s=timeout_s)
        except (Unavailable, DeadlineExceeded) as exc:
            if isinstance(exc, DeadlineExceeded) and timeout_s < self.fair_timeout_s:
                # the caller was in a hurry: nothing to hold against the store
                raise StoreUnreachable(f"store {self.store_id}: {exc.message}") from exc
            raise self._failed(method, exc) from exc
        self._n_failures_in_a_row = 0
        return reply

    def lookup(self, keys: Sequence[PageKey]) -> list[bool]:
        reply = self.call("lookup", {"keys": list(keys)}, n_attempts=2)
        return [bool(held) for held in reply.header["held"]]

    def prepare_load(
        self, keys: Sequence[PageKey], owner: str, lease_s: float, timeout_s: float | None = None
    ) -> list[Copy | None]:
        """Pins pages for in-place reading; the caller verifies the bytes it maps."""
        copies: list[Copy | None] = []
        for first in range(0, len(keys), self._keys_per_call):
            part = list(keys[first : first + self._keys_per_call])
            header = {"keys": part, "owner": owner, "lease_s": lease_s, "verify": False}
            pages, hello = self._call_on_pages(
                "prepare_load", header, n_attempts=2, timeout_s=timeout_s
            )
            copies += [self._copy(page, hello) if page is not None else None for page in pages]
        return copies

    def read(
        self,
        keys: Sequence[PageKey],
        owner: str,
        lease_s: float,
        idle_timeout_s: float,
        opened: Callable[[ReplyStream], None],
    ) -> Iterator[tuple[PageKey, Copy | None, memoryview]]:
        """Pages over the wire, in order, None for those that are not held. They stay pinned until
        `release(owner)`. opened: is given the stream, so that others can cancel it."""
        header = {"keys": list(keys), "owner": owner, "lease_s": lease_s}
        try:
            with self._channel.stream(
                "read",
                header,
                idle_timeout_s=idle_timeout_s,
                credit=self._pages_ahead,
                bundle_bytes=BUNDLE_BYTES,
            ) as stream:
                opened(stream)
                for key, reply in zip(keys, stream, strict=False):
                    if reply.header["found"]:
                        copy = self._copy(reply.header, None)
                        yield key, copy, memoryview(reply.buffers[0])
                    else:
                        yield key, None, memoryview(b"")
        except (Unavailable, DeadlineExceeded) as exc:
            raise self._failed("read", exc) from exc

    def store(
        self,
        key: PageKey,
        parent_key: PageKey,
        recipe: RecipeFingerprint,
        checksums: Checksums,
        page: Bytes,
        owner: str,
        lease_s: float,
    ) -> Copy:
        """Writes one page: into the mapped slot, else over the wire. Returns the copy that the
        store holds now, which is another writer's if that one was first. It is pinned."""
        entry = {
            "key": key,
            "parent": parent_key,
            "recipe": recipe,
            "checksums": checksums_to_wire(checksums),
        }
        lease = {"owner": owner, "lease_s": lease_s}
        if not self.mapped:
            reply = self.call("write", {**entry, **lease}, [page.data])
            return self._copy(reply.header["held"], None, bool(reply.header["duplicate"]))
        (begun,), hello = self._call_on_pages("prepare_store", {"pages": [entry], **lease})
        if "failed" in begun:
            raise error_from_wire(begun["failed"])
        if "held" in begun:
            return self._copy(begun["held"], hello, duplicate=True)
        try:
            hello.fill(self._memory, begun["slot"], page)
        except OSError as exc:
            self.call("abort_store", {"write_id": begun["write_id"], "owner": owner}, n_attempts=2)
            raise StoreFull(f"the disk of store {self.store_id} takes no page: {exc}") from exc
        (done,), hello = self._call_on_pages(
            "complete_store", {"writes": [begun["write_id"]], **lease}
        )
        if "failed" in done:
            raise error_from_wire(done["failed"])
        return self._copy(done["held"], hello, duplicate=done["held"]["slot"] != begun["slot"])

    def report_corrupt(self, key: PageKey) -> None:
        """A copy of the page there is bad; the store looks for itself, and drops what is."""
        self.call("report_corrupt", {"key": key}, n_attempts=2)

    def release(self, owner: str) -> None:
        """Best effort: a store that cannot be reached lets the lease run out."""
        if self.live:
            timeout_s = min(self._timeout_s, HELLO_TIMEOUT_S)
            # not by `call`: behind pages that a slow link still carries, late is no failure
            self._channel.call("release", {"owner": owner}, timeout_s=timeout_s)

    def farewell(self, prefix: str) -> None:
        """Frees the pins of all owners whose name starts so, even if the store failed lately: it may
        be back, and nobody asks again."""
        timeout_s = min(self._timeout_s, HELLO_TIMEOUT_S)
        self._channel.call("release", {"owner": prefix, "prefix": True}, timeout_s=timeout_s)

    def renew(self, owners: list[str], lease_s: float) -> list[str]:
        """Owners whose lease had ended at the store."""
        reply = self.call("renew", {"owners": owners, "lease_s": lease_s}, n_attempts=2)
        return [str(owner) for owner in reply.header["ended"]]

    def _ready(self) -> Greeting:
        hello = self._hello
        if hello is not None:
            return hello
        with self._hello_lock:
            if self._hello is None:
                timeout_s = min(self._timeout_s, HELLO_TIMEOUT_S)
                reply = self.call("hello", {}, timeout_s=timeout_s, n_attempts=2)
                self._hello = self._map(reply.header)
            return self._hello

    def _map(self, header: dict[str, Any]) -> Greeting:
        geometry = PageGeometry.from_dict(header["geometry"])
        if geometry != self._memory.geometry:
            error = FailedPrecondition(
                f"store {self.store_id} holds pages of {geometry}, this worker's are "
                f"{self._memory.geometry}; give each model its own stores"
            )
            raise self._failed("hello", error) from error
        if self._force_wire or header["node_id"] != self._node_id:
            return Greeting(str(header["incarnation"]))
        return map_store(self.store_id, header, self._memory)

    def _call_on_pages(
        self,
        method: str,
        header: dict[str, Any],
        n_attempts: int = 1,
        timeout_s: float | None = None,
    ) -> tuple[list[Any], Greeting]:
        """The reply's pages and the greeting that their slots belong to. Slots mean nothing in
        another incarnation's arena, so a store that restarted is greeted again."""
        for _ in range(2 if method == "prepare_load" else 1):
            hello = self._ready()
            reply = self.call(method, header, n_attempts=n_attempts, timeout_s=timeout_s)
            if reply.header["incarnation"] == hello.incarnation:
                return reply.header["pages"], hello
            with self._hello_lock:
                if self._hello is hello:
                    self._hello = None
        raise StoreUnreachable(f"store {self.store_id} restarted during {method}; try again")

    def _copy(self, page: dict[str, Any], hello: Greeting | None, duplicate: bool = False) -> Copy:
        """hello None: the page came over the wire."""
        checksums = checksums_from_wire(page["checksums"], self._memory.geometry)
        memory, slot = (None, page["slot"]) if hello is None else hello.place(page["slot"])
        return Copy(memory, slot, checksums, RecipeFingerprint(page["recipe"]), duplicate)

    def _failed(self, method: str, exc: LongreachError) -> StoreUnreachable:
        self.n_failures += 1
        self._n_failures_in_a_row += 1
        pause_s = min(COOL_DOWN_S * 2 ** (self._n_failures_in_a_row - 1), MAX_COOL_DOWN_S)
        self._down_until_s = self._clock.monotonic_s() + pause_s
        # greeted anew before it is used again: it may be another incarnation
        self._hello = None
        logger.warning("store %s skipped for %.0f s: %s", self.store_id, pause_s, exc.message)
        return StoreUnreachable(f"store {self.store_id} at {self.address}: {method}: {exc.message}")
