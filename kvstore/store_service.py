"""A store shard behind the transport: which request is whose, and the small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..core.clock import Clock, SystemClock
from ..core.errors import FailedPrecondition, InvalidInput, NotFound
from ..core.store_config import StoreConfig
from .disk import DiskHook
from .membership import Membership
from .page import PageGeometry
from .repairer import Repairer
from .store_core import StoreCore
from .store_inspection import StoreInspection
from .store_loads import StoreLoads
from .store_requests import Header, keys_of, lease_of, number_of, text_of
from .store_writes import StoreWrites
from .transport import Reply


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
        disk_hook: DiskHook | None = None,
    ) -> None:
        """config: the tiers' settings; none takes their defaults (no disk). disk_hook: faults of it."""
        self.store_id = store_id
        self.node_id = node_id
        self.geometry = geometry
        self._core = core = StoreCore(
            store_id,
            arena_dir,
            geometry,
            capacity_bytes,
            config or StoreConfig(),
            clock or SystemClock(),
        )
        if core.disk is not None:
            core.disk.hook = disk_hook
        self._shard = core.shard
        self._lock = core.lock
        self._faults = faults
        loads, writes = StoreLoads(core), StoreWrites(core)
        self._read = loads.read
        self._inspection = StoreInspection(core.shard, core.lock, core.scrubber)
        self._repairer = Repairer(store_id, self.handle, core.config.repair_bytes_per_s)
        self._methods: dict[str, Callable[[Header, Sequence[memoryview]], Reply]] = {
            "hello": self._hello,
            "lookup": self._lookup,
            "prepare_load": loads.prepare_load,
            "complete_load": loads.complete_load,
            "prepare_store": writes.prepare_store,
            "complete_store": writes.complete_store,
            "abort_store": writes.abort_store,
            "write": writes.write,
            "touch": self._touch,
            "drop": self._drop,
            "report_corrupt": self._report_corrupt,
            "renew": self._renew,
            "release": self._release,
            "stats": self._stats,
            "drain": self._drain,
            "health": self._health,
            "list": self._inspection.list,
            "scrub": self._inspection.scrub,
            "members": self._members,
            "repair_status": self._repair_status,
            "corrupt": self._corrupt,
        }

    @property
    def incarnation(self) -> str:
        """Changes with every start: slots named by another incarnation mean nothing here."""
        return self._core.incarnation

    def handle(
        self, method: str, header: Header, buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        if method == "read":
            return self._read(header)
        if method == "verify":
            return self._inspection.verify(header)
        handler = self._methods.get(method)
        if handler is None:
            raise InvalidInput(f"a store has no method {method!r}")
        return handler(header, buffers)

    def stats(self) -> dict[str, int]:
        with self._lock:
            self._shard.expire(self._core.now())
            return {**self._shard.stats(), **self._core.scrubber.totals()}

    def drain(self) -> None:
        """Refuses new pages; pages held can still be read."""
        self._core.takes_pages = False

    def close(self) -> None:
        """Keeps what it can of the arena on disk (store.flush_s) and removes the arena's name. Whoever
        has it mapped can go on reading."""
        self._repairer.close()
        self._core.close()

    def _hello(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        core = self._core
        return Reply(
            {
                "store_id": self.store_id,
                "node_id": self.node_id,
                "incarnation": self.incarnation,
                "arena": str(core.arena.path),
                "geometry": self.geometry.to_dict(),
                "n_slots": core.arena.n_slots,
                "disk": str(core.disk.path) if core.disk is not None else None,
                "disk_slots": core.shard.slots.n_disk,
                "zone": core.config.zone,
                "weight": core.capacity_bytes,
                "draining": self._repairer.draining,
            }
        )

    def _lookup(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys = keys_of(header)
        with self._lock:
            # the epoch: whoever asks may drop its own copy if both know the same stores
            return Reply({"held": self._shard.lookup(keys), "epoch": self._repairer.epoch})

    def _touch(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        keys = keys_of(header)
        with self._lock:
            self._shard.touch(keys)
        return Reply({})

    def _drop(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`unpinned` True spares pages that somebody uses; with an `epoch` nothing is dropped under
        another one: the pages may belong here by now."""
        keys = keys_of(header)
        with self._lock:
            if header.get("epoch") not in (None, self._repairer.epoch):
                return Reply({"n_dropped": 0})
            if header.get("unpinned"):
                found = [self._shard.find(key) for key in keys]
                keys = [page.key for page in found if page is not None and not page.n_pins]
            return Reply({"n_dropped": self._shard.drop(keys)})

    def _report_corrupt(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """A reader found bad bytes. Believed only if our own look at the copies confirms it: a reader
        with a broken mapping must not be able to empty the store."""
        (key,) = keys_of({"keys": [header.get("key")]})
        return Reply({"dropped": bool(self._core.scrubber.check(key))})

    def _renew(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        owners, lease_s = header.get("owners"), lease_of(header)
        if not isinstance(owners, list) or not all(isinstance(o, str) for o in owners):
            raise InvalidInput("`owners` must be a list of names")
        with self._lock:
            ended = [o for o in owners if not self._shard.renew(o, self._core.now(), lease_s)]
        return Reply({"ended": ended})

    def _release(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`prefix` True releases every owner whose name starts so (a worker that died)."""
        owner, prefix = text_of(header, "owner"), bool(header.get("prefix", False))
        with self._lock:
            return Reply({"n_unpinned": self._shard.release(owner, prefix)})

    def _stats(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        return Reply({**self.stats(), **self._repairer.stats()})

    def _drain(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        self.drain()
        return Reply({})

    def _members(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """`membership`, `replicas`, `loss_age_s` (seconds since a store was lost, if one was)."""
        membership = Membership.from_wire(header.get("membership"))
        replicas, loss_age_s = number_of(header, "replicas"), header.get("loss_age_s")
        with self._lock:
            return Reply(self._repairer.told(membership, replicas, loss_age_s))

    def _repair_status(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        return Reply(self._repairer.status())

    def _health(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        state = "serving" if self._core.takes_pages else "draining"
        return Reply({"state": state, "incarnation": self.incarnation})

    def _corrupt(self, header: Header, buffers: Sequence[memoryview]) -> Reply:
        """Flips every bit of one byte of a held page's leaf; or, given `share`, the one bit at this
        share (0 to 1) of the page's bits."""
        if not self._faults:
            raise FailedPrecondition("fault injection is not enabled on this store")
        (key,), leaf = keys_of({"keys": [header.get("key")]}), int(header.get("leaf", 0))
        with self._lock:
            page = self._shard.find(key)
            if page is None:
                raise NotFound(f"store {self.store_id} does not hold page {key.hex()[:16]}")
            at, bits = leaf * self.geometry.leaf_nbytes + int(header.get("byte", 0)), 0xFF
            if "share" in header:
                bit = int(float(header["share"]) * (8 * self.geometry.page_nbytes - 1))
                at, bits = bit // 8, 1 << bit % 8
            data = self._shard.slots.read(page.slot).copy()
            data[at] ^= bits
            self._shard.slots.write(page.slot, data)
        return Reply({"slot": page.slot})
