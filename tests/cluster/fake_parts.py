"""Tiny services for the wiring tests: real transport, real processes, no model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longreach.cluster.parts import Parts
from longreach.core.config import Config
from longreach.core.errors import InternalError, UnsupportedModel
from longreach.kvstore.arena import Arena
from longreach.kvstore.page import PageGeometry
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
                members = header["membership"]["members"]
                addresses = {member["store_id"]: member["address"] for member in members}
                self.known = {**self.known, **header, "addresses": addresses}
        elif method == "members":
            self.known = {**self.known, **header}
        elif method == "count":
            return (Reply({"n": n}) for n in range(header["n"]))
        return Reply(
            {"part_id": self.part_id, "pid": os.getpid(), "epoch": self.epoch, "known": self.known}
        )


class FakeWorker(FakeService):
    """A worker whose engine can be made to die."""

    def __init__(
        self, worker_id: str, known: dict[str, Any], on_fatal: Callable[[BaseException], None]
    ) -> None:
        super().__init__(worker_id, known)
        self._on_fatal = on_fatal

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        if method == "die":
            self._on_fatal(InternalError("engine died"))
        return super().handle(method, header, buffers)


class FakeStore(FakeService):
    """Holds a real arena, so that its file can be seen."""

    def __init__(self, store_id: str, arena: Arena) -> None:
        super().__init__(store_id, {"arena": str(arena.path)})
        self._arena = arena

    def close(self) -> None:
        self._arena.close()


def page_geometry(config: Config) -> dict[str, Any]:
    return PageGeometry(2, 1, config.cache.page_tokens, 8, "float32").to_dict()


def build_store(
    config: Config, store_id: str, node_id: str, geometry: dict[str, Any]
) -> FakeService:
    shape = PageGeometry.from_dict(geometry)
    return FakeStore(
        store_id, Arena.create(config.store.arena_dir, shape, config.store.capacity_bytes, store_id)
    )


def build_retriever(config: Config, retriever_id: str, node_id: str) -> FakeService:
    return FakeService(retriever_id)


def build_worker(
    config: Config,
    worker_id: str,
    node_id: str,
    stores: Mapping[str, str],
    retrievers: Mapping[str, str],
    on_fatal: Callable[[BaseException], None],
) -> FakeService:
    if config.model.name == "unsupported":
        raise UnsupportedModel("model type 'mamba' is not a dense RoPE decoder")
    known = {"addresses": dict(stores), "retrievers": dict(retrievers), "node": node_id}
    return FakeWorker(worker_id, known, on_fatal)


FAKES = Parts(
    store="fake_parts:build_store",
    retriever="fake_parts:build_retriever",
    worker="fake_parts:build_worker",
    geometry="fake_parts:page_geometry",
)
