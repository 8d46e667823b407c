"""Bytes of every part that a GPU and its host hold for a configuration (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.config import Config
from ..core.errors import ConfigError
from ..core.kv_format import KvDtype
from ..core.stage import QUERY_BLOCK, LayerPolicy, resolve_policies
from ..kvstore.page import PageGeometry
from .gpu_estimate import ACTIVATION_BYTES, GpuModel, table_bytes

RUNTIME_BYTES = 1 << 30
"""CUDA's context, captured graphs and what allocators round up: assumed, not computed."""
SPLITS = 64
"""Parts that attention of one row and KV head is cut into at most (performance.md 4.1)."""
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Need:
    """One part of the whole. key: the configuration value that its size hangs on most, or empty."""

    what: str
    place: Place
    n_bytes: int
    note: str = ""
    key: str = ""


@dataclass(frozen=True)
class GpuLoad:
    """What a machine is asked to do; names as in the configuration."""

    model: GpuModel
    policies: tuple[LayerPolicy, ...]
    """One per layer, see `resolve_policies`."""
    kv_dtype: KvDtype
    page_tokens: int
    context_tokens: int
    """Of a row at most (model.max_context_tokens)."""
    rows: int
    """worker.max_rows; each with a context of its own, the worst case."""
    device_pages: int
    chunk_tokens: int
    """worker.prefill_chunk_tokens"""
    answer_tokens: int = 0
    """What a row may add to its context (gateway.max_new_tokens)."""

    @classmethod
    def of(cls, config: Config, model: GpuModel) -> GpuLoad:
        """Raises ConfigError if a layer has no policy, or two."""
        try:
            policies = resolve_policies(config.attention.policies, model.n_layers)
        except ValueError as exc:
            raise ConfigError(f"attention.policies: {exc}", path="attention.policies") from exc
        return cls(
            model,
            policies,
            config.cache.kv_dtype,
            config.cache.page_tokens,
            config.model.max_context_tokens,
            config.worker.max_rows,
            config.cache.device_pages,
            config.worker.prefill_chunk_tokens,
            config.gateway.max_new_tokens,
        )

    @property
    def row_tokens(self) -> int:
        return self.context_tokens + self.answer_tokens

    @property
    def geometry(self) -> PageGeometry:
        m = self.model
        return PageGeometry(m.n_layers, m.n_kv_heads, self.page_tokens, m.head_dim, self.kv_dtype)

    @property
    def n_pages(self) -> int:
        """Of all rows."""
        return self.rows * -(-self.row_tokens // self.page_tokens)


def needs_of(load: GpuLoad) -> tuple[Need, ...]:
    """Bytes of every part."""
    m, g, n_ids = load.model, load.geometry, load.n_pages
    n_banks = m.n_layers * m.n_kv_heads
    state = n_banks * load.device_pages * 3 * 4
    # address and slot of every leaf; of every page its place in the host, of every row its pages
    tables = n_banks * n_ids * (8 + 4) + n_ids * (8 + 4 * m.n_kv_heads + 4)
    summaries: dict[str, int] = {}
    for policy in load.policies:
        for name, n_bytes in table_bytes(policy, g, n_ids).items():
            summaries[name] = summaries.get(name, 0) + n_bytes
    parts = [
        Need("weights", "device", m.weight_bytes, key="model.name"),
        Need("page tables", "device", tables, f"{n_ids} pages", "model.max_context_tokens"),
        *(
            Need(f"summaries: {name}", "device", n, "all layers", "attention.policies")
            for name, n in summaries.items()
        ),
        Need("masks", "device", _mask_bytes(load), f"{load.rows} rows", "worker.max_rows"),
        Need(
            "bank",
            "device",
            load.device_pages * g.page_nbytes + state,
            f"{load.device_pages} pages of {g.page_nbytes} bytes in {load.kv_dtype}",
            "cache.device_pages",
        ),
        Need(
            "activations",
            "device",
            _activation_bytes(load),
            f"{load.chunk_tokens} tokens of a prefill chunk",
            "worker.prefill_chunk_tokens",
        ),
        Need(
            "scratch",
            "device",
            _scratch_bytes(load),
            "scores of a chunk, parts of attention",
            "worker.prefill_chunk_tokens",
        ),
        Need("runtime", "device", RUNTIME_BYTES, "assumed"),
        Need(
            "pages",
            "host",
            n_ids * g.page_nbytes,
            f"{load.rows} rows of {load.row_tokens} tokens, pinned",
            "cache.kv_dtype",
        ),
    ]
    return tuple(parts)


def step_pages_of(load: GpuLoad) -> int:
    """Pages that attention of one decode step reads in the layer that reads most, of all rows: each selected
    block in a page of its own."""
    most, n_pages = 0, -(-load.row_tokens // load.page_tokens)
    for policy in load.policies:
        if policy.dense:
            return load.n_pages
        n = policy.stages[-1].keep // policy.block_tokens
        n += -(-policy.sink // load.page_tokens) + policy.window // load.page_tokens + 2
        most = max(most, min(n, n_pages))
    return load.rows * most


def _mask_bytes(load: GpuLoad) -> int:
    """As `DeviceMask.empty` makes them."""
    total = 0
    for policy in load.policies:
        if policy.dense:
            continue
        n_lists = 1 if policy.head_reduce == "all" else load.model.n_kv_heads
        stages = policy.stages
        entering = [a.keep // b.chunk for a, b in itertools.pairwise(stages)]
        items = sum(n + 1 for n in entering) + stages[-1].keep // stages[-1].chunk + 1
        total += load.rows * n_lists * items * 4
    return total


def _activation_bytes(load: GpuLoad) -> int:
    m = load.model
    # the residual, its norm and the sum; q, k, v and what attention returns; gate, up and their product
    per_token = 3 * m.hidden + (2 * m.n_heads + 2 * m.n_kv_heads) * m.head_dim + 3 * m.intermediate
    return load.chunk_tokens * per_token * ACTIVATION_BYTES + load.rows * m.vocab * 4


def _scratch_bytes(load: GpuLoad) -> int:
    """float32 scores of the stage that scores most, for every head and query block or row; partial results
    of attention. One layer at a time."""
    m = load.model
    n_blocks = max(load.rows, -(-load.chunk_tokens // QUERY_BLOCK))
    most = 0
    for policy in load.policies:
        entering = load.row_tokens
        for stage in policy.stages:
            most = max(most, -(-min(entering, load.row_tokens) // stage.chunk))
            entering = stage.keep
    parts = load.rows * m.n_heads * SPLITS * (m.head_dim + 2)
    return 4 * (n_blocks * m.n_heads * most + parts)


def sum_of(needs: Sequence[Need], place: Place) -> int:
    return sum(need.n_bytes for need in needs if need.place == place)
