"""Low-rank adapters (LoRA, arXiv 2106.09685) on the products of a decoder: what learns while the model's own
weights stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PLACES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Modules of a decoder layer, and their products that bear an adapter."""


class LoraLinear(nn.Module):
    """A frozen product plus `up(scale * down(x))`. As made here nothing is added."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        n_out, n_in = base.weight.shape
        self.down = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[n, n_in] -> [n, n_out]"""
        low = functional.linear(x, self.down) * self.scale
        return torch.addmm(self.base(x), low, self.up.mT)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The product alone, with what was added inside its weight."""
        self.base.weight += self.scale * (self.up @ self.down)
        return self.base


def add_lora(layers: Any, rank: int, alpha: float) -> dict[str, nn.Parameter]:
    """Put adapters into decoder layers, drawn from torch's generator. Returns what learns, by name.

    alpha: of LoRA; what is added is scaled by alpha / rank.
    """
    learned: dict[str, nn.Parameter] = {}
    for i, layer in enumerate(layers):
        for part, names in PLACES.items():
            module = getattr(layer, part)
            for name in names:
                adapter = LoraLinear(getattr(module, name), rank, alpha / rank)
                setattr(module, name, adapter)
                learned[f"{i}.{part}.{name}.down"] = adapter.down
                learned[f"{i}.{part}.{name}.up"] = adapter.up
    return learned


def merge_lora(layers: Any) -> None:
    """Put what adapters add into the weights, and the plain products back in their places."""
    for layer in layers:
        for part, names in PLACES.items():
            module = getattr(layer, part)
            for name in names:
                product = getattr(module, name)
                if isinstance(product, LoraLinear):
                    setattr(module, name, product.merged())
