"""Compile the numba kernels before the first request needs them."""

from __future__ import annotations

import time

import torch

from ..core.stage import LayerPolicy, Stage
from .attend import attend_segments, merge_partials
from .block import BlockRows, BlockStep, has_block_kernel
from .block_weights import Norm
from .linear import linear_rows
from .paged import PagedKV
from .plan import plan_attend
from .rope import Rope
from .select import select_blocks


def warm_up() -> float:
    """Run every kernel once on a few pages; returns the seconds it took.

    Compiled code is kept beside the sources (or in the user's cache), so only the first start after
    an installation or an update takes seconds.
    """
    started = time.monotonic()
    head_dim, page_tokens, n_pages = 16, 64, 6
    rope = Rope(torch.ones(head_dim // 2))
    policy = LayerPolicy(stages=(Stage(chunk=8, keep=16),), sink=64, window=64)
    leaves = torch.zeros(n_pages, 2, page_tokens, head_dim)
    row = torch.arange(n_pages)[None]
    view = PagedKV((leaves,), torch.zeros_like(row), row, page_tokens, n_pages * page_tokens)
    for n_queries in (64, 1):
        q = torch.zeros(2, n_queries, head_dim)
        q_start = view.n_tokens - n_queries
        selection = select_blocks(q, q_start, view, policy, rope)
        segments = plan_attend(q_start, n_queries, selection, policy, page_tokens)
        merge_partials(*attend_segments(q, q_start, view, segments, policy, rope, 1.0))
    linear_rows(torch.zeros(2, 16), torch.zeros(3, 16), torch.zeros(3))
    linear_rows(torch.zeros(1, 1024), torch.zeros(1024, 1024))  # large enough for all threads
    if has_block_kernel():
        # all its phases are one compiled function
        block = BlockStep(None, Norm(torch.ones(16), 1e-6))
        block.run(BlockRows(1, [block]))
    return time.monotonic() - started
