"""What both wirings answer from their supervisor: a `Runtime` without start, restart and stop."""

from __future__ import annotations

from typing import Any

from ..kvstore.membership import Membership
from ..kvstore.transport import Channel
from .supervisor import Supervisor


class Supervised:
    """Its heirs make the supervisor."""

    _supervisor: Supervisor

    def workers(self) -> dict[str, Channel]:
        return self._supervisor.live("worker")

    def worker_failed(self, worker_id: str) -> None:
        self._supervisor.fail(worker_id)

    def stores(self) -> dict[str, Channel]:
        return self._supervisor.live("store")

    def membership(self) -> Membership:
        return self._supervisor.membership()

    def drain_store(self, store_id: str) -> Membership:
        return self._supervisor.drain_store(store_id)

    def pid(self, part_id: str) -> int | None:
        return self._supervisor.pid(part_id)

    def stats(self) -> dict[str, dict[str, Any]]:
        return self._supervisor.stats()
