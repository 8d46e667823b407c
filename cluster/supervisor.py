"""Watches parts over the transport, finds them again, tells workers and stores which stores exist.

Knows nothing of how parts are started: that is the PartHost's business.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.errors import LongreachError
from ..core.store_config import StoreConfig
from ..kvstore.membership import Member, Membership
from ..kvstore.transport import Channel, connect
from .processes import process_alive
from .runtime import NOTIFY_TIMEOUT_S, PING_TIMEOUT_S, Located, PartKind, ask_stats, ping
from .store_members import SeenStore, StoreMembers

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
FIND_INTERVAL_S = 0.25
FIND_TIMEOUT_S = 5.0
"""Deadline of one attempt to find a lost part; attempts go on until it is found."""


class PartHost(Protocol):
    """What starts parts. Both methods are called from the part's own watch thread."""

    def locate(self, part_id: str, timeout_s: float) -> Located:
        """Where the part is now. Raises LongreachError while it is not up."""
        ...

    def restart(self, part_id: str) -> None:
        """End a part that hangs, so that it comes up anew. Must not wait."""
        ...


@dataclass
class Part:
    """One part and what is known of it. `channel` is set exactly while it is live.

    `told` is what a worker or a store has acknowledged of the others, `member` a store as it was when
    it came up.
    """

    part_id: str
    kind: PartKind
    located: Located | None = None
    channel: Channel | None = None
    restarts: int = 0
    lost_since_s: float | None = None
    restart_asked_s: float | None = None
    error: str = ""
    told: dict[str, Any] | None = None
    member: Member | None = None
    wake: threading.Event = field(default_factory=threading.Event)

    @property
    def live(self) -> bool:
        return self.channel is not None


