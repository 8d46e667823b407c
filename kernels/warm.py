"""Compile the numba kernels before the first request needs them."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from ..core.stage import LayerPolicy, Stage
from . import by_channel
from .append import append_tokens, seal_blocks
from .attend import attend_segments, merge_partials
from .block import BlockRows, BlockStep, has_block_kernel
from .block_weights import AfterAttention, BeforeAttention, Norm, Product
from .decode import PreparedDecode
from .layers import RowCall, run_layers
from .linear import linear_rows
from .paged import SCALE_BYTES, PagedKV, stored_items
from .plan import plan_attend
from .rope import Rope
from .segments import Segments
from .select import select_blocks

try:
    from .cpu_compile import is_fresh
except ModuleNotFoundError as exc:  # without numba there is nothing to compile
    if exc.name not in ("numba", "llvmlite"):
        raise

    def is_fresh() -> bool:
        return False


_log = logging.getLogger(__name__)


def warm_up() -> float:
    """Run every kernel once on a few pages; returns the seconds it took.

    Compiled code is kept beside the sources (or in the user's cache), so only the first start after
    an installation or an update takes a minute or two; it says so.
    """
    started = time.monotonic()
    if is_fresh():
        _log.warning("compiling the CPU kernels: once per machine, a minute or two")
    head_dim, page_tokens, n_pages = 16, 64, 6
    rope = Rope(torch.ones(head_dim // 2))
    policies = [
        LayerPolicy(stages=(Stage(scorer=scorer, chunk=8, keep=16),), sink=64, window=64)  # type: ignore[arg-type]
        for scorer in ("search", "bounds")
    ]
    row = torch.arange(n_pages)[None]
    for dtype in (torch.float32, torch.float16, torch.int8):  # bfloat16 is stored as float16 is
        width = head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
        leaves = torch.zeros(n_pages, 2, page_tokens, width, dtype=dtype)
        view = PagedKV((leaves,), torch.zeros_like(row), row, page_tokens, n_pages * page_tokens)
        one = torch.zeros(1, 1, head_dim)
        append_tokens(
            leaves, np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64), one, one
        )
    block = torch.zeros(1, by_channel.BLOCK_TOKENS, 32)
    sealed = torch.zeros(
        1, 2, page_tokens, stored_items(32, by_channel.DTYPE), dtype=by_channel.DTYPE
    )
    seal_blocks(sealed, np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64), block, block)
    for policy in policies:
        for n_queries in (64, 1):
            q = torch.zeros(2, n_queries, head_dim)
            q_start = view.n_tokens - n_queries
            selection = select_blocks(q, q_start, view, policy, rope)
            segments = plan_attend(q_start, n_queries, selection, policy, page_tokens)
            merge_partials(*attend_segments(q, q_start, view, segments, policy, rope, 1.0))
    exact = policies[0].model_copy(update={"attend_rope": "none"})
    for policy in (policies[0], exact):
        call = PreparedDecode(view, segments, policy, rope, 1.0, 2)
        call.attend(q, q_start, segments.base)
    linear_rows(torch.zeros(2, 16), torch.zeros(3, 16), torch.zeros(3))
    linear_rows(torch.zeros(1, 1024), torch.zeros(1024, 1024))  # large enough for all threads
    if has_block_kernel():
        _warm_layers(view, segments, policies[0], rope)
    return time.monotonic() - started


def _warm_layers(view: PagedKV, segments: Segments, policy: LayerPolicy, rope: Rope) -> None:
    """One block behind one attention: all its phases are one compiled function."""
    dim = view.head_dim
    norm, square = Norm(torch.ones(dim), 1e-6), Product(torch.zeros(dim, dim))
    gate_up, qkv = Product(torch.zeros(2 * dim, dim)), Product(torch.zeros(4 * dim, dim))
    before = BeforeAttention(norm, qkv, 2, 1, dim)
    after = AfterAttention(Product(torch.zeros(dim, 2 * dim)), norm, gate_up, square)
    steps = [BlockStep(None, before), BlockStep(after, norm)]
    rows = BlockRows(1, steps)
    steps[0].run(rows)
    prepared = PreparedDecode(view, segments, policy, rope, 1.0, 2)
    call = RowCall(prepared, view.n_tokens - 1, segments.base, append=True)
    run_layers(rows, steps[1:], [[call]])
