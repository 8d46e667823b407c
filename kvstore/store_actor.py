"""Ray shell of a store: start, address, health, drain. Pages never go through these calls.

A plain class: cluster/ray_runtime.py wraps it with ray.remote, tests use it as it is.
"""

from __future__ import annotations

import atexit
from typing import Any

from .page import PageGeometry
from .store_service import StoreService
from .transport import serve


class StoreActor:
    """Starts a store's server in its constructor.

    geometry is PageGeometry.to_dict(): plain values cross the actor boundary.
    """

    def __init__(
        self,
        store_id: str,
        node_id: str,
        arena_dir: str,
        geometry: dict[str, Any],
        capacity_bytes: int,
        address: str = "tcp://127.0.0.1:0",
        faults: bool = False,
    ) -> None:
        self._service = StoreService(
            store_id,
            node_id,
            arena_dir,
            PageGeometry.from_dict(geometry),
            capacity_bytes,
            faults=faults,
        )
        self._server = serve(self._service, address)
        # an actor that is killed leaves its arena to the next store's sweep; one that exits does not
        atexit.register(self._service.close)

    def address(self) -> str:
        return self._server.address

    def health(self) -> dict[str, Any]:
        return {"store_id": self._service.store_id, **self._service.stats()}

    def drain(self) -> None:
        self._service.drain()
