"""Audit: which share of the attention that dense softmax would pay lies on the keys that were attended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .attend import attend_segments, merge_partials
from .paged import PagedKV
from .plan import plan_attend, plan_dense
from .rope import Rope
from .segments import Segments
from .selection import Selection

PIECE_SEGMENTS = 64
"""Segments of 8 pages read at a time: about as many keys as a decode step attends to in all layers."""
_DENSE = LayerPolicy(attend_rope="none")


class MassAudit:
    """One query of one head. Reading every key takes as long as many decode steps where contexts are long,
    so it is done in pieces, one whenever the caller has the time: `advance`."""

    def __init__(
        self,
        q: Tensor,
        position: int,
        head: int,
        selection: Selection,
        policy: LayerPolicy,
        rope: Rope,
        scale: float,
    ) -> None:
        """q: [H, 1, D] unrotated, at `position`; head: the query head looked at."""
        self._n_heads = q.shape[0]
        self._q = q[head : head + 1].clone()
        self._position, self._head = position, head
        self._selection = selection
        self._policy = policy.model_copy(update={"attend_rope": "none"})
        self._rope, self._scale = rope, scale
        self._kept = 0.0
        self._lse: list[float] = []
        self._n_read = 0

    def advance(self, view: PagedKV) -> float | None:
        """Read a piece; the share once all are read, before that None. view: of all KV heads, every page
        up to the query readable."""
        kv_head = self._head // (self._n_heads // view.n_kv_heads)
        mine = slice(kv_head, kv_head + 1)
        one = view.of_heads(mine)
        if not self._lse:
            self._kept = self._attended(one, kv_head)
        segments = plan_dense(self._position, self._position + 1, view.page_tokens)
        part = segments[self._n_read : self._n_read + PIECE_SEGMENTS]
        self._lse.append(self._lse_of(one, part, _DENSE))
        self._n_read += len(part)
        if self._n_read < len(segments):
            return None
        return math.exp(self._kept - float(torch.tensor(self._lse).logsumexp(0)))

    def _attended(self, one: PagedKV, kv_head: int) -> float:
        blocks, counts = self._selection.blocks, self._selection.counts
        at = slice(kv_head, kv_head + 1) if len(blocks) > 1 else slice(0, 1)
        selection = Selection((), blocks[at], counts[at])
        segments = plan_attend(self._position, 1, selection, self._policy, one.page_tokens)
        return self._lse_of(one, segments, self._policy)

    def _lse_of(self, one: PagedKV, segments: Segments, policy: LayerPolicy) -> float:
        q, rope = self._q, self._rope
        partials = attend_segments(q, self._position, one, segments, policy, rope, self._scale)
        return float(merge_partials(*partials)[1])
