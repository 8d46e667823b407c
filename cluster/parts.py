"""Builds the services that the wirings start; named by `module:function` so that tests inject fakes.

An actor receives the name, not the function, and resolves it in its own process: nothing is pickled
by value and the heavy imports happen there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..core.config import Config, config_dict
from ..kvstore.transport import Service


@dataclass(frozen=True)
class Parts:
    """Which function builds each kind of part (`module:function`)."""

    store: str = "longreach.cluster.parts:build_store"
    retriever: str = "longreach.cluster.parts:build_retriever"
    worker: str = "longreach.cluster.parts:build_worker"
    geometry: str = "longreach.cluster.parts:page_geometry"
    """What the stores are told of the model's pages; runs in the process that starts the parts."""


def fingerprint(config: Config, parts: Parts) -> str:
    """Names what shapes a running part; a part started with another one is not adopted."""
    tree = config_dict(config)
    sections = ("model", "attention", "cache", "worker", "store", "retriever", "faults")
    shaping = {k: tree[k] for k in sections}
    text = json.dumps([shaping, parts.store, parts.retriever, parts.worker], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def page_geometry(config: Config) -> dict[str, Any]:
    """Shape of the model's pages. Seconds, and much memory: reading a model needs its library."""
    from ..workers.model_source import model_geometry

    return dict(model_geometry(config).to_dict())


def build_store(
    config: Config, store_id: str, node_id: str, geometry: Mapping[str, Any]
) -> Service:
    """One KV store shard behind the transport."""
    from ..kvstore.faults import disk_faults, with_faults
    from ..kvstore.page import PageGeometry
    from ..kvstore.store_service import StoreService

    disk = disk_faults(config.faults, store_id)
    service = StoreService(
        store_id,
        node_id,
        config.store.arena_dir,
        PageGeometry.from_dict(dict(geometry)),
        config.store.capacity_bytes,
        faults=config.store.faults or config.faults.corrupt > 0,
        config=config.store,
        disk_hook=disk,
    )
    return with_faults(service, config.faults, store_id, store=True, disk=disk)


def build_retriever(config: Config, retriever_id: str, node_id: str) -> Service:
    """One retriever shard: summaries of the contexts that hash to it."""
    from ..kvstore.faults import with_faults
    from ..workers.retriever_service import RetrieverService

    service = cast(Service, RetrieverService(config, retriever_id))
    return with_faults(service, config.faults, retriever_id)


def build_worker(
    config: Config,
    worker_id: str,
    node_id: str,
    stores: Mapping[str, str],
    retrievers: Mapping[str, str],
    on_fatal: Callable[[BaseException], None],
) -> Service:
    """One decode worker; loads the model (seconds). `on_fatal` is told when its engine is dead."""
    from ..kvstore.faults import with_faults
    from ..workers.decode_service import DecodeService

    service = DecodeService(config, dict(stores), dict(retrievers), worker_id, node_id, on_fatal)
    return with_faults(cast(Service, service), config.faults, worker_id)