class Supervisor:
    """A thread per part: pings it while it is live, finds it again when it is lost.

    A worker is handed out by `live` only after it knows this gateway's epoch and the members of the
    store; later changes reach workers and stores in their own threads, again and again until
    acknowledged.
    """

    def __init__(self, host: PartHost, silence_s: float, store: StoreConfig) -> None:
        self._host = host
        self._silence_s = silence_s
        self._members = StoreMembers(store.repair_delay_s)
        self._replicas = store.replicas
        self._epoch = 0
        self._parts: dict[str, Part] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def adopt(self, part_id: str, kind: PartKind, located: Located) -> Part:
        """Take a part that was just located. It counts as live from now on, a store if it answers."""
        part = Part(part_id, kind, located, connect(located.address))
        if kind == "store" and part.channel is not None:
            try:
                part.member = _member(part_id, located, part.channel)
            except LongreachError as exc:
                self._lose(part, f"does not say what it is: {exc.message}")
        with self._lock:
            self._parts[part_id] = part
        return part

    def watch(self, epoch: int) -> None:
        """Greet the adopted workers with the epoch, then watch everything."""
        self._epoch = epoch
        with self._lock:
            self._members.begin(epoch)
        for part in self.parts("worker"):
            if part.channel is not None:
                self._greet(part, part.channel)
        for part in self.parts():
            thread = threading.Thread(
                target=self._watch, args=(part,), name=f"watch {part.part_id}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the watch threads and close the channels."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        for part in self.parts():
            part.wake.set()
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        for part in self.parts():
            self._take_channel(part)

    def parts(self, kind: PartKind | None = None) -> list[Part]:
        with self._lock:
            return [p for p in self._parts.values() if kind in (None, p.kind)]

    def live(self, kind: PartKind) -> dict[str, Channel]:
        with self._lock:
            return {
                p.part_id: p.channel
                for p in self._parts.values()
                if p.kind == kind and p.channel is not None
            }

    def addresses(self, kind: PartKind) -> dict[str, str]:
        """Addresses of the live parts of a kind."""
        with self._lock:
            return {
                p.part_id: p.located.address
                for p in self._parts.values()
                if p.kind == kind and p.live and p.located is not None
            }

    def membership(self) -> Membership:
        """The stores as they are placed on now; its epoch rises with every change."""
        with self._lock:
            seen = [
                SeenStore(part.member, None if part.live else part.lost_since_s)
                for part in self._parts.values()
                if part.member is not None
            ]
            return self._members.update(seen, time.monotonic())

    def drain_store(self, store_id: str) -> Membership:
        """Mark a store as draining. Raises NotFound, FailedPrecondition."""
        self.membership()
        with self._lock:
            membership = self._members.drain(store_id)
        self._wake()
        return membership

    def fail(self, part_id: str) -> None:
        """Someone saw this part die: it is lost until it is found again."""
        with self._lock:
            part = self._parts.get(part_id)
        if part is not None and part.live:
            self._lose(part, "reported as failed")
            part.wake.set()

    def pid(self, part_id: str) -> int | None:
        """Process of a part where it was located last; None if it is not on this machine."""
        with self._lock:
            part = self._parts.get(part_id)
            return part.located.pid if part is not None and part.located is not None else None

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per part: its state here and the numbers it gives of itself."""
        report: dict[str, dict[str, Any]] = {}
        for part in self.parts():
            with self._lock:
                channel, located = part.channel, part.located
            report[part.part_id] = {
                **ask_stats(channel),
                "kind": part.kind,
                "state": "live" if channel is not None else "lost",
                "address": located.address if located else "",
                "pid": (located.pid if located else None) or 0,
                "node_id": located.node_id if located else "",
                "restarts": part.restarts,
            }
        return report

    def _watch(self, part: Part) -> None:
        heard_s = time.monotonic()
        while not self._stopping.is_set():
            if not part.live:
                if not self._find(part):
                    part.wake.wait(FIND_INTERVAL_S)
                    part.wake.clear()
                heard_s = time.monotonic()
                continue
            part.wake.wait(PING_INTERVAL_S)
            part.wake.clear()
            channel = part.channel
            if self._stopping.is_set() or channel is None:
                continue
            if self._process_gone(part):
                self._lose(part, "its process is gone")
            elif ping(channel):
                heard_s = time.monotonic()
                self._tell(part, channel)
            elif time.monotonic() - heard_s > self._silence_s:
                self._lose(part, f"no answer for {self._silence_s:.0f} s")
                self._host.restart(part.part_id)

    def _process_gone(self, part: Part) -> bool:
        pid = part.located.pid if part.located else None
        return pid is not None and not process_alive(pid)

    def _find(self, part: Part) -> bool:
        """One attempt to bring a lost part back; True if it is live now."""
        try:
            found = self._host.locate(part.part_id, FIND_TIMEOUT_S)
        except LongreachError as exc:
            part.error = exc.message
            return False
        if found.pid is not None and not process_alive(found.pid):
            return False  # still the dead incarnation
        channel = connect(found.address)
        if not ping(channel):
            channel.close()
            part.error = f"no answer at {found.address}"
            waiting_since_s = part.restart_asked_s or part.lost_since_s
            if waiting_since_s and time.monotonic() - waiting_since_s > self._silence_s:
                self._host.restart(part.part_id)
                part.restart_asked_s = time.monotonic()
            return False
        try:
            is_store = part.kind == "store"
            member = _member(part.part_id, found, channel) if is_store else None
            self._greet(part, channel)
        except LongreachError as exc:
            channel.close()
            part.error = exc.message
            return False
        with self._lock:
            restarted = part.located != found
            part.restarts += restarted
            part.located, part.channel, part.member = found, channel, member
            part.lost_since_s, part.restart_asked_s, part.error = None, None, ""
        log.warning(
            "part back part=%s address=%s restarted=%s", part.part_id, found.address, restarted
        )
        self._wake(part)
        return True

    def _greet(self, part: Part, channel: Channel) -> None:
        """Tell a worker that is about to be handed out the epoch and where the others are."""
        part.told = None
        if part.kind != "worker":
            return
        channel.call("epoch", {"epoch": self._epoch}, timeout_s=NOTIFY_TIMEOUT_S)
        self._tell(part, channel, must=True)

    def _tell(self, part: Part, channel: Channel, *, must: bool = False) -> None:
        """Send a worker or a store what it does not know yet; without `must`, failures wait."""
        if part.kind == "retriever":
            return
        now: dict[str, Any] = {"membership": self.membership().to_wire()}
        if part.kind == "worker":
            method = "stores"
            now["retrievers"] = self.addresses("retriever")
        else:
            method = "members"
            now["replicas"] = self._replicas
        if part.told == now:
            return
        try:
            channel.call(method, {**now, **self._loss_age(part)}, timeout_s=NOTIFY_TIMEOUT_S)
        except LongreachError as exc:
            if must:
                raise
            log.warning("members not delivered part=%s: %s", part.part_id, exc.message)
            return
        part.told = now

    def _loss_age(self, part: Part) -> dict[str, float]:
        """For a store: how long ago a store was lost, so that it can tell how long repair took."""
        lost_s = self._members.last_loss_s
        if part.kind != "store" or lost_s is None:
            return {}
        return {"loss_age_s": time.monotonic() - lost_s}

    def _wake(self, changed: Part | None = None) -> None:
        """Something is to be told: to the workers, and of a store also to the stores."""
        if changed is None or changed.kind != "worker":
            for part in self.parts():
                part.wake.set()

    def _lose(self, part: Part, reason: str) -> None:
        if not self._take_channel(part):
            return
        part.lost_since_s = time.monotonic()
        part.error = reason
        log.warning("part lost part=%s reason=%s", part.part_id, reason)
        self._wake(part)

    def _take_channel(self, part: Part) -> bool:
        with self._lock:
            channel, part.channel = part.channel, None
        if channel is None:
            return False
        channel.close()
        return True


def _member(part_id: str, located: Located, channel: Channel) -> Member:
    """The store as a member, by what it says of itself. Raises LongreachError."""
    hello = channel.call("hello", timeout_s=PING_TIMEOUT_S).header
    zone = located.zone or hello.get("zone", "")
    weight, draining = hello.get("weight", 1.0), hello.get("draining", False)
    return Member(part_id, located.address, located.node_id, zone, weight, draining)
