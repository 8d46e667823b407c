"""Ray shell of a KV store: start, address, health, drain. Pages never go through these calls."""

from __future__ import annotations

import os
from typing import Any

import ray

from ..core.config import Config
from .serving import Serving, builder, thread_settings


class StoreActor:
    """Builds the store service in this process and serves it on a free port of `host`.

    No host takes the node's address, as the other nodes of a cluster see it. `geometry` is that of
    the model's pages: a store neither loads a model nor the libraries that read one.
    """

    def __init__(
        self,
        config: dict[str, Any],
        part_id: str,
        host: str | None,
        build: str,
        fingerprint: str,
        geometry: dict[str, Any],
    ) -> None:
        tree = Config.model_validate(config)
        os.environ.update(thread_settings(1))
        self._fingerprint = fingerprint
        host = host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._node_id = node_id = ray.get_runtime_context().get_node_id()
        self._serving = Serving(lambda: builder(build)(tree, part_id, node_id, geometry), host)

    def address(self) -> str:
        return self._serving.address()

    def health(self) -> dict[str, Any]:
        mine = {"fingerprint": self._fingerprint, "node_id": self._node_id}
        return {**self._serving.health(), **mine}

    def drain(self, timeout_s: float = 5.0) -> None:
        self._serving.drain(timeout_s)
