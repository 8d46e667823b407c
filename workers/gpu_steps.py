"""Attention of one forward pass on a GPU: only kernel launches, whose decisions fall on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from ..core.stage import QUERY_BLOCK, LayerPolicy
from ..kernels import gpu_ops
from ..kernels.gpu_pages import DeviceAngles, DeviceMask, DeviceScratch
from ..kernels.rope import Rope
from ..kernels.summaries import TableName, empty_table, tables_of
from .gpu_batch import DeviceBatch
from .gpu_memory import GpuMemory


@dataclass
class GpuLayers:
    """What the layers of a model share on the device. Sizes never change."""

    memory: GpuMemory
    policies: Sequence[LayerPolicy]
    tables: Sequence[dict[TableName, Tensor]]
    """Per layer, summaries whose slot is the page number."""
    angles: DeviceAngles
    most_tokens: int
    precision: str
    """Of the products of attention in decode, which memory bounds: see `triton_attend`."""
    prefill_precision: str
    select_precision: str
    scratch: DeviceScratch
    """Of decode. Its sizes are settled before a graph is captured."""
    prefill_scratch: DeviceScratch
    changed: Tensor = field(init=False)
    """int32 [n_layers]: whether what the rows read in this step is not what they read before."""
    schedule: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.memory.bank.address.device
        self.changed = torch.zeros(len(self.policies), dtype=torch.int32, device=device)
        intervals = [p.refreshes[-1] if p.stages else 1 for p in self.policies]
        pairs = [(self.offset(layer), n) for layer, n in enumerate(intervals)]
        self.schedule = gpu_ops.schedule_of(pairs, device)

    @classmethod
    def of(
        cls,
        memory: GpuMemory,
        policies: Sequence[LayerPolicy],
        rope: Rope,
        most_tokens: int,
        precision: str,
    ) -> Self:
        """precision: of decode, "ieee" or "tf32x3"; products bound prefill and selection, and their operands
        have 16 bits or fewer, so there it is "tf32" unless "ieee" is asked for."""
        device = memory.bank.address.device
        view = memory.view(0, torch.zeros(1, 1, dtype=torch.int32, device=device))
        coarser = "ieee" if precision == "ieee" else "tf32"
        return cls(
            memory=memory,
            policies=policies,
            tables=[
                {name: empty_table(name, view, memory.n_page_ids, device) for name in tables_of(p)}
                for p in policies
            ],
            angles=DeviceAngles.of(rope, most_tokens, device),
            most_tokens=most_tokens,
            precision=precision,
            prefill_precision=coarser,
            select_precision=coarser,
            scratch=DeviceScratch(device),
            prefill_scratch=DeviceScratch(device),
        )

    def offset(self, layer: int) -> int:
        """Refreshes are spread over layers by the first stage's interval (DESIGN 6.3)."""
        refreshes = self.policies[layer].refreshes
        return layer * refreshes[0] // len(self.policies) if refreshes else 0


