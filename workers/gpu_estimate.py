"""What a GPU will have to move and to compute: estimates from sizes alone, before anything runs (pure).

Formulas: performance.md 2.1 (decode) and 5 (prefill). They leave out what nobody has measured yet on the
machine at hand, so they are called estimates wherever they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.stage import QUERY_BLOCK, LayerPolicy, Stage
from ..kernels.paged import TORCH_DTYPE
from ..kernels.summaries import table_dtype, table_of, table_shape, tail_table
from ..kvstore.page import PageGeometry

WEIGHT_BYTES = 2
ACTIVATION_BYTES = 2
"""Of a number that passes between layers on a device."""
SPARSE_SHARE = 1 / 3
"""Of the dense rate, for scores and block sparse attention: 200 of 600 TFLOPS in performance.md 5."""


@dataclass(frozen=True)
class GpuModel:
    """A dense decoder's sizes."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    weight_bytes: int

    @classmethod
    def of(cls, config: Any) -> GpuModel:
        """Of a configuration of transformers; weights of 16 bit."""
        heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        sizes = cls(
            int(config.num_hidden_layers),
            heads,
            int(config.num_key_value_heads),
            head_dim,
            int(config.hidden_size),
            int(config.intermediate_size),
            int(config.vocab_size),
            0,
        )
        n_tables = 1 if config.tie_word_embeddings else 2
        n_weights = sizes.n_linear + n_tables * sizes.vocab * sizes.hidden
        return replace(sizes, weight_bytes=WEIGHT_BYTES * n_weights)

    @property
    def n_linear(self) -> int:
        """Weights that every token of a prompt is multiplied with: no embedding, no output layer."""
        heads = (2 * self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        return self.n_layers * self.hidden * (heads + 3 * self.intermediate)


@dataclass(frozen=True)
class GpuMachine:
    """Measured, or as stated by its maker. Rates in 1e9 bytes a second."""

    device_bytes: int
    host_bytes: int
    device_gb_s: float = 3000.0
    link_gb_s: float = 55.0
    tflops: float = 600.0
    """Dense products of 16-bit numbers."""


@dataclass(frozen=True)
class DecodeEstimate:
    """One step, one token for each row. Bytes of all layers; those of the link are among the others."""

    weight_bytes: int
    selection_bytes: int
    attention_bytes: int
    link_bytes: int
    floor_s: float
    """What the bytes take at the machine's rates, one after the other."""
    seconds: float
    """With the fixed time of every layer."""


@dataclass(frozen=True)
class PrefillOrder:
    """Bytes over the link of a whole prompt in two orders (performance.md 5), and the better one."""

    written_bytes: int
    """KV that goes to host memory in any order."""
    selected_bytes: int
    """Chunk after chunk, each layer reads the selected pages only."""
    layer_major_bytes: int | None
    """Layer after layer: the activations of all tokens, to the host and back where the device has no room.
    None if not even one layer's KV fits."""

    @property
    def layer_major(self) -> bool:
        return self.layer_major_bytes is not None and self.layer_major_bytes < self.selected_bytes

    @property
    def link_bytes(self) -> int:
        """Read and written, in the better order."""
        if self.layer_major and self.layer_major_bytes is not None:
            return self.written_bytes + self.layer_major_bytes
        return self.written_bytes + self.selected_bytes


@dataclass(frozen=True)
class PrefillEstimate:
    """One prompt from its first token."""

    order: PrefillOrder
    compute_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        """If the link works while the device computes."""
        return max(self.compute_s, self.link_s)


def estimate_decode(
    model: GpuModel,
    policies: Sequence[LayerPolicy],
    geometry: PageGeometry,
    machine: GpuMachine,
    *,
    context_tokens: int,
    rows: int,
    device_pages: int,
    hit_ratio: float,
    layer_overhead_us: float,
) -> DecodeEstimate:
    """policies: one per layer; hit_ratio: share of what attention reads that the bank holds, if it does not
    hold all; layer_overhead_us: launches and waits of a layer, 25 to 35 in performance.md 2.2."""
    n_pages = rows * -(-context_tokens // geometry.page_tokens)
    resident = min(1.0, device_pages / n_pages)
    selection, attention, link = 0.0, 0.0, 0.0
    token = 2 * geometry.row_nbytes * model.n_kv_heads
    for policy in policies:
        attended = attended_tokens(policy, context_tokens) * token
        attention += attended
        missed = 1 - max(resident, hit_ratio if not policy.dense else 0.0)
        link += attended * missed
        for i, stage in enumerate(policy.stages):
            n_bytes = _stage_bytes(policy, i, geometry, context_tokens) / stage.refresh
            selection += n_bytes
            if stage.scorer == "search":
                link += n_bytes * (1 - resident)
        if policy.tail:
            entered = min(context_tokens, (*_keeps(policy), context_tokens)[-2])
            selection += entered / policy.tail * _tail_bytes(policy, geometry)
    near = model.weight_bytes + rows * (selection + attention)
    floor = near / (machine.device_gb_s * 1e9) + rows * link / (machine.link_gb_s * 1e9)
    return DecodeEstimate(
        model.weight_bytes,
        round(rows * selection),
        round(rows * attention),
        round(rows * link),
        floor,
        floor + model.n_layers * layer_overhead_us * 1e-6,
    )


def estimate_prefill(
    model: GpuModel,
    policies: Sequence[LayerPolicy],
    order: PrefillOrder,
    machine: GpuMachine,
    *,
    context_tokens: int,
) -> PrefillEstimate:
    """Operations of performance.md 5, and the bytes of the better order."""
    t, per_key = context_tokens, 4 * model.n_heads * model.head_dim
    dense = 2.0 * model.n_linear * t
    sparse = 0.0
    for policy in policies:
        if policy.dense:
            dense += per_key * t * t / 2
            continue
        sparse += per_key * attended_tokens(policy, t) * t
        for i, stage in enumerate(policy.stages):
            # on average half of the context stands before a query
            n_chunks = (t / 2 if i == 0 else min(t / 2, _keeps(policy)[i - 1])) / stage.chunk
            n_queries = t / stage.query_stride
            sparse += n_queries * n_chunks * _reads(stage) * per_key / 2
    compute = dense + sparse / SPARSE_SHARE
    return PrefillEstimate(
        order, compute / (machine.tflops * 1e12), order.link_bytes / (machine.link_gb_s * 1e9)
    )


def prefill_order(
    model: GpuModel,
    policies: Sequence[LayerPolicy],
    geometry: PageGeometry,
    *,
    context_tokens: int,
    chunk_tokens: int,
    device_pages: int,
    room_bytes: int,
    new_share: float = 0.2,
) -> PrefillOrder:
    """room_bytes: of the device, for layers one after the other: what is left without the bank. new_share: of
    the pages that a block of queries selects, those that no earlier block of its chunk selected (steps
    share 80 % and more, performance.md 2.3; 1 is the worst case).

    Selected: the pages of a chunk's blocks once, each selected block in a page of its own, or the blocks
    alone for every block of queries, whichever is less; a search reads its keys across the link for every
    block of queries; at most all KV before the chunk.
    """
    leaf = geometry.leaf_nbytes * model.n_kv_heads
    n_pages = -(-context_tokens // geometry.page_tokens)
    written = n_pages * geometry.page_nbytes
    selected = 0.0
    if n_pages > device_pages:
        kinds = {policy: list(policies).count(policy) for policy in policies}
        for policy, n_layers in kinds.items():
            for start in range(0, context_tokens, chunk_tokens):
                n_blocks = -(-min(chunk_tokens, context_tokens - start) // QUERY_BLOCK)
                before = start / geometry.page_tokens * leaf
                n = _chunk_bytes(policy, geometry, start, n_blocks, new_share, before)
                selected += n_layers * n
    parked = context_tokens * model.hidden * ACTIVATION_BYTES
    layer_major: int | None = None
    if room_bytes >= n_pages * leaf + parked:
        layer_major = 0
    elif room_bytes >= n_pages * leaf:
        layer_major = 2 * parked * model.n_layers
    return PrefillOrder(written, round(selected), layer_major)


def attended_tokens(policy: LayerPolicy, context_tokens: int) -> int:
    """Keys that a query at the context's end reads in attention, at most."""
    if policy.dense:
        return context_tokens
    return min(context_tokens, policy.sink + policy.window + policy.stages[-1].keep)


def table_bytes(policy: LayerPolicy, geometry: PageGeometry, n_slots: int) -> dict[str, int]:
    """Bytes of each summary table of a layer, by what it holds."""
    names = [table_of(stage) for stage in policy.stages if stage.scorer != "search"]
    names += [tail_table(policy.tail)] if policy.tail else []
    found = {}
    for name in dict.fromkeys(names):
        shape = table_shape(
            name, n_slots, geometry.n_kv_heads, geometry.page_tokens, geometry.head_dim
        )
        item = table_dtype(name[0], TORCH_DTYPE[geometry.kv_dtype]).itemsize
        found[f"{name[0]} of {name[1]} tokens"] = math.prod(shape) * item
    return found


def _chunk_bytes(
    policy: LayerPolicy,
    geometry: PageGeometry,
    start: int,
    n_blocks: int,
    new_share: float,
    before: float,
) -> float:
    """What a chunk of n_blocks query blocks behind `start` tokens reads of one layer; before: all bytes."""
    if policy.dense:
        return before
    leaf = geometry.leaf_nbytes * geometry.n_kv_heads
    n_pages = policy.stages[-1].keep // policy.block_tokens * (1 + (n_blocks - 1) * new_share)
    searched = sum(
        _stage_bytes(policy, i, geometry, start)
        for i, stage in enumerate(policy.stages)
        if stage.scorer == "search"
    )
    in_place = n_blocks * policy.stages[-1].keep * leaf / geometry.page_tokens
    return min(before, min(n_pages * leaf, in_place) + n_blocks * searched)


def _keeps(policy: LayerPolicy) -> tuple[int, ...]:
    return tuple(stage.keep for stage in policy.stages)


def _reads(stage: Stage) -> float:
    """Keys or summaries that are scored for a chunk. A search walks down 2 * log2 probes; if the heads of a
    group part, it reads more keys than they share."""
    if stage.scorer == "search":
        return 1 + math.log2(stage.chunk)
    return 2.0 if stage.scorer == "bounds" else 1.0


def _stage_bytes(policy: LayerPolicy, i: int, geometry: PageGeometry, n_tokens: int) -> float:
    """Bytes that one recomputation of stage i reads, for one query block, all KV heads."""
    stage = policy.stages[i]
    entering = min(n_tokens, n_tokens if i == 0 else _keeps(policy)[i - 1])
    n_chunks = entering / stage.chunk
    item: float = geometry.row_nbytes
    if stage.scorer != "search":
        kind = table_of(stage)[0]
        item = geometry.head_dim * table_dtype(kind, TORCH_DTYPE[geometry.kv_dtype]).itemsize
    return n_chunks * _reads(stage) * item * geometry.n_kv_heads


def _tail_bytes(policy: LayerPolicy, geometry: PageGeometry) -> int:
    """One cell: a mean key and a mean value for every KV head."""
    item = table_dtype(tail_table(policy.tail)[0], TORCH_DTYPE[geometry.kv_dtype]).itemsize
    return 2 * geometry.head_dim * item * geometry.n_kv_heads
