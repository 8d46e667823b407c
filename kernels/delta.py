"""Delta Attention (arXiv 2505.11254): the outputs of sparse prefill are shifted by what they miss; the
shift hardly changes from a query to its neighbours, so one dense query corrects a whole block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .attend import attend_segments, merge_partials
from .paged import PagedKV
from .plan import plan_dense
from .rope import Rope

PASS_SEGMENTS = 256
"""Segments of one pass: bounds the partials of a very long context."""
_DENSE = {rope: LayerPolicy(attend_rope=rope, sink=0, window=0) for rope in ("streaming", "none")}


def delta_correction(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    out: Tensor,
    n_kept: int,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> Tensor:
    """out [H, Tq, D] of sparse attention plus, for every query of the block, what the first one misses:
    its dense output minus its sparse one. Reads every key before the block.

    With attend_rope streaming, keys further away than the selection reaches (sink, n_kept selected
    tokens and window) stand where the farthest selected one does: a position the model knows.
    """
    dense = dense_query(q[:, :1], q_start, view, n_kept, policy, rope, scale)
    return out + (dense - out[:, :1])


def dense_query(
    q: Tensor,
    position: int,
    view: PagedKV,
    n_kept: int,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> Tensor:
    """Attention of one query to all keys up to its own: q [H, 1, D] -> [H, 1, D]."""
    near = policy.sink + n_kept + policy.window
    reach = position + 1 if policy.attend_rope == "none" else near
    segments = plan_dense(position, reach, view.page_tokens)
    dense = _DENSE[policy.attend_rope]
    outs, lses = [], []
    for i in range(0, len(segments), PASS_SEGMENTS):
        part = segments[i : i + PASS_SEGMENTS]
        o, lse = attend_segments(q.contiguous(), position, view, part, dense, rope, scale)
        o, lse = merge_partials(o, lse)
        outs.append(o)
        lses.append(lse)
    return merge_partials(torch.stack(outs), torch.stack(lses))[0]
