"""Attention of groups of queries over keys of their own, with its gradient, in the memory of one group.

Left to autograd, every group would keep its keys, values and probabilities, and each would add a tensor as
long as the context to the gradient. Here probabilities are made again from the stored log-sum-exp, as in
FlashAttention (arXiv 2205.14135, algorithm 4), and gradients are added where the keys stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.ops import Rope


@dataclass(frozen=True)
class GroupKeys:
    """Queries [start, end) and what they read, as `kernels.reference.attended_keys` gives it.

    ids int64 [n]: tokens, of which some may stand twice; seen bool [end - start, n]: each of them once
    at most for a query, and one at least; positions int64 [n], of which base is subtracted, as from the
    queries' own.
    """

    start: int
    end: int
    ids: Tensor
    seen: Tensor
    positions: Tensor
    base: int


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[GroupKeys], rope: Rope, scale: float
) -> Tensor:
    """q [H, T, D], k, v [Hkv, T, D], unrotated -> [H, T, D]. Groups cover all queries."""
    out: Tensor = _Attention.apply(q, k, v, groups, rope, scale)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Sequence[GroupKeys],
        rope: Rope,
        scale: float,
    ) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:2])
        for group in groups:
            at = slice(group.start, group.end)
            _, _, logits = _logits(q, k, group, rope, scale)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            mixed = logits.sub_(lse).exp_().flatten(1, 2) @ v[:, group.ids]
            out[:, at] = mixed.view(q.shape[0], -1, q.shape[2])
            sums[:, at] = lse.view(q.shape[0], -1)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.fixed = (groups, rope, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        groups, rope, scale = ctx.fixed
        (grad,) = grads
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        n_kv_heads = k.shape[0]
        for group in groups:
            at = slice(group.start, group.end)
            queries, keys, logits = _logits(q, k, group, rope, scale)
            lse = sums[:, at].view(n_kv_heads, -1, at.stop - at.start, 1)
            shares = logits.sub_(lse).exp_().flatten(1, 2)
            g = grad[:, at].reshape(n_kv_heads, -1, q.shape[2])
            dv.index_add_(1, group.ids, shares.mT @ g)
            rest = (g * out[:, at].reshape(g.shape)).sum(dim=-1, keepdim=True)
            dlogits = (g @ v[:, group.ids].mT).sub_(rest).mul_(shares).mul_(scale)
            where = torch.arange(at.start, at.stop) - group.base
            turned = (dlogits @ keys).view(q.shape[0], -1, q.shape[2])
            dq[:, at] = rope.rotate(turned, -where)
            turned = rope.rotate(dlogits.mT @ queries, group.base - group.positions)
            dk.index_add_(1, group.ids, turned)
        return dq, dk, dv, None, None, None


def _logits(
    q: Tensor, k: Tensor, group: GroupKeys, rope: Rope, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [Hkv, G * Tq, D] and keys [Hkv, n, D], masked logits [Hkv, G, Tq, n]."""
    where = torch.arange(group.start, group.end) - group.base
    queries = rope.rotate(q[:, group.start : group.end], where)
    queries = queries.reshape(k.shape[0], -1, q.shape[2])  # heads of a group read the same keys
    keys = rope.rotate(k[:, group.ids], group.positions - group.base)
    logits = (queries @ keys.mT).mul_(scale).unflatten(1, (-1, len(where)))
    return queries, keys, logits.masked_fill_(~group.seen, -torch.inf)
