"""A store shard behind the transport. Decodes requests, serialises the shard, streams pages.

The shard is guarded by one lock. Hashing and copying page bytes happen outside of it: a pinned slot
does not change, and an open write belongs to its owner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..core.clock import Clock, SystemClock
from ..core.config import StoreConfig
from ..core.errors import (
    Draining,
    FailedPrecondition,
    InvalidInput,
    LongreachError,
    NotFound,
    StoreFull,
)
from ..core.page_key import PageKey, RecipeFingerprint
from .arena import Arena, sweep
from .membership import Membership
from .page import (
    PageGeometry,
    checksums_from_wire,
    checksums_to_wire,
    page_checksums,
)
from .repairer import Repairer
from .shard import HeldPage, OpenWrite, StoreShard
from .transport import Buffer, Reply

Header = dict[str, Any]
MAX_KEYS = 100_000
"""Keys in one request (6.4 million tokens of 64-token pages)."""


def _keys(header: Header) -> list[PageKey]:
    keys = header.get("keys")
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise InvalidInput(f"`keys` must be a list of at most {MAX_KEYS} page keys")
    for key in keys:
        if not isinstance(key, bytes) or len(key) != 32:
            raise InvalidInput(f"a page key is 32 bytes, got {key!r:.80}")
    return keys


def _text(header: Header, field: str) -> str:
    value = header.get(field)
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"`{field}` must be text, got {value!r:.80}")
    return value


def _seconds(header: Header) -> float:
    value = header.get("lease_s")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:
        raise InvalidInput(f"`lease_s` must be seconds above 0, got {value!r:.80}")
    return float(value)


def _number(header: Header, field: str) -> int:
    value = header.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(f"`{field}` must be a whole number, got {value!r:.80}")
    return value


def _located(page: HeldPage) -> Header:
    return {
        "slot": page.slot,
        "checksums": checksums_to_wire(page.checksums),
        "recipe": page.recipe,
    }


class StoreService:
    """Service of one store. `faults` enables the method `corrupt` (tests, fault plans)."""

    def __init__(
        self,
        store_id: str,
        node_id: str,
        arena_dir: str,
        geometry: PageGeometry,
        capacity_bytes: int,
        *,
        faults: bool = False,
        clock: Clock | None = None,
        config: StoreConfig | None = None,
    ) -> None:
        """config: the tiers' settings; none takes their defaults (no disk)."""
        self.store_id = store_id
        self.node_id = node_id
        self.geometry = geometry
        sweep(arena_dir)
        self._arena = Arena.create(arena_dir, geometry, capacity_bytes, store_id)
        self._shard = StoreShard(self._arena)
        self._lock = threading.Lock()
        self._clock = clock or SystemClock()
        self._faults = faults
        self._draining = False
        self._closed = False
        settings = config or StoreConfig()
        self._zone = settings.zone
        self._repairer = Repairer(store_id, self.handle, settings.repair_bytes_per_s)
        self._methods: dict[str, Callable[[Header, Sequence[memoryview]], Reply]] = {
            "hello": self._hello,
            "lookup": self._lookup,
            "prepare_load": self._prepare_load,
            "complete_load": self._complete_load,
            "prepare_store": self._prepare_store,
            "complete_store": self._complete_store,
            "abort_store": self._abort_store,
            "write": self._write,
            "touch": self._touch,
            "drop": self._drop,
            "report_corrupt": self._report_corrupt,
            "renew": self._renew,
            "release": self._release,
            "stats": self._stats,
            "drain": self._drain,
            "health": self._health,
            "list": self._list,
            "members": self._members,
            "repair_status": self._repair_status,
            "corrupt": self._corrupt,
        }

    @property
    def incarnation(self) -> str:
        """Changes with every start: slots named by another incarnation mean nothing here."""
        return self._arena.path.name

    def handle(
        self, method: str, header: Header, buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        if method == "read":
            return self._read(header)
        handler = self._methods.get(method)
        if handler is None:
            raise InvalidInput(f"a store has no method {method!r}")
        return handler(header, buffers)

    def stats(self) -> dict[str, int]:
        with self._lock:
            self._shard.expire(self._now())
            return self._shard.stats()

    def drain(self) -> None:
        """Refuses new pages; pages held can still be read."""
        self._draining = True

    def close(self) -> None:
        """Removes the arena's name. Whoever has it mapped can go on reading."""
        self._closed = True
        self._repairer.close()
        self._arena.close()

    def _now(self) -> float:
        return self._clock.monotonic_s()

    def _hello(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        return Reply(
            {
                "store_id": self.store_id,
                "node_id": self.node_id,
                "incarnation": self.incarnation,
                "arena": str(self._arena.path),
                "geometry": self.geometry.to_dict(),
                "n_slots": self._arena.n_slots,
                "zone": self._zone,
                "weight": self._arena.n_slots * self.geometry.page_nbytes,
                "draining": self._repairer.draining,
            }
        )

    def _lookup(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys = _keys(header)
        with self._lock:
            # the epoch: whoever asks may drop its own copy if both know the same stores
            return Reply({"held": self._shard.lookup(keys), "epoch": self._repairer.epoch})

    def _prepare_load(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys, owner, lease_s = _keys(header), _text(header, "owner"), _seconds(header)
        pages = self._pin(keys, owner, lease_s, verify=bool(header.get("verify", True)))
        located = [_located(page) if page is not None else None for page in pages]
        return Reply({"incarnation": self.incarnation, "pages": located})

    def _pin(
        self, keys: list[PageKey], owner: str, lease_s: float, verify: bool
    ) -> list[HeldPage | None]:
        with self._lock:
            pages = self._shard.prepare_load(keys, owner, self._now(), lease_s, verify=False)
        if not verify:
            return pages
        # pinned, so the bytes stay where they are while they are hashed outside the lock
        for i, page in enumerate(pages):
            if page is not None and not self._shard.is_intact(page):
                pages[i] = None
                with self._lock:
                    self._shard.complete_load([page.key], owner)
                    self._shard.report_corrupt(page.key, page.slot)
        return pages

    def _complete_load(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys, owner = _keys(header), _text(header, "owner")
        with self._lock:
            self._shard.complete_load(keys, owner)
        return Reply({})

    def _read(self, header: Header) -> Iterator[Reply]:
        """One reply per key, in order: the page's bytes, or `found` False. Every page read stays
        pinned for the owner until it says complete_load or release, because its bytes are sent
        from the arena itself."""
        keys, owner, lease_s = _keys(header), _text(header, "owner"), _seconds(header)
        for key in keys:
            page = self._pin([key], owner, lease_s, verify=True)[0]
            if page is None:
                yield Reply({"found": False})
            else:
                view: Buffer = memoryview(self._arena.slots[page.slot])
                yield Reply({"found": True, **_located(page)}, [view])

    def _begin_store(self, header: Header) -> OpenWrite | HeldPage:
        key, parent = _keys({"keys": [header.get("key"), header.get("parent")]})
        recipe = header.get("recipe")
        if not isinstance(recipe, bytes):
            raise InvalidInput("`recipe` must be bytes")
        checksums = checksums_from_wire(header.get("checksums"), self.geometry)
        owner, lease_s = _text(header, "owner"), _seconds(header)
        if self._draining or self._closed:
            raise Draining(f"store {self.store_id} is draining and takes no new pages")
        with self._lock:
            if not header.get("evict", True) and not self._shard.has_room(key):
                raise StoreFull(f"store {self.store_id} has no free room for a page not in use")
            return self._shard.prepare_store(
                key, parent, RecipeFingerprint(recipe), checksums, owner, self._now(), lease_s
            )

    def _prepare_store(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`pages`: a list of {key, parent, recipe, checksums}. The reply has for each: a write to
        fill, the page held already, or the error that concerns it alone."""
        pages = header.get("pages")
        if not isinstance(pages, list) or len(pages) > MAX_KEYS:
            raise InvalidInput(f"`pages` must be a list of at most {MAX_KEYS} pages")
        results: list[Header] = []
        for page in pages:
            if not isinstance(page, dict):
                raise InvalidInput(f"an entry of `pages` must be a map, got {page!r:.80}")
            try:
                begun = self._begin_store({**header, **page})
            except LongreachError as exc:
                results.append({"failed": exc.to_wire()})
                continue
            if isinstance(begun, HeldPage):
                results.append({"held": _located(begun)})
            else:
                results.append({"write_id": begun.write_id, "slot": begun.page.slot})
        return Reply({"incarnation": self.incarnation, "pages": results})

    def _finish_store(self, write_id: int, owner: str, lease_s: float) -> HeldPage:
        with self._lock:
            write = self._shard.open_write(write_id, owner)
        actual = page_checksums(self._arena.slots[write.page.slot], self.geometry)
        with self._lock:
            return self._shard.complete_store(write_id, owner, self._now(), lease_s, actual)

    def _complete_store(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`writes`: write ids. The reply has for each the page that is held now, or its error."""
        owner, lease_s, writes = _text(header, "owner"), _seconds(header), header.get("writes")
        if not isinstance(writes, list) or not all(isinstance(w, int) for w in writes):
            raise InvalidInput("`writes` must be a list of write ids")
        results: list[Header] = []
        for write_id in writes:
            try:
                results.append({"held": _located(self._finish_store(write_id, owner, lease_s))})
            except LongreachError as exc:
                results.append({"failed": exc.to_wire()})
        return Reply({"incarnation": self.incarnation, "pages": results})

    def _abort_store(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        write_id, owner = _number(header, "write_id"), _text(header, "owner")
        with self._lock:
            self._shard.abort_store(write_id, owner)
        return Reply({})

    def _write(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """prepare, copy and complete in one request, for writers on other nodes. `pin` False leaves
        the page unpinned, `evict` False takes it only into free room."""
        if len(buffers) != 1 or buffers[0].nbytes != self.geometry.page_nbytes:
            sizes = [buffer.nbytes for buffer in buffers]
            raise InvalidInput(f"write wants one page of {self.geometry.page_nbytes} B: {sizes}")
        begun = self._begin_store(header)
        if isinstance(begun, HeldPage):
            page, duplicate = begun, True
        else:
            np.copyto(self._arena.slots[begun.page.slot], np.frombuffer(buffers[0], np.uint8))
            page = self._finish_store(begun.write_id, begun.owner, _seconds(header))
            duplicate = page is not begun.page
        if not header.get("pin", True):
            with self._lock:
                self._shard.complete_load([page.key], _text(header, "owner"))
        return Reply({"held": _located(page), "duplicate": duplicate})

    def _touch(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys = _keys(header)
        with self._lock:
            self._shard.touch(keys)
        return Reply({})

    def _drop(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`unpinned` True spares pages that somebody uses; with an `epoch` nothing is dropped under
        another one: the pages may belong here by now."""
        keys = _keys(header)
        with self._lock:
            if header.get("epoch") not in (None, self._repairer.epoch):
                return Reply({"n_dropped": 0})
            if header.get("unpinned"):
                found = [self._shard.find(key) for key in keys]
                keys = [page.key for page in found if page is not None and not page.n_pins]
            return Reply({"n_dropped": self._shard.drop(keys)})

    def _report_corrupt(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """A reader found bad bytes in a slot. Believed only if our own look confirms it: a reader
        with a broken mapping must not be able to empty the store."""
        (key,), slot = _keys({"keys": [header.get("key")]}), _number(header, "slot")
        with self._lock:
            page = self._shard.find(key)
            if page is None or page.slot != slot or self._shard.is_intact(page):
                return Reply({"dropped": False})
            return Reply({"dropped": self._shard.report_corrupt(key, slot)})

    def _renew(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        owners, lease_s = header.get("owners"), _seconds(header)
        if not isinstance(owners, list) or not all(isinstance(o, str) for o in owners):
            raise InvalidInput("`owners` must be a list of names")
        with self._lock:
            ended = [o for o in owners if not self._shard.renew(o, self._now(), lease_s)]
        return Reply({"ended": ended})

    def _release(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`prefix` True releases every owner whose name starts so (a worker that died)."""
        owner, prefix = _text(header, "owner"), bool(header.get("prefix", False))
        with self._lock:
            return Reply({"n_unpinned": self._shard.release(owner, prefix)})

    def _stats(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        return Reply({**self.stats(), **self._repairer.stats()})

    def _drain(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        self.drain()
        return Reply({})

    def _list(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """The pages after `after`, in key order, at most `limit`."""
        after, limit = header.get("after"), _number(header, "limit")
        with self._lock:
            keys = self._shard.keys_after(after, limit)
            found = [page for key in keys if (page := self._shard.find(key)) is not None]
            pages = [{"key": p.key, "parent": p.parent_key, "n_pins": p.n_pins} for p in found]
        return Reply({"pages": pages, "next": keys[-1] if len(keys) == limit else None})

    def _members(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`membership`, `replicas`, `loss_age_s` (seconds since a store was lost, if one was)."""
        membership = Membership.from_wire(header.get("membership"))
        replicas, loss_age_s = _number(header, "replicas"), header.get("loss_age_s")
        with self._lock:
            return Reply(self._repairer.told(membership, replicas, loss_age_s))

    def _repair_status(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        return Reply(self._repairer.status())

    def _health(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        state = "draining" if self._draining else "serving"
        return Reply({"state": state, "incarnation": self.incarnation})

    def _corrupt(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """Flips every bit of one byte of a held page's leaf; or, given `share`, the one bit at this
        share (0 to 1) of the page's bits."""
        if not self._faults:
            raise FailedPrecondition("fault injection is not enabled on this store")
        (key,), leaf = _keys({"keys": [header.get("key")]}), int(header.get("leaf", 0))
        with self._lock:
            page = self._shard.find(key)
            if page is None:
                raise NotFound(f"store {self.store_id} does not hold page {key.hex()[:16]}")
            at, bits = leaf * self.geometry.leaf_nbytes + int(header.get("byte", 0)), 0xFF
            if "share" in header:
                bit = int(float(header["share"]) * (8 * self.geometry.page_nbytes - 1))
                at, bits = bit // 8, 1 << bit % 8
            self._arena.slots[page.slot][at] ^= bits
        return Reply({"slot": page.slot})
