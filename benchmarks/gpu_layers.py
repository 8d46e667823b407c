"""One layer's decode attention by context length: everything cached, and as refreshes come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy
from longreach.kernels import gpu_ops
from longreach.kernels.rope import Rope
from longreach.kvstore.page import PageGeometry
from longreach.workers.gpu_batch import DeviceBatch
from longreach.workers.gpu_memory import GpuMemory, always_reachable
from longreach.workers.gpu_steps import GpuDecodeStep, GpuLayers

from .gpu_rows import Pool, lay_out, random_pool, random_tables, ready_row
from .gpu_time import seconds_of

DENSE = LayerPolicy(attend_rope="none", sink=0, window=0)


@dataclass(frozen=True)
class Shape:
    """Geometry of the attention of one layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    page_tokens: int = 64


class Aligned(GpuLayers):
    """All layers refresh at the same positions, so that a step of each kind can be timed by itself."""

    def offset(self, layer: int) -> int:
        return 0


def rig(
    shape: Shape,
    policy: LayerPolicy,
    kv_dtype: str,
    n_tokens: int,
    n_layers: int,
    pool: Pool,
    device: torch.device,
    *,
    n_copies: int = 0,
    host: bool = False,
    precision: str = "tf32x3",
) -> tuple[GpuLayers, DeviceBatch]:
    """One row of n_tokens in n_layers layers, ready to decode. host: its pages are on the host and the bank
    has room for n_copies of them per KV head."""
    geometry = PageGeometry(n_layers, shape.n_kv_heads, shape.page_tokens, shape.head_dim, kv_dtype)
    n_pages = -(-n_tokens // shape.page_tokens) + 8
    memory = GpuMemory(geometry, 1, max(1, n_copies), n_pages, 64, None, device, always_reachable)
    lay_out(memory, pool, n_pages, held=not host)
    rope = Rope(1.0 / 500000.0 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim))
    policies = [policy] * n_layers
    most_tokens = n_tokens + 8 * shape.page_tokens
    layers = Aligned.of(memory, policies, rope, most_tokens, precision)
    random_tables(layers)
    batch = DeviceBatch(1, n_pages, policies, shape.n_kv_heads, device)
    return layers, batch


def step_seconds(
    shape: Shape,
    layers: GpuLayers,
    batch: DeviceBatch,
    n_tokens: int,
    device: torch.device,
    *,
    graph: bool = True,
    repeats: int = 20,
) -> dict[str, float]:
    """Seconds per layer of a step in which nothing is due, the last stage is, or all are; and their mean
    over the schedule."""
    policy = layers.policies[0]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n_layers = len(layers.policies)

    def fresh(n_heads: int) -> Tensor:
        return torch.randn(n_layers, n_heads, 1, shape.head_dim, device=device).to(dtype)

    q, k, v = fresh(shape.n_heads), fresh(shape.n_kv_heads), fresh(shape.n_kv_heads)
    step = GpuDecodeStep(layers, batch, 1)

    def body() -> None:
        step.begin()
        for layer in range(n_layers):
            step.attend(layer, q[layer], k[layer], v[layer], shape.head_dim**-0.5)

    intervals = policy.refreshes or (1,)
    whole = intervals[0]
    base = n_tokens // whole * whole
    row = ready_row("row", n_tokens, shape.page_tokens, 100)
    at = {"warm": base + 1, "all": base}
    if len(intervals) > 1 and intervals[-1] < whole:
        at["last"] = base + intervals[-1]
    found: dict[str, float] = {}
    row.n_done = base
    batch.load([row], shape.page_tokens)
    body()  # the first step selects everything
    for name, position in at.items():
        row.n_done = position
        batch.load([row], shape.page_tokens)
        seconds = seconds_of(body, device, repeats=repeats, graph=graph)
        found[name] = seconds / n_layers
    n_last = whole // intervals[-1] - 1 if "last" in at else 0
    n_warm = whole - 1 - n_last
    total = found["all"] + n_last * found.get("last", 0.0) + n_warm * found["warm"]
    found["amortised"] = total / whole
    return found


