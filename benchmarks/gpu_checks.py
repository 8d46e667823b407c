"""Kernels on the device against the specification, at sizes that a device is needed for as well as small
ones. Memory that nobody wrote holds NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import gpu_ops, reference
from longreach.kernels.gpu_pages import DeviceAngles, DeviceMask, DevicePages, DeviceScratch
from longreach.kernels.paged import RAW, PagedKV, pack, unpack
from longreach.kernels.rope import Rope
from longreach.kernels.summaries import empty_table, tables_of

Row = dict[str, Any]
FORMATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "int4": torch.uint8,
}
EXACT = 3e-5
"""Of float32 arithmetic, relative to values of order 1; tf32x3 has about as many bits."""


@dataclass(frozen=True)
class Case:
    """One context: keys and values as stored, and where the device finds them."""

    k: Tensor
    v: Tensor
    view: PagedKV
    pages: DevicePages
    rope: Rope
    angles: DeviceAngles
    n_heads: int

    @property
    def scale(self) -> float:
        return float(self.k.shape[2] ** -0.5)


def make_case(
    n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: Any
) -> Case:
    page_tokens, n_pages = 64, -(-n_tokens // 64)
    k, v = torch.randn(2, n_kv_heads, n_pages * page_tokens, head_dim).unbind(0)
    k[:, n_tokens:], v[:, n_tokens:] = torch.nan, torch.nan
    order = torch.randperm(n_kv_heads * n_pages).view(n_kv_heads, n_pages)
    stored = torch.stack((k, v), dim=1).view(n_kv_heads, 2, n_pages, page_tokens, head_dim)
    leaves = pack(stored.transpose(1, 2).flatten(0, 1).contiguous(), dtype)
    memory = torch.empty_like(leaves)
    memory.view(RAW[dtype])[order.flatten()] = leaves.view(RAW[dtype])
    memory = memory.to(device)
    at = torch.zeros_like(order)
    view = PagedKV((memory,), at, order, page_tokens, n_tokens)
    rope = Rope(1.0 / 500000.0 ** (torch.arange(0, head_dim, 2) / head_dim))
    kept = [unpack(pack(x[:, :n_tokens], dtype)) for x in (k, v)]
    angles = DeviceAngles.of(rope, n_tokens + 4096, device)
    return Case(kept[0], kept[1], view, DevicePages.of([view]), rope, angles, n_heads)


def policy_of(small: bool, **more: Any) -> LayerPolicy:
    if small:
        stages = (
            Stage(scorer="bounds", chunk=64, keep=256, refresh=4),
            Stage(scorer="bounds", chunk=8, keep=64, refresh=2),
        )
        return LayerPolicy(sink=64, window=64, stages=stages, **more)
    stages = (
        Stage(scorer="mean", chunk=256, keep=8192, refresh=16, query_stride=4),
        Stage(scorer="bounds", chunk=8, keep=2048, refresh=4, query_stride=2, spread=0.4),
    )
    return LayerPolicy(stages=stages, **more)


def run(device: torch.device, precision: str, *, small: bool) -> list[Row]:
    """One row per check: name, error, the most it may be, and whether it passed."""
    torch.manual_seed(20261125)
    sizes = (400, 2, 1, 32) if small else (20_011, 32, 8, 128)
    found: list[Row] = []
    for name, dtype in FORMATS.items():
        if small and name not in ("float16", "int4"):
            continue
        case = make_case(*sizes, dtype, device)
        for what, error, most in _of_case(case, device, precision, small):
            row = {"name": f"{what}, {name}", "error": error, "most": most}
            found.append(row | {"passed": bool(error <= most)})
    return found


def _of_case(
    case: Case, device: torch.device, precision: str, small: bool
) -> Iterator[tuple[str, float, float]]:
    n_tokens, position = case.k.shape[1], case.k.shape[1] - 1
    q = torch.randn(1, case.n_heads, case.k.shape[2])
    at = torch.tensor([position], device=device)
    scratch = DeviceScratch(device)
    fresh = torch.ones(1, dtype=torch.int64, device=device)

    def attend(policy: LayerPolicy, mask: DeviceMask | None) -> Tensor:
        out = torch.full_like(q, torch.nan).to(device)
        gpu_ops.attend_decode(
            q.to(device), at, case.pages, mask, policy, case.angles, case.scale, out, scratch,
            precision=precision,
        )  # fmt: skip
        return out.cpu()

    dense = LayerPolicy(attend_rope="none", sink=0, window=0)
    want, _ = reference.dense_attention(
        q.transpose(0, 1), position, case.k, case.v, case.rope, case.scale
    )
    yield "dense decode", _error(attend(dense, None), want.transpose(0, 1)), EXACT
    for reduce in ("max", "softmax"):
        policy = policy_of(small, reduce=reduce)
        tables = device_tables(case, policy, device)
        mask = DeviceMask.empty(policy, 1, case.pages.n_kv_heads, device)
        gpu_ops.select_device(
            q.to(device).unsqueeze(2), at, None, case.pages, mask, tables, policy, case.angles,
            case.scale, scratch, fresh=fresh, offset=0, most_tokens=n_tokens, precision=precision,
        )  # fmt: skip
        blocks = mask.blocks[0, :, : int(mask.n_blocks[0, 0])].cpu().tolist()
        wanted = reference.select(
            q.transpose(0, 1), position, case.k, policy, case.rope, scale=case.scale
        )[1]
        # what the device kept and the specification did not, as a share; 16-bit summaries may swap ties
        missed = len(set(wanted[0]) - set(blocks[0])) / max(1, len(wanted[0]))
        yield f"selection ({reduce})", missed, 0.02
        want, _ = reference.sparse_attention(
            q.transpose(0, 1), position, case.k, case.v, blocks, policy, case.rope, case.scale
        )
        yield f"sparse decode ({reduce})", _error(attend(policy, mask), want.transpose(0, 1)), EXACT
    yield "prefill", _prefill_error(case, device, precision, small), 10 * EXACT
    yield "summaries", _summary_error(case, policy_of(small), device), 0.0


def device_tables(case: Case, policy: LayerPolicy, device: torch.device) -> dict[Any, Tensor]:
    """Summaries of all full pages, made on the device; slots are page numbers."""
    n_slots = case.pages.address.shape[1]
    names = tables_of(policy)
    tables = {name: empty_table(name, case.view, n_slots, device) for name in names}
    n_pages = case.view.n_tokens // case.view.page_tokens
    gpu_ops.summarise_range(case.pages, tables, 0, 0, n_pages)
    return tables


def _summary_error(case: Case, policy: LayerPolicy, device: torch.device) -> float:
    """Against the same made on the CPU."""
    from longreach.kernels.summaries import summarise_pages

    found = device_tables(case, policy, device)
    here = PagedKV(
        tuple(m.cpu() for m in case.view.memories),
        case.view.memory,
        case.view.row,
        case.view.page_tokens,
        case.view.n_tokens,
    )
    wanted = summarise_pages(here, policy)
    n_pages = wanted.n_pages
    worst = 0.0
    for name, table in wanted.tables.items():
        got = found[name][:n_pages].cpu().float()
        step = 2.0**-7 if table.dtype == torch.bfloat16 else 2.0**-10
        most = table.float().abs() * step + 1e-5
        worst = max(worst, float(((got - table.float()).abs() - most).clamp(min=0).max()))
    return worst


def _prefill_error(case: Case, device: torch.device, precision: str, small: bool) -> float:
    """Two blocks of 64 queries at the context's end, over blocks chosen at random."""
    policy = policy_of(small)
    start = (case.k.shape[1] // 64 - 2) * 64
    n_kept = policy.stages[-1].keep // policy.block_tokens
    mask = DeviceMask.empty(policy, 2, case.pages.n_kv_heads, device)
    blocks = []
    for m in range(2):
        most = (start + 64 * m - policy.window - policy.sink) // policy.block_tokens
        chosen = torch.randperm(most)[:n_kept].sort().values * policy.block_tokens + policy.sink
        mask.blocks[m, 0, : len(chosen)] = chosen.to(device)
        mask.n_blocks[m, 0] = len(chosen)
        blocks.append(chosen.tolist())
    q = torch.randn(128, case.n_heads, case.k.shape[2])
    out = torch.full_like(q, torch.nan).to(device)
    starts = torch.tensor([start, start + 64, start + 128], dtype=torch.int32, device=device)
    gpu_ops.attend_prefill(
        q.to(device), starts, case.pages, 0, mask, policy, case.angles, case.scale, out,
        query_block=64, precision=precision,
    )  # fmt: skip
    worst = 0.0
    for m in range(2):
        part = slice(64 * m, 64 * (m + 1))
        want, _ = reference.sparse_attention(
            q[part].transpose(0, 1), start + 64 * m, case.k, case.v, [blocks[m]], policy,
            case.rope, case.scale,
        )  # fmt: skip
        worst = max(worst, _error(out[part].cpu(), want.transpose(0, 1)))
    return worst


def _error(found: Tensor, want: Tensor) -> float:
    difference = (found - want).abs().max()
    return float(difference) if bool(torch.isfinite(found).all()) else float("inf")