class GpuDecodeStep:
    """One token for every place below n_places of the batch. Nothing here asks the device for anything
    and nothing is allocated after the first step of a size, so the step can be captured in a graph."""

    def __init__(self, layers: GpuLayers, batch: DeviceBatch, n_places: int) -> None:
        self._layers = layers
        self._batch = batch
        self._n = n_places

    def begin(self) -> None:
        """Before the first layer."""
        layers, batch = self._layers, self._batch
        position, fresh = batch.position[: self._n], batch.fresh[: self._n]
        page_tokens = layers.memory.geometry.page_tokens
        gpu_ops.begin_step(position, fresh, layers.schedule, page_tokens, layers.changed)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [H, B, D], k and v [Hkv, B, D] -> [B, H, D]."""
        layers, batch, n = self._layers, self._batch, self._n
        policy, mask = layers.policies[layer], batch.masks[layer]
        pages = layers.memory.view(layer, batch.pages[:n])
        position, fresh = batch.position[:n], batch.fresh[:n]
        rows = q.transpose(0, 1)
        out = layers.scratch.take(f"out{n}", (n, q.shape[0], q.shape[2]), q.dtype)
        gpu_ops.append_device(
            pages,
            position,
            k.transpose(0, 1),
            v.transpose(0, 1),
            batch.n_existing[:n],
            batch.bad[layer, :n],
        )
        if mask is not None:
            mine = mask.first(n)
            tables = layers.tables[layer]
            if tables:
                gpu_ops.summarise_decoded(pages, tables, position)
            gpu_ops.select_device(
                rows.unsqueeze(2),
                position,
                None,
                pages,
                mine,
                tables,
                policy,
                layers.angles,
                scale,
                layers.scratch,
                fresh=fresh,
                offset=layers.offset(layer),
                most_tokens=layers.most_tokens,
                precision=layers.select_precision,
            )
            bank = layers.memory.bank.layer(layer)
            changed = layers.changed[layer : layer + 1]
            gpu_ops.update_residency(bank, pages, position, mine, policy, changed)
        gpu_ops.attend_decode(
            rows,
            position,
            pages,
            mask.first(n) if mask is not None else None,
            policy,
            layers.angles,
            scale,
            out,
            layers.scratch,
            precision=layers.precision,
        )
        if mask is not None:
            gpu_ops.promote(layers.memory.bank.layer(layer))
        return out


class GpuPrefillStep:
    """One chunk of one row's prompt, from `start` on, in blocks of queries that share a selection. The
    host knows all lengths, so grids fit them."""

    def __init__(
        self,
        layers: GpuLayers,
        pages: Tensor,
        start: int,
        n_existing: int,
        blocks: Sequence[tuple[int, int]],
        question_start: int,
        question_block: int,
    ) -> None:
        """pages: int32 [1, n_pages] on the device, placed up to the last block's end; n_existing: leading
        tokens whose KV is never written again; blocks from question_start on are of question_block queries,
        those before of QUERY_BLOCK."""
        self._layers = layers
        self._pages = pages
        self._start, self._end = start, blocks[-1][1]
        self._n_existing = n_existing
        # not that of decode: a graph has kept its addresses
        self._scratch = layers.prefill_scratch
        self.bad = torch.zeros(
            len(layers.policies), dtype=torch.int32, device=layers.memory.bank.address.device
        )
        """int32 [n_layers]: 1 = a new key or value was not finite."""
        context = [block for block in blocks if block[0] < question_start]
        question = [block for block in blocks if block[0] >= question_start]
        groups = ((QUERY_BLOCK, context), (question_block, question))
        self._groups = [_Blocks.of(size, group, pages.device) for size, group in groups if group]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [H, T, D], k and v [Hkv, T, D] -> [T, H, D]."""
        layers, policy = self._layers, self._layers.policies[layer]
        pages = layers.memory.view(layer, self._pages)
        skip = max(0, self._n_existing - self._start)
        if skip < k.shape[1]:
            gpu_ops.append_chunk_device(
                pages, 0, self._start + skip, k[:, skip:], v[:, skip:], self.bad[layer : layer + 1]
            )
        rows = q.transpose(0, 1)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        page_tokens = pages.page_tokens
        if layers.tables[layer]:
            first, last = (self._start + skip) // page_tokens, self._end // page_tokens
            gpu_ops.summarise_range(pages, layers.tables[layer], 0, first, last)
        for group in self._groups:
            at = slice(group.first - self._start, group.last - self._start)
            mask = None
            if not policy.dense:
                mask = self._selected(layer, rows[at], group, scale)
            gpu_ops.attend_prefill(
                rows[at],
                group.starts,
                pages,
                0,
                mask,
                policy,
                layers.angles,
                scale,
                out[at],
                query_block=max(gpu_ops.LEAST_QUERIES, group.size),
                precision=layers.prefill_precision,
            )
        return out

    def _selected(self, layer: int, q: Tensor, group: _Blocks, scale: float) -> DeviceMask:
        """What each block selects; q [T, H, D]."""
        layers, policy, n = self._layers, self._layers.policies[layer], group.n_blocks
        pages = layers.memory.view(layer, self._pages)
        mask = DeviceMask.empty(policy, n, pages.n_kv_heads, q.device)
        # the last block may have fewer queries; what it lacks is not read
        whole = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, n * group.size - q.shape[0]))
        blocks = whole.view(n, group.size, *q.shape[1:]).transpose(1, 2)
        gpu_ops.select_device(
            blocks,
            group.starts[:n].long(),
            group.n_queries,
            pages,
            mask,
            layers.tables[layer],
            policy,
            layers.angles,
            scale,
            self._scratch,
            fresh=torch.ones(n, dtype=torch.int32, device=q.device),
            offset=0,
            most_tokens=self._end,
            page_row=torch.zeros(n, dtype=torch.int32, device=q.device),
            query_block=group.size,
            precision=layers.select_precision,
        )
        return mask


@dataclass(frozen=True)
class _Blocks:
    """Consecutive query blocks of one size, the last one perhaps cut."""

    size: int
    first: int
    last: int
    n_blocks: int
    starts: Tensor
    """int32 [n_blocks + 1]: first positions, and the end."""
    n_queries: Tensor
    """int32 [n_blocks]"""

    @classmethod
    def of(cls, size: int, blocks: list[tuple[int, int]], device: torch.device) -> _Blocks:
        edges = [first for first, _ in blocks] + [blocks[-1][1]]
        starts = torch.tensor(edges, dtype=torch.int32)
        n_queries = starts.diff()
        return cls(size, edges[0], edges[-1], len(blocks), starts.to(device), n_queries.to(device))
