"""Ray shell of a decode worker: start, address, health, drain. Work goes over the transport."""

from __future__ import annotations

import os
from typing import Any

import ray

from ..core.config import Config
from ..kvstore.serving import Serving, builder, exit_now, thread_settings


class DecodeActor:
    """Builds the decode service in this process and serves it on a free port of `host`.

    No host takes the node's address, as the other nodes of a cluster see it.
    """

    def __init__(
        self,
        config: dict[str, Any],
        part_id: str,
        host: str | None,
        build: str,
        fingerprint: str,
        stores: dict[str, str],
        retrievers: dict[str, str],
    ) -> None:
        tree = Config.model_validate(config)
        os.environ.update(thread_settings(tree.model.n_threads))
        self._fingerprint = fingerprint
        host = host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._node_id = node_id = ray.get_runtime_context().get_node_id()
        self._serving = Serving(
            lambda: builder(build)(tree, part_id, node_id, stores, retrievers, exit_now), host
        )

    def address(self) -> str:
        return self._serving.address()

    def health(self) -> dict[str, Any]:
        mine = {"fingerprint": self._fingerprint, "node_id": self._node_id}
        return {**self._serving.health(), **mine}

    def drain(self, timeout_s: float = 5.0) -> None:
        self._serving.drain(timeout_s)
