"""What kernels on a device are given: where the pages of one layer lie for every row of a batch, what
each row selected, and tables of angles. Plain tensors, so that a captured graph finds them again.

A leaf has one address, in the device bank or in pinned host memory that the device reads across the
link: kernels do not know which. Tables are per page and KV head (100 MB for 3M tokens of an 8B model).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .paged import PagedKV, absent_page
from .rope import Rope

KIND = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.uint8: 5,
}
"""Number of a KV format in kernels; uint8 is int4, see `paged.pack`."""


@dataclass(frozen=True)
class DevicePages:
    """K and V of one layer of a batch of rows."""

    address: Tensor
    """int64 [Hkv, n_page_ids]: byte address of a page's leaf [2 (K, V), page_tokens, row]."""
    pages: Tensor
    """int32 [B, most pages]: page ids of each row in the order of their tokens."""
    page_tokens: int
    head_dim: int
    kv_dtype: torch.dtype
    row_bytes: int
    """Bytes of one stored key or value."""
    memories: tuple[Tensor, ...] = ()
    """Keeps alive what the addresses point into."""

    @property
    def n_kv_heads(self) -> int:
        return self.address.shape[0]

    @classmethod
    def of(cls, views: list[PagedKV]) -> DevicePages:
        """Of one view per row, for tests and benchmarks. Raises InternalError if a page is absent."""
        first = views[0]
        n_most = max(view.row.shape[1] for view in views)
        pages = torch.zeros(len(views), max(1, n_most), dtype=torch.int32)
        columns, n_ids = [], 0
        for b, view in enumerate(views):
            if bool((view.row < 0).any()):
                raise absent_page(view)
            starts = torch.tensor([m.data_ptr() for m in view.memories])
            leaf_bytes = 2 * view.page_tokens * view.row_bytes
            columns.append(starts[view.memory] + view.row * leaf_bytes)
            n = view.row.shape[1]
            pages[b, :n] = torch.arange(n_ids, n_ids + n)
            n_ids += n
        device = first.memories[0].device
        return cls(
            torch.cat(columns, dim=1).contiguous().to(device),
            pages.to(device),
            first.page_tokens,
            first.head_dim,
            first.kv_dtype,
            first.row_bytes,
            tuple(m for view in views for m in view.memories),
        )


@dataclass(frozen=True)
class DeviceMask:
    """What every row of a batch selected in one layer, and the input of every stage (paper Alg 4).

    Fixed sizes; lists are ascending, what lies beyond a count is garbage. Hsel = 1 for head_reduce
    "all", Hkv for "kv-group".
    """

    inputs: tuple[Tensor, ...]
    """For stages 1, 2 ...: int32 [B, Hsel, most], chunk starts that enter the stage."""
    n_inputs: tuple[Tensor, ...]
    """int32 [B, Hsel] each."""
    blocks: Tensor
    """int32 [B, Hsel, most]: block starts in tokens."""
    n_blocks: Tensor
    """int32 [B, Hsel]"""

    @property
    def n_lists(self) -> int:
        """Hsel."""
        return self.blocks.shape[1]

    def first(self, n_rows: int) -> DeviceMask:
        """Of the leading rows: views, nothing is copied."""
        return DeviceMask(
            tuple(x[:n_rows] for x in self.inputs),
            tuple(x[:n_rows] for x in self.n_inputs),
            self.blocks[:n_rows],
            self.n_blocks[:n_rows],
        )

    @classmethod
    def empty(
        cls, policy: LayerPolicy, n_rows: int, n_kv_heads: int, device: torch.device | str
    ) -> DeviceMask:
        """Room for what a policy keeps. Raises ValueError for a dense policy."""
        if policy.dense:
            raise ValueError("a dense policy selects nothing")
        n_lists = 1 if policy.head_reduce == "all" else n_kv_heads

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(n_rows, n_lists, *shape, dtype=torch.int32, device=device)

        entering = [
            before.keep // after.chunk
            for before, after in zip(policy.stages, policy.stages[1:], strict=False)
        ]
        last = policy.stages[-1]
        return cls(
            tuple(zeros(n) for n in entering),
            tuple(zeros() for _ in entering),
            zeros(last.keep // last.chunk),
            zeros(),
        )


@dataclass(frozen=True)
class DeviceAngles:
    """cos and sin of a distance as the sum of a fine and a coarse one, see `Rope.distance_tables`."""

    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    """Fine cos, sin [FINE, D / 2], coarse cos, sin [n, D / 2], float32."""
    attention_scaling: float
    n_distances: int
    """Distances that the tables reach."""

    @classmethod
    def of(cls, rope: Rope, n_distances: int, device: torch.device | str) -> DeviceAngles:
        tables = rope.distance_tables(n_distances)
        fine_cos, fine_sin, coarse_cos, coarse_sin = (t.to(device).contiguous() for t in tables)
        return cls(
            (fine_cos, fine_sin, coarse_cos, coarse_sin), rope.attention_scaling, n_distances
        )


@dataclass
class DeviceScratch:
    """Buffers that kernels of one size share, made once: a captured step allocates nothing."""

    device: torch.device | str
    buffers: dict[str, Tensor] = field(default_factory=dict)
    outgrown: list[Tensor] = field(default_factory=list)
    """A graph that was captured with a smaller buffer still writes there."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of that name, made or made larger if need be. Its contents are garbage, but counters
        (int32) begin as zeros and are left as zeros by the kernels that use them."""
        n = 1
        for size in shape:
            n *= size
        held = self.buffers.get(name)
        if held is None or held.dtype != dtype or held.numel() < n:
            if held is not None:
                self.outgrown.append(held)
            make = torch.zeros if dtype == torch.int32 else torch.empty
            held = make(n, dtype=dtype, device=self.device)
            self.buffers[name] = held
        return held[:n].view(shape)