def measure(
    shape: Shape,
    policies: dict[str, LayerPolicy],
    contexts: Sequence[int],
    kv_dtype: str,
    device: torch.device,
    most_bytes: int,
    precision: str,
    most_layers: int = 8,
) -> list[dict[str, Any]]:
    """µs per layer by context, beside torch's attention over every key and our own kernel's."""
    rows = []
    for n_tokens in contexts:
        one = PageGeometry(1, shape.n_kv_heads, shape.page_tokens, shape.head_dim, kv_dtype)
        n_pages = -(-n_tokens // shape.page_tokens) + 8
        # so many layers that the pages of one have left the cache when its turn comes again
        n_layers = max(
            min(2, most_layers), min(most_layers, most_bytes // (n_pages * one.page_nbytes))
        )
        geometry = PageGeometry(
            n_layers, shape.n_kv_heads, shape.page_tokens, shape.head_dim, kv_dtype
        )
        pool = random_pool(geometry, n_pages, most_bytes, device, host=False)
        row: dict[str, Any] = {"n_tokens": n_tokens, "n_layers": n_layers, "folded": pool.folded}
        for name, policy in {**policies, "dense": DENSE}.items():
            layers, batch = rig(
                shape, policy, kv_dtype, n_tokens, n_layers, pool, device, precision=precision
            )
            seconds = step_seconds(shape, layers, batch, n_tokens, device)
            row[name] = {part: round(1e6 * s, 2) for part, s in seconds.items()}
        row["sdpa_us"] = sdpa_us(shape, n_tokens, device)
        n_bytes = n_tokens * 2 * shape.n_kv_heads * one.row_nbytes
        row["dense_gb_per_s"] = round(n_bytes / row["dense"]["warm"] / 1e3, 1)
        rows.append(row)
    return rows


def sdpa_us(shape: Shape, n_tokens: int, device: torch.device) -> float | None:
    """torch's attention of one query, the heads of a group folded into the query axis; None where memory
    does not suffice."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = shape.n_heads // shape.n_kv_heads
    try:
        k = torch.randn(1, shape.n_kv_heads, n_tokens, shape.head_dim, device=device, dtype=dtype)
        v = torch.randn_like(k)
        q = torch.randn(1, shape.n_kv_heads, group, shape.head_dim, device=device, dtype=dtype)
        attend = torch.nn.functional.scaled_dot_product_attention
        return round(1e6 * seconds_of(lambda: attend(q, k, v), device), 2)
    except torch.OutOfMemoryError:
        return None


def by_hit_ratio(
    shape: Shape,
    policy: LayerPolicy,
    n_tokens: int,
    kv_dtype: str,
    device: torch.device,
    most_bytes: int,
    ratios: Sequence[float],
    precision: str,
) -> list[dict[str, Any]]:
    """µs of attention alone when a share of the pages it reads is on the device and the rest is read across
    the link."""
    n_pages = -(-n_tokens // shape.page_tokens) + 8
    geometry = PageGeometry(2, shape.n_kv_heads, shape.page_tokens, shape.head_dim, kv_dtype)
    here = random_pool(geometry, n_pages, most_bytes, device, host=False)
    there = random_pool(geometry, n_pages, most_bytes, device, host=True)
    layers, batch = rig(shape, policy, kv_dtype, n_tokens, 2, here, device, precision=precision)
    step_seconds(shape, layers, batch, n_tokens, device, repeats=1, graph=False)
    memory, rows = layers.memory, []
    near = memory.bank.address.clone()
    lay_out(memory, there, n_pages, held=False)
    far = memory.bank.address.clone()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(1, shape.n_heads, shape.head_dim, device=device).to(dtype)
    out = torch.empty_like(q)
    for ratio in ratios:
        hit = torch.rand(n_pages, device=device) < ratio
        memory.bank.address.copy_(torch.where(hit, near, far))

        def attend() -> None:
            for layer in range(2):
                gpu_ops.attend_decode(
                    q,
                    batch.position,
                    layers.memory.view(layer, batch.pages),
                    batch.masks[layer],
                    policy,
                    layers.angles,
                    shape.head_dim**-0.5,
                    out,
                    layers.scratch,
                    precision=layers.precision,
                )

        seconds = seconds_of(attend, device) / 2
        rows.append({"hit_ratio": ratio, "us": round(1e6 * seconds, 2)})
    return rows
