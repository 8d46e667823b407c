"""Layers put in place of the model's own: a row's bits do not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.ops import linear_rows
from .memory import huge_zeros

MIN_GEMM_ROWS = 16
"""Library GEMMs give other bits for a few rows (measured: 1-3, 5-7, 9-11); padded above that."""


def gemm_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [n, K], weight [N, K] -> [n, N]: a library GEMM of so many rows that a row's bits do not depend
    on the others."""
    n_rows = len(rows)
    if n_rows < MIN_GEMM_ROWS:
        rows = nn.functional.pad(rows, (0, 0, 0, MIN_GEMM_ROWS - n_rows))
    return nn.functional.linear(rows, weight, bias)[:n_rows]


class RowLinear(nn.Module):
    """A linear layer whose result for a row does not depend on the other rows.

    Decode (few rows) runs our own kernel; prefill runs a library GEMM padded to a row count from
    which its bits no longer change. Several layers that read the same input are one product.
    """

    def __init__(self, sources: Sequence[nn.Linear], mode: dict[str, bool]) -> None:
        super().__init__()
        rows = [source.weight.shape[0] for source in sources]
        weight = huge_zeros((sum(rows), sources[0].weight.shape[1]), torch.float32)
        torch.cat([source.weight.detach() for source in sources], out=weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if any(source.bias is not None for source in sources):
            parts: list[Tensor] = [
                s.weight.new_zeros(n) if s.bias is None else s.bias
                for s, n in zip(sources, rows, strict=True)
            ]
            self.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
        self._mode = mode
        self.beside: Callable[[Tensor, Tensor], None] | None = None
        """Given rows [n, K] and what came of them, adds to the latter: prefill's bookmarks have projections
        of their own."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._mode["decode"]:
            out = linear_rows(rows, self.weight, self.bias)
        else:
            out = gemm_rows(rows, self.weight, self.bias)
            if self.beside is not None:
                self.beside(rows, out)
        return out.reshape(*x.shape[:-1], -1)


class RowNorm(nn.Module):
    """RMSNorm as the model's own, with the same bits, in one operation."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = source.weight, float(source.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)  # type: ignore[arg-type]


def replace_norms(model: nn.Module) -> None:
    """Only modules that compute just this on a trial: a model may scale otherwise (1 + weight)."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not hasattr(child, "variance_epsilon") or not hasattr(child, "weight"):
                continue
            ours = RowNorm(child)
            trial = torch.linspace(-2, 2, child.weight.numel())[None]  # type: ignore[union-attr, operator]
            if torch.equal(ours(trial), child(trial)):
                setattr(parent, name, ours)


class Share(nn.Module):
    """One output of a joint RowLinear. The first share that sees an input computes all of them."""

    def __init__(self, joint: RowLinear, first: int, last: int, kept: list[Any]) -> None:
        super().__init__()
        self._joint = [joint]  # in a list: the model must not list its weight several times
        self.first, self.last = first, last
        self._kept = kept

    @property
    def joint(self) -> RowLinear:
        return self._joint[0]

    def forward(self, x: Tensor) -> Tensor:
        if not self._kept or self._kept[0] is not x:
            self._kept[:] = [x, self.joint(x)]
        out: Tensor = self._kept[1][..., self.first : self.last]
        return out


_JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input, by the names all supported models give them."""


def replace_linears(model: nn.Module, mode: dict[str, bool]) -> None:
    for parent in list(model.modules()):
        children = {n: c for n, c in parent.named_children() if isinstance(c, nn.Linear)}
        for names in _JOINT:
            if not all(name in children for name in names):
                continue
            group = [children.pop(name) for name in names]
            joint, first = RowLinear(group, mode), 0
            kept: list[Any] = []
            for name, source in zip(names, group, strict=True):
                last = first + source.weight.shape[0]
                setattr(parent, name, Share(joint, first, last, kept))
                first = last
        for name, child in children.items():
            setattr(parent, name, RowLinear([child], mode))
