"""Builds the services that the wirings start; named by `module:function` so that tests inject fakes.

An actor receives the name, not the function, and resolves it in its own process: nothing is pickled
by value and the heavy imports happen there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from ..core.config import Config, config_dict
from ..kvstore.transport import Service


@dataclass(frozen=True)
class Parts:
    """Which function builds each kind of part (`module:function`)."""

    store: str = "longreach.cluster.parts:build_store"
    retriever: str = "longreach.cluster.parts:build_retriever"
    worker: str = "longreach.cluster.parts:build_worker"


def fingerprint(config: Config, parts: Parts) -> str:
    """Names what shapes a running part; a part started with another one is not adopted."""
    tree = config_dict(config)
    shaping = {k: tree[k] for k in ("model", "attention", "cache", "worker", "store", "retriever")}
    text = json.dumps([shaping, parts.store, parts.retriever, parts.worker], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def build_store(config: Config, store_id: str, node_id: str) -> Service:
    """One KV store shard behind the transport."""
    from ..kvstore.store_service import StoreService
    from ..workers.model_source import model_geometry

    return cast(Service, StoreService(config, model_geometry(config), store_id, node_id))


def build_retriever(config: Config, retriever_id: str, node_id: str) -> Service:
    """One retriever shard: summaries of the contexts that hash to it."""
    from ..workers.retriever_service import RetrieverService

    return cast(Service, RetrieverService(config, retriever_id))


def build_worker(
    config: Config,
    worker_id: str,
    node_id: str,
    stores: Mapping[str, str],
    retrievers: Mapping[str, str],
) -> Service:
    """One decode worker; loads the model (seconds)."""
    from ..workers.decode_service import DecodeService

    return cast(Service, DecodeService(config, dict(stores), dict(retrievers), worker_id, node_id))
