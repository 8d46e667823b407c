"""Real stores in small: tiny geometry, in-process or TCP servers, deterministic pages."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from longreach.core.page_key import ROOT_KEY, PageKey, RecipeFingerprint
from longreach.kvstore.page import Bytes, PageGeometry, page_checksums
from longreach.kvstore.page_client import PageClient, PageHandle
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import Server, connect, serve

GEOMETRY = PageGeometry(n_layers=3, n_kv_heads=2, page_tokens=8, head_dim=16, kv_dtype="float16")
RECIPE = RecipeFingerprint(b"r" * 32)
ROOT = ROOT_KEY
_names = itertools.count()


def key_of(i: int) -> PageKey:
    return PageKey(np.random.default_rng(10_000 + i).bytes(32))


def page_of(i: int, geometry: PageGeometry = GEOMETRY) -> Bytes:
    return np.random.default_rng(i).integers(0, 256, geometry.page_nbytes, np.uint8)


class Stores:
    """A few stores that can be stopped, killed and started again."""

    def __init__(self, arena_dir: Path, scheme: str = "mem") -> None:
        self.arena_dir = arena_dir
        self.scheme = scheme
        self.services: dict[str, StoreService] = {}
        self.servers: dict[str, Server] = {}

    def start(
        self,
        name: str,
        n_slots: int = 64,
        node_id: str = "node-0",
        address: str | None = None,
        geometry: PageGeometry = GEOMETRY,
        **options: Any,
    ) -> None:
        self.services[name] = StoreService(
            name,
            node_id,
            str(self.arena_dir),
            geometry,
            n_slots * geometry.page_nbytes,
            faults=True,
            **options,
        )
        if address is None:
            mem = f"mem://store-test-{next(_names)}"
            address = mem if self.scheme == "mem" else "tcp://127.0.0.1:0"
        self.servers[name] = serve(self.services[name], address, n_threads=4)

    def stop(self, name: str) -> None:
        """The server goes; what is mapped stays mapped."""
        self.servers.pop(name).stop(0.5)
        self.services[name].close()

    def close(self) -> None:
        for name in list(self.servers):
            self.stop(name)

    @property
    def addresses(self) -> dict[str, str]:
        return {name: server.address for name, server in self.servers.items()}

    def call(self, name: str, method: str, **header: Any) -> dict[str, Any]:
        channel = connect(self.servers[name].address)
        try:
            return channel.call(method, header, timeout_s=5.0).header
        finally:
            channel.close()

    def corrupt(self, name: str, key: PageKey, leaf: int = 0) -> None:
        self.call(name, "corrupt", key=key, leaf=leaf)

    def holders(self, key: PageKey) -> list[str]:
        return [n for n in self.servers if self.call(n, "lookup", keys=[key])["held"][0]]

    def stat(self, name: str, field: str) -> int:
        return self.services[name].stats()[field]

    def client(self, owner: str = "worker-0", **options: Any) -> PageClient:
        settings: dict[str, Any] = {
            "channels": self.addresses,
            "geometry": GEOMETRY,
            "recipe": RECIPE,
            "replicas": 2,
            "lease_s": 60.0,
            "timeout_s": 5.0,
            "node_id": "node-0",
            "owner": owner,
        }
        return PageClient(**{**settings, **options})


def bytes_at(client: PageClient, handle: PageHandle) -> Bytes:
    """The page's bytes, found as a kernel finds them: by leaf rows of a memory."""
    leaves = client.memories[handle.memory].reshape(-1, client.geometry.leaf_nbytes)
    first = handle.first_leaf_row
    return leaves[first : first + client.geometry.n_leaves].reshape(-1)


def put(client: PageClient, numbers: range | list[int], row: str = "row") -> list[PageHandle]:
    futures = [client.store(key_of(i), ROOT, page_of(i), row) for i in numbers]
    return [future.result(10) for future in futures]


def take(
    client: PageClient, numbers: range | list[int], row: str = "row"
) -> list[PageHandle | None]:
    return client.acquire([key_of(i) for i in numbers], row)


def check(
    client: PageClient, handles: list[PageHandle | None] | list[PageHandle], first: int = 0
) -> None:
    for i, handle in enumerate(handles, first):
        assert handle is not None
        assert (bytes_at(client, handle) == page_of(i)).all()
        assert np.array_equal(handle.checksums, page_checksums(page_of(i), GEOMETRY))
