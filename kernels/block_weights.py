"""What a decoder block computes with outside its attention, named as the models name it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Product:
    """x W^T + bias; weight [N, K], bias [N]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class BeforeAttention:
    """norm, then q, k and v as one product [(n_heads + 2 n_kv_heads) * head_dim, hidden], then, where
    there are norms for them, each head of q and of k by itself."""

    norm: Norm
    qkv: Product
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class AfterAttention:
    """x += out(attended); x += down(silu(gate) * up) of norm(x). gate_up: gate rows, then up rows."""

    out: Product
    norm: Norm
    gate_up: Product
    down: Product
