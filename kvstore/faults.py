"""Shells that make a fault plan real: around a service and at a disk tier (links: link_faults.py).

They only ever lose, hold back or damage; what is damaged is page bytes, which are checked at every
hop. The numbers that they put beside a part's own stats tell that they are there.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ..core.errors import LongreachError, PageCorrupt
from ..core.fault_config import FaultsConfig
from .fault_plan import FaultPlan, Faults
from .transport import Buffer, Reply, Service, Unanswered

log = logging.getLogger(__name__)

SPARED = frozenset({"health", "stats", "hello", "corrupt", "repair_status"})
"""Requests that tell of a part and change nothing: without them nobody could see what happens."""
MAX_REPLIES_BEFORE_SILENCE = 32

Header = dict[str, Any]


class FaultCounts:
    """Decisions of one place, by method, and what was done. Thread-safe."""

    def __init__(self, plan: FaultPlan, where: str) -> None:
        self._plan = plan
        self.where = where
        self._calls: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._lock = threading.Lock()

    def decide(self, method: str) -> Faults:
        with self._lock:
            n = self._calls[method]
            self._calls[method] += 1
        return self._plan.decide(self.where, method, n)

    def add(self, kind: str) -> None:
        with self._lock:
            self._done[kind] += 1
        log.debug("fault injected kind=%s where=%s", kind, self.where)

    def snapshot(self) -> dict[str, int]:
        """What was done by kind, as `faults_dropped`; `faults_injected` is there even if it is 0."""
        with self._lock:
            counts = {f"faults_{kind}": n for kind, n in self._done.items()}
        return {"faults_injected": sum(counts.values()), **counts}


class FaultyService:
    """A service whose requests and answers get lost, late or damaged by a plan.

    `store`: the service holds pages; then their bytes are damaged too.
    """

    def __init__(
        self,
        service: Service,
        plan: FaultPlan,
        where: str,
        *,
        store: bool,
        disk: DiskFaults | None = None,
    ) -> None:
        self.service = service
        self.counts = FaultCounts(plan, where)
        self.is_store = store
        self._disk = disk
        self._paused_until_s = float("-inf")
        log.error("FAULTS ARE INJECTED at %s: %s", where, plan.config)

    def handle(
        self, method: str, header: Header, buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        self.hold()
        if method in SPARED:
            return self._labelled(method, self.service.handle(method, header, buffers))
        faults = self.counts.decide(method)
        if faults.drop:
            self.counts.add("dropped")
            raise Unanswered(method)
        if faults.delay_s:
            self.counts.add("delayed")
            time.sleep(faults.delay_s)
        damaged = self.is_store and method == "write" and faults.corrupt and bool(buffers)
        if damaged:
            buffers = [flipped(buffers[0], faults.where), *buffers[1:]]
        if self.is_store and method == "prepare_load":
            self._damage_at_rest(header.get("keys"))
        try:
            made = self.service.handle(method, header, buffers)
        except PageCorrupt:
            if damaged:
                self.counts.add("corrupt_write")
            raise
        if damaged and isinstance(made, Reply):
            # the bytes of a page that is held already are not looked at
            unread = made.header.get("duplicate", False)
            self.counts.add("corrupt_unread" if unread else "corrupt_write")
        if not isinstance(made, Reply):
            return _FaultyReplies(self, method, header, made, faults)
        if faults.lose_answer:
            self.counts.add("answers_lost")
            raise Unanswered(method)
        return made

    def pause(self, seconds: float) -> None:
        """Stands still, as a stopped process does, where there is no process to stop."""
        self._paused_until_s = time.monotonic() + seconds

    def hold(self) -> None:
        """Waits while the service is paused."""
        while (left_s := self._paused_until_s - time.monotonic()) > 0:
            time.sleep(left_s)

    def close(self) -> None:
        close = getattr(self.service, "close", None)
        if close is not None:
            close()

    def damage(self, key: object, share: float) -> bool:
        """Flips a bit of a page where the store holds it; False if it does not."""
        try:
            self.service.handle("corrupt", {"key": key, "share": share}, [])
        except LongreachError:
            return False
        return True

    def _damage_at_rest(self, keys: object) -> None:
        for key in keys if isinstance(keys, list) else []:
            faults = self.counts.decide("prepare_load.page")
            if faults.corrupt and self.damage(key, faults.where):
                self.counts.add("corrupt_mapped")

    def _labelled(self, method: str, made: Reply | Iterator[Reply]) -> Reply | Iterator[Reply]:
        if method != "stats" or not isinstance(made, Reply):
            return made
        counts = Counter(self.counts.snapshot())
        if self._disk is not None:
            counts.update(self._disk.counts.snapshot())
        return Reply({**made.header, **counts}, made.buffers)


class _FaultyReplies(Iterator[Reply]):
    """A stream whose replies come late, damaged, or not any more. Never out of order, none left out."""

    def __init__(
        self,
        shell: FaultyService,
        method: str,
        header: Header,
        replies: Iterator[Reply],
        faults: Faults,
    ) -> None:
        self._shell = shell
        self._method = f"{method}.reply"
        keys = header.get("keys")
        self._keys = keys if shell.is_store and method == "read" and isinstance(keys, list) else []
        self._replies = replies
        self._n_done = 0
        self._n_until_silence = -1
        if faults.lose_answer:
            self._n_until_silence = int(faults.where * MAX_REPLIES_BEFORE_SILENCE)

    def __next__(self) -> Reply:
        self._shell.hold()
        counts = self._shell.counts
        if self._n_done == self._n_until_silence:
            counts.add("answers_lost")
            raise Unanswered(self._method)
        faults = counts.decide(self._method)
        if faults.delay_s:
            counts.add("delayed")
            time.sleep(faults.delay_s)
        damage = faults.corrupt and self._n_done < len(self._keys)
        if damage and faults.at_rest and self._shell.damage(self._keys[self._n_done], faults.where):
            counts.add("corrupt_held")
        reply = next(self._replies)
        self._n_done += 1
        if damage and not faults.at_rest and reply.buffers:
            counts.add("corrupt_sent")
            first: Buffer = flipped(reply.buffers[0], faults.where)
            return Reply(reply.header, [first, *reply.buffers[1:]])
        return reply

    def cancel(self) -> None:
        cancel = getattr(self._replies, "cancel", None)
        if cancel is not None:
            cancel()

    def close(self) -> None:
        close = getattr(self._replies, "close", None)
        if close is not None:
            close()


class DiskFaults:
    """What a disk tier calls before it touches a slot: raises OSError, or sleeps."""

    def __init__(self, plan: FaultPlan, where: str) -> None:
        self.counts = FaultCounts(plan, where)

    def before_write(self, slot: int) -> None:
        faults = self._before("disk.write")
        if faults.disk_full:
            self.counts.add("disk_full")
            raise OSError(errno.ENOSPC, "no space left (fault plan)")

    def before_read(self, slot: int) -> None:
        self._before("disk.read")

    def _before(self, method: str) -> Faults:
        faults = self.counts.decide(method)
        if faults.disk_delay_s:
            self.counts.add("disk_slow")
            time.sleep(faults.disk_delay_s)
        if faults.disk_error:
            self.counts.add("disk_error")
            raise OSError(errno.EIO, "input/output error (fault plan)")
        return faults


def flipped(buffer: Buffer, share: float) -> memoryview:
    """A copy with one bit changed, the one at this share (0 to 1) of its bits."""
    copy = bytearray(buffer)
    bit = min(int(share * len(copy) * 8), len(copy) * 8 - 1)
    copy[bit // 8] ^= 1 << bit % 8
    return memoryview(copy)


def with_faults(
    service: Service,
    config: FaultsConfig,
    where: str,
    *,
    store: bool = False,
    disk: DiskFaults | None = None,
) -> Service:
    """The service itself, unless the plan has faults for it. disk: its disk tier's, to be counted."""
    if not config.in_parts:
        return service
    return FaultyService(service, FaultPlan(config), where, store=store, disk=disk)


def disk_faults(config: FaultsConfig, where: str) -> DiskFaults | None:
    """The hook of a disk tier; None if the plan has no faults for it."""
    return DiskFaults(FaultPlan(config), where) if config.of_disks else None
