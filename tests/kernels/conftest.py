"""Pages made of dense tensors, and memory in which whatever nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from longreach.kernels import attend, by_channel, linear, score, select, summaries
from longreach.kernels.append import seal_torch
from longreach.kernels.cpu_pool import POOL
from longreach.kernels.paged import (
    RAW,
    OpenBlock,
    PagedKV,
    block_start,
    pack,
    stored_items,
    unpack,
)
from longreach.kernels.rope import Rope


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh and kept buffers hold NaN, so that reading an unwritten element shows."""
    torch_empty, np_empty, scratch = torch.empty, np.empty, POOL.scratch

    def fill(buffer: Any) -> Any:
        if isinstance(buffer, torch.Tensor):
            return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer
        if buffer.dtype.kind == "f":
            buffer.fill(np.nan)
        return buffer

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(torch_empty(*a, **k)))
    monkeypatch.setattr(np, "empty", lambda *a, **k: fill(np_empty(*a, **k)))
    monkeypatch.setattr(POOL, "scratch", lambda *a, **k: fill(scratch(*a, **k)))


@pytest.fixture(params=["numba", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with the numba kernels, and as where numba is missing."""
    if request.param == "torch":
        monkeypatch.setattr(attend, "cpu_attend", None)
        monkeypatch.setattr(attend, "cpu_merge", None)
        monkeypatch.setattr(score, "cpu_search", None)
        monkeypatch.setattr(score, "cpu_summaries", None)
        monkeypatch.setattr(select, "cpu_top", None)
        monkeypatch.setattr(linear, "cpu_linear", None)
        monkeypatch.setattr(summaries, "cpu_page_summaries", None)
    else:
        assert attend.cpu_attend is not None
        assert attend.cpu_merge is not None
        assert score.cpu_search is not None
        assert score.cpu_summaries is not None
        assert select.cpu_top is not None
        assert linear.cpu_linear is not None
        assert summaries.cpu_page_summaries is not None
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20261123)


@pytest.fixture
def rope() -> Callable[..., Rope]:
    def make(head_dim: int, scaling: float = 1.0, base: float = 10000.0) -> Rope:
        return Rope(1.0 / base ** (torch.arange(0, head_dim, 2) / head_dim), scaling)

    return make


@pytest.fixture
def paged() -> Callable[..., tuple[PagedKV, torch.Tensor, torch.Tensor]]:
    """k, v [Hkv, T, D] -> a view over shuffled leaves in several memories, everything else NaN, and
    k, v as the pages hold them (rounded)."""

    def make(
        k: torch.Tensor,
        v: torch.Tensor,
        page_tokens: int = 64,
        dtype: torch.dtype = torch.float32,
        n_memories: int = 1,
        seed: int = 0,
    ) -> tuple[PagedKV, torch.Tensor, torch.Tensor]:
        if dtype == by_channel.DTYPE:
            return paged_by_channel(k, v, page_tokens, n_memories, seed)
        random = torch.Generator().manual_seed(seed)
        n_heads, n_tokens, head_dim = k.shape
        n_pages = -(-n_tokens // page_tokens)
        n_leaves = n_heads * n_pages

        def stored(x: torch.Tensor) -> torch.Tensor:
            return pack(x, dtype).view(RAW[dtype])

        empty = stored(torch.full((n_leaves + 3, 2, page_tokens, head_dim), torch.nan))
        memories = tuple(empty.clone() for _ in range(n_memories))
        memory = torch.randint(0, n_memories, (n_heads, n_pages), generator=random)
        row = torch.randperm(n_leaves + 3, generator=random)[:n_leaves].view(n_heads, n_pages)
        for h in range(n_heads):
            for page in range(n_pages):
                tokens = slice(page * page_tokens, min((page + 1) * page_tokens, n_tokens))
                leaf = memories[memory[h, page]][row[h, page]]
                leaf[0, : tokens.stop - tokens.start] = stored(k[h, tokens])
                leaf[1, : tokens.stop - tokens.start] = stored(v[h, tokens])
        typed = tuple(m.view(dtype) for m in memories)
        view = PagedKV(typed, memory, row, page_tokens, n_tokens)
        return view, unpack(pack(k, dtype)), unpack(pack(v, dtype))

    return make


def paged_by_channel(
    k: torch.Tensor, v: torch.Tensor, page_tokens: int, n_memories: int, seed: int
) -> tuple[PagedKV, torch.Tensor, torch.Tensor]:
    """As `paged`: full blocks in pages, the last token's in an open block."""
    random = torch.Generator().manual_seed(seed)
    n_heads, n_tokens, head_dim = k.shape
    n_pages = -(-n_tokens // page_tokens)
    n_leaves = n_heads * n_pages + 3
    first, block = block_start(n_tokens - 1), by_channel.BLOCK_TOKENS
    shape = (n_leaves, 2, page_tokens, stored_items(head_dim, by_channel.DTYPE))
    memories = tuple(
        torch.full(shape, -1, dtype=torch.int16).view(by_channel.DTYPE) for _ in range(n_memories)
    )
    memory = torch.randint(0, n_memories, (n_heads, n_pages), generator=random)
    row = torch.randperm(n_leaves, generator=random)[:-3].view(n_heads, n_pages)
    for h in range(n_heads):
        for start in range(0, first, block):
            page, tokens = start // page_tokens, slice(start, start + block)
            at = np.array([[int(row[h, page])]]), np.array([start % page_tokens // block])
            one = slice(h, h + 1)
            seal_torch(memories[memory[h, page]], *at, k[one, tokens], v[one, tokens])
    open_kv = torch.full((2, n_heads, block, head_dim), torch.nan)
    open_kv[0, :, : n_tokens - first] = k[:, first:]
    open_kv[1, :, : n_tokens - first] = v[:, first:]
    view = PagedKV(memories, memory, row, page_tokens, n_tokens, OpenBlock(open_kv, first))
    both = (by_channel.rounded(x[:, :first], keys) for x, keys in ((k, True), (v, False)))
    sealed_k, sealed_v = both
    return view, torch.cat((sealed_k, k[:, first:]), 1), torch.cat((sealed_v, v[:, first:]), 1)
