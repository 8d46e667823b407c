"""What the gateway needs from a wiring: start the parts, hand out channels to live workers, stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..core.config import Config
from ..core.errors import LongreachError
from ..kvstore.membership import Membership
from ..kvstore.transport import Channel

PartKind = Literal["store", "retriever", "worker"]

PING_TIMEOUT_S = 2.0
"""Deadline of one health request to a part."""
NOTIFY_TIMEOUT_S = 5.0
"""Deadline of one membership or epoch message to a part."""


class Runtime(Protocol):
    """One wiring of stores, retrievers and decode workers. All methods may be called from any thread."""

    def start(self, epoch: int) -> None:
        """Bring up or adopt every part. Raises DeadlineExceeded after cluster.start_timeout_s,
        or the part's own error (e.g. UnsupportedModel) when it cannot be built."""
        ...

    def workers(self) -> dict[str, Channel]:
        """Live workers by id. The channel changes when a worker came back elsewhere."""
        ...

    def worker_failed(self, worker_id: str) -> None:
        """The caller saw this worker die: it leaves `workers()` until it answers again."""
        ...

    def stores(self) -> dict[str, Channel]:
        """Live stores by id. The channel changes when a store came back elsewhere."""
        ...

    def membership(self) -> Membership:
        """The stores as they are placed on now; one lost a moment ago is still among them."""
        ...

    def drain_store(self, store_id: str) -> Membership:
        """Mark a store as draining: its pages move to the others (its `repair_status` says when they
        have). Again is nothing new. Raises NotFound, FailedPrecondition for the last one left."""
        ...

    def pid(self, part_id: str) -> int | None:
        """The part's process; None if it is not one of its own on this machine."""
        ...

    def restart(self, part_id: str) -> None:
        """End a part, whatever it does now; it is brought up anew."""
        ...

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per part id: kind, state, address, node_id, restarts, and the part's own numbers."""
        ...

    def stop(self, *, keep_parts: bool = False) -> None:
        """End supervision; unless `keep_parts`, drain and end every part. Never raises twice."""
        ...


@dataclass(frozen=True)
class Located:
    """Where a part is now. `pid` is None where its process is not on this machine, `zone` empty where
    its node has no label."""

    address: str
    pid: int | None = None
    node_id: str = ""
    zone: str = ""


def part_ids(config: Config) -> dict[PartKind, list[str]]:
    """The parts a configuration asks for, by kind, in the order they are started."""
    return {
        "store": [f"store-{i}" for i in range(config.store.count)],
        "retriever": [f"retriever-{i}" for i in range(config.retriever.count)],
        "worker": [f"worker-{i}" for i in range(config.worker.count)],
    }


def ping(channel: Channel, timeout_s: float = PING_TIMEOUT_S) -> bool:
    """True if the part answers its health request in time."""
    try:
        channel.call("health", timeout_s=timeout_s)
    except LongreachError:
        return False
    return True


def ask_stats(channel: Channel | None) -> dict[str, Any]:
    """A part's own numbers, or none while it does not answer."""
    if channel is None:
        return {}
    try:
        return dict(channel.call("stats", timeout_s=PING_TIMEOUT_S).header)
    except LongreachError:
        return {}
