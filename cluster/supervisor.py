"""Watches parts over the transport, finds them again, tells workers where the stores are.

Knows nothing of how parts are started: that is the PartHost's business.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.errors import LongreachError
from ..kvstore.transport import Channel, connect
from .processes import process_alive
from .runtime import NOTIFY_TIMEOUT_S, Located, PartKind, ask_stats, ping

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

    `told` is the map of addresses that a worker has acknowledged.
    """

    part_id: str
    kind: PartKind
    located: Located | None = None
    channel: Channel | None = None
    restarts: int = 0
    lost_since_s: float | None = None
    error: str = ""
    told: dict[str, dict[str, str]] | None = None
    wake: threading.Event = field(default_factory=threading.Event)

    @property
    def live(self) -> bool:
        return self.channel is not None


class Supervisor:
    """A thread per part: pings it while it is live, finds it again when it is lost.

    A worker is handed out by `live` only after it knows this gateway's epoch and the current
    addresses; later changes reach it in its own thread, again and again until acknowledged.
    """

    def __init__(self, host: PartHost, silence_s: float) -> None:
        self._host = host
        self._silence_s = silence_s
        self._epoch = 0
        self._parts: dict[str, Part] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def adopt(self, part_id: str, kind: PartKind, located: Located) -> Part:
        """Take a part that was just located; it counts as live from now on."""
        part = Part(part_id, kind, located, connect(located.address))
        with self._lock:
            self._parts[part_id] = part
        return part

    def watch(self, epoch: int) -> None:
        """Greet the adopted workers with the epoch, then watch everything."""
        self._epoch = epoch
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

    def fail(self, part_id: str) -> None:
        """Someone saw this part die: it is lost until it is found again."""
        with self._lock:
            part = self._parts.get(part_id)
        if part is not None and part.live:
            self._lose(part, "reported as failed")
            part.wake.set()

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
            if part.lost_since_s and time.monotonic() - part.lost_since_s > self._silence_s:
                self._host.restart(part.part_id)
                part.lost_since_s = time.monotonic()
            return False
        try:
            self._greet(part, channel)
        except LongreachError as exc:
            channel.close()
            part.error = exc.message
            return False
        with self._lock:
            restarted = part.located != found
            part.restarts += restarted
            part.located, part.channel = found, channel
            part.lost_since_s, part.error = None, ""
        log.warning(
            "part back part=%s address=%s restarted=%s", part.part_id, found.address, restarted
        )
        self._wake_workers(part)
        return True

    def _greet(self, part: Part, channel: Channel) -> None:
        """Tell a worker that is about to be handed out the epoch and where the others are."""
        if part.kind != "worker":
            return
        channel.call("epoch", {"epoch": self._epoch}, timeout_s=NOTIFY_TIMEOUT_S)
        part.told = None
        self._tell(part, channel, must=True)

    def _tell(self, part: Part, channel: Channel, *, must: bool = False) -> None:
        """Send a worker the addresses it does not know yet; without `must`, failures wait."""
        if part.kind != "worker":
            return
        now = {"addresses": self.addresses("store"), "retrievers": self.addresses("retriever")}
        if part.told == now:
            return
        try:
            channel.call("stores", now, timeout_s=NOTIFY_TIMEOUT_S)
        except LongreachError as exc:
            if must:
                raise
            log.warning("addresses not delivered worker=%s: %s", part.part_id, exc.message)
            return
        part.told = now

    def _wake_workers(self, changed: Part) -> None:
        if changed.kind != "worker":
            for part in self.parts("worker"):
                part.wake.set()

    def _lose(self, part: Part, reason: str) -> None:
        if not self._take_channel(part):
            return
        part.lost_since_s = time.monotonic()
        part.error = reason
        log.warning("part lost part=%s reason=%s", part.part_id, reason)
        self._wake_workers(part)

    def _take_channel(self, part: Part) -> bool:
        with self._lock:
            channel, part.channel = part.channel, None
        if channel is None:
            return False
        channel.close()
        return True
