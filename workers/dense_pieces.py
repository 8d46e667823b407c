"""Exact causal attention in float32, a piece of the queries at a time, whose probabilities are wanted too."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 256
"""Queries whose logits exist at a time."""


def dense_probabilities(q: Tensor, start: int, keys: Tensor, scale: float) -> Tensor:
    """Causal softmax: rotated q [H, Tq, D] at start ..., rotated keys [Hkv, >= start + Tq, D]
    -> [H, Tq, start + Tq]."""
    n_heads, n_queries, _ = q.shape
    end = start + n_queries
    folded = q.reshape(keys.shape[0], -1, q.shape[2])  # heads of a group read the same keys
    logits = (folded @ keys[:, :end].mT).view(n_heads, n_queries, end).mul_(scale)
    later = torch.ones(n_queries, n_queries, dtype=torch.bool).triu(1)
    logits[:, :, start:].masked_fill_(later, -torch.inf)
    return logits.softmax(dim=-1)


def weighted(probabilities: Tensor, v: Tensor) -> Tensor:
    """[H, Tq, n] and values [Hkv, >= n, D] -> [H, Tq, D]."""
    n_heads, n_queries, n = probabilities.shape
    folded = probabilities.reshape(v.shape[0], -1, n)
    return (folded @ v[:, :n]).view(n_heads, n_queries, -1)
