"""Rows of a batch for the selection kernels: pages, tables, queries at positions. On a GPU with
LONGREACH_TEST_DEVICE=cuda; else in Triton's interpreter, chosen before the kernels are imported."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy
from longreach.kernels.gpu_pages import DeviceAngles, DeviceMask, DevicePages, DeviceScratch
from longreach.kernels.paged import PagedKV
from longreach.kernels.rope import Rope
from longreach.kernels.summaries import TableName, fill_table, table_shape, tables_of

DEVICE = os.environ.get("LONGREACH_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def device_pages(views: list[PagedKV]) -> DevicePages:
    return DevicePages.of(
        [replace(view, memories=tuple(m.to(DEVICE) for m in view.memories)) for view in views]
    )


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass
class Rows:
    """Some rows, each with keys of its own: position -1 is an empty place."""

    policy: LayerPolicy
    rope: Rope
    keys: list[Tensor]
    pages: DevicePages
    tables: dict[TableName, Tensor]
    q: Tensor
    q_start: Tensor
    n_queries: Tensor | None
    fresh: Tensor
    angles: DeviceAngles
    most_tokens: int
    scratch: DeviceScratch = field(default_factory=lambda: DeviceScratch(DEVICE))
    page_row: Tensor | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[3] ** -0.5)

    @property
    def n_kv_heads(self) -> int:
        return self.pages.n_kv_heads

    def queries_of(self, row: int) -> Tensor:
        """[H, live queries, D], on the CPU as all that the specification is given."""
        n = self.q.shape[2] if self.n_queries is None else int(self.n_queries[row])
        return self.q[row, :, :n].cpu()

    def live(self) -> list[int]:
        return [r for r, start in enumerate(self.q_start.tolist()) if start >= 0]

    def mask(self) -> DeviceMask:
        """Lists full of a number that is no chunk."""
        mask = DeviceMask.empty(self.policy, len(self.q_start), self.n_kv_heads, DEVICE)
        for x in (*mask.inputs, *mask.n_inputs, mask.blocks, mask.n_blocks):
            x.fill_(-7)
        return mask


def make_rows(
    paged: Any,
    rope: Rope,
    policy: LayerPolicy,
    starts: list[int],
    n_queries: list[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    group: int = 2,
    n_kv_heads: int = 2,
    page_tokens: int = 32,
    most_queries: int | None = None,
    with_tables: bool = True,
    size: float = 1.0,
) -> Rows:
    """starts: position of each row's first query; n_queries: None in decode. Tables are float32, NaN where
    no page is full."""
    counts = n_queries or [1] * len(starts)
    head_dim = rope.head_dim
    views, keys = [], []
    for start, count in zip(starts, counts, strict=True):
        n_tokens = max(1, start + count)
        k = torch.randn(n_kv_heads, n_tokens, head_dim)
        view, k, _ = paged(k, torch.randn_like(k), page_tokens, dtype, n_memories=2, seed=n_tokens)
        views.append(view)
        keys.append(k)
    pages = device_pages(views)
    tables = {}
    if with_tables:
        for name in tables_of(policy):
            shape = table_shape(name, pages.address.shape[1], n_kv_heads, page_tokens, head_dim)
            tables[name] = torch.full(shape, torch.nan)
            for row, view in enumerate(views):
                slots = pages.pages[row].cpu().numpy()
                fill_table(tables[name], name, view, slots, 0, view.n_tokens // page_tokens)
    most = most_queries or max(counts)
    q = torch.full((len(starts), n_kv_heads * group, most, head_dim), torch.nan)
    for row, count in enumerate(counts):
        q[row, :, :count] = size * torch.randn(n_kv_heads * group, count, head_dim)
    most_tokens = max(s + c for s, c in zip(starts, counts, strict=True)) + 50
    return Rows(
        policy,
        rope,
        keys,
        pages,
        {name: table.to(DEVICE) for name, table in tables.items()},
        q.to(DEVICE),
        torch.tensor(starts, device=DEVICE),
        None if n_queries is None else ints(n_queries),
        ints([1] * len(starts)),
        DeviceAngles.of(rope, most_tokens + 100, DEVICE),
        most_tokens,
    )


def lists_of(starts: Tensor, n: Tensor) -> list[list[int]]:
    """[Hsel, most] and [Hsel] -> lists."""
    return [row[:count] for row, count in zip(starts.tolist(), n.tolist(), strict=True)]
