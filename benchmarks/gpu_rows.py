"""Rows whose KV was never computed: pages of random numbers, on the device or in its host's memory.

Decode reads what it selects, whatever the numbers are, so speed can be measured at lengths that nobody
has the time to prefill. Pages beyond what memory holds share their bytes with others ("folded").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longreach.core.page_key import RecipeFingerprint
from longreach.kernels.paged import TORCH_DTYPE, pack
from longreach.kvstore.page import PageGeometry
from longreach.workers.gpu_memory import GpuMemory
from longreach.workers.gpu_steps import GpuLayers
from longreach.workers.page_flow import PageFlow
from longreach.workers.page_list import PageList
from longreach.workers.row import Row, RowRequest
from longreach.workers.sampling import Sampling

N_MODELS = 64
"""Different leaves that random pages are made of."""


@dataclass(frozen=True)
class Pool:
    """uint8 [n_pages, page_nbytes], on the device or in pinned host memory."""

    bytes: Tensor
    folded: int
    """Pages of a row that share one page of the pool; 1 = none."""


def random_pool(
    geometry: PageGeometry, n_pages: int, most_bytes: int, device: torch.device, *, host: bool
) -> Pool:
    """Pages of normal numbers in the geometry's format. Raises RuntimeError if memory is short."""
    folded = max(1, -(-n_pages * geometry.page_nbytes // max(1, most_bytes)))
    n_own = -(-n_pages // folded)
    shape = (n_own, geometry.page_nbytes)
    pinned = host and device.type == "cuda"
    pool = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) if host else None
    if pool is None:
        pool = torch.empty(shape, dtype=torch.uint8, device=device)
    rows = torch.randn(N_MODELS, 2 * geometry.page_tokens, geometry.head_dim)
    leaves = pack(rows, TORCH_DTYPE[geometry.kv_dtype]).view(torch.uint8)
    leaves = leaves.reshape(N_MODELS, geometry.leaf_nbytes).to(pool.device)
    by_leaf = pool.view(-1, geometry.leaf_nbytes)
    for first in range(0, len(by_leaf), N_MODELS):
        part = by_leaf[first : first + N_MODELS]
        part.copy_(leaves[: len(part)])
    return Pool(pool, folded)


def lay_out(memory: GpuMemory, pool: Pool, n_pages: int, *, held: bool) -> None:
    """The first pages of the tables lie in the pool: held on the device, or at home on the host."""
    ids = torch.arange(n_pages, device=memory.bank.address.device)
    start = pool.bytes.data_ptr() + ids // pool.folded * memory.geometry.page_nbytes
    memory.lay_out(start, ids, held=held)


def take_numbers(flow: PageFlow, n_pages: int) -> None:
    """Page numbers 0 … n_pages - 1 are in use, so that new pages get others."""
    while len(flow.pages) < n_pages:
        flow.renew(flow.pages.new(None, "row"))


def add_page(flow: PageFlow) -> int:
    """A new page with room on the device."""
    page_id = flow.pages.new(None, "row")
    flow.renew(page_id)
    flow.memory.place(page_id)
    return page_id


def random_tables(layers: GpuLayers) -> None:
    """Summaries as random keys have them: selection then scatters over the whole context."""
    for tables in layers.tables:
        for table in tables.values():
            table.normal_()


def ready_row(name: str, n_tokens: int, page_tokens: int, vocab: int) -> Row:
    """A row that has read n_tokens and is about to decode; room for 8 more pages of answer."""
    prompt = np.random.default_rng(0).integers(0, vocab, n_tokens).astype(np.uint32)
    request = RowRequest(name, prompt, n_tokens, Sampling(max_tokens=8 * page_tokens))
    row = Row(request, [], n_tokens, 0.0, 0)
    row.page_ids = PageList(range(-(-n_tokens // page_tokens)))
    row.n_done = n_tokens
    row.tokens = [1]
    return row


NO_RECIPE = RecipeFingerprint(b"\0" * 32)
