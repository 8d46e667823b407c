"""Tiny services for the wiring tests: real transport, real processes, no model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longreach.core.config import Config
from longreach.core.errors import InternalError, UnsupportedModel
from longreach.kvstore.transport import Reply


class FakeService:
    """Answers health, stats and pid; a worker also remembers its epoch and address maps."""

    def __init__(self, part_id: str, known: dict[str, Any] | None = None) -> None:
        self.part_id = part_id
        self.known: dict[str, Any] = known or {}
        self.epoch = 0
        self.healthy = True
        self._lock = threading.Lock()

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        if not self.healthy:
            raise InternalError("broken on purpose")
        if method == "epoch":
            self.epoch = header["epoch"]
        elif method == "stores":
            with self._lock:
                self.known = dict(header)
        elif method == "count":
            return (Reply({"n": n}) for n in range(header["n"]))
        return Reply(
            {"part_id": self.part_id, "pid": os.getpid(), "epoch": self.epoch, "known": self.known}
        )


def build_store(config: Config, store_id: str, node_id: str) -> FakeService:
    # a stand-in for an arena, so that sweeping can be seen
    return FakeService(store_id)


def build_retriever(config: Config, retriever_id: str, node_id: str) -> FakeService:
    return FakeService(retriever_id)


def build_worker(
    config: Config,
    worker_id: str,
    node_id: str,
    stores: Mapping[str, str],
    retrievers: Mapping[str, str],
) -> FakeService:
    if config.model.name == "unsupported":
        raise UnsupportedModel("model type 'mamba' is not a dense RoPE decoder")
    return FakeService(
        worker_id, {"addresses": dict(stores), "retrievers": dict(retrievers), "node": node_id}
    )


FOLDER = Path(__file__).parent
