"""Model adapter: any dense RoPE decoder of transformers, with our attention and no rotary of its own.

q and k reach us unrotated: the model's rotary module is replaced by an identity, its frequencies and
scaling are read first. Attention is registered through AttentionInterface (DESIGN 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModel
from ..kernels.ops import Rope, linear_rows
from .memory import huge_zeros
from .model_source import head_dim_of, load_model_config

_ATTENTION_NAME = "longreach"
MIN_GEMM_ROWS = 16
"""Library GEMMs give other bits for a few rows (measured: 1-3, 5-7, 9-11); padded above that."""


class AttentionStep(Protocol):
    """What one forward pass hands to every layer's attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [H, T, D], k and v [Hkv, T, D], unrotated, T packed tokens. Returns [T, H, D]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    longreach: AttentionStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if longreach is None:
        raise RuntimeError("the longreach attention needs the keyword `longreach`")
    out = longreach.attend(int(module.layer_idx), query[0], key[0], value[0], scaling)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


class _IdentityRotary(nn.Module):
    """Leaves q and k as they are: cos 1, sin 0."""

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


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

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._mode["decode"]:
            out = linear_rows(rows, self.weight, self.bias)
        elif len(rows) < MIN_GEMM_ROWS:
            padded = rows.new_zeros(MIN_GEMM_ROWS, rows.shape[1])
            padded[: len(rows)] = rows
            out = nn.functional.linear(padded, self.weight, self.bias)[: len(rows)]
        else:
            out = nn.functional.linear(rows, self.weight, self.bias)
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


class _Share(nn.Module):
    """One output of a joint RowLinear. The first share that sees an input computes all of them."""

    def __init__(self, joint: RowLinear, first: int, last: int, kept: list[Any]) -> None:
        super().__init__()
        self._joint = [joint]  # in a list: the model must not list its weight several times
        self._first, self._last = first, last
        self._kept = kept

    def forward(self, x: Tensor) -> Tensor:
        if not self._kept or self._kept[0] is not x:
            self._kept[:] = [x, self._joint[0](x)]
        out: Tensor = self._kept[1][..., self._first : self._last]
        return out


_JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input, by the names all supported models give them."""


def _replace_linears(model: nn.Module, mode: dict[str, bool]) -> None:
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
                setattr(parent, name, _Share(joint, first, last, kept))
                first = last
        for name, child in children.items():
            setattr(parent, name, RowLinear([child], mode))


class ModelAdapter:
    """A loaded model: `hidden` runs the decoder with our attention, `logits` its head."""

    def __init__(self, directory: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.config = load_model_config(directory)
        AttentionInterface.register(_ATTENTION_NAME, _attention)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation=_ATTENTION_NAME
            )
        except (OSError, ValueError, RuntimeError) as exc:
            raise UnsupportedModel(f"{directory}: weights cannot be loaded: {exc}") from exc
        model.eval().requires_grad_(False)
        rotary = model.model.rotary_emb
        self.rope = Rope(rotary.inv_freq.float().clone(), float(rotary.attention_scaling))
        model.model.rotary_emb = _IdentityRotary()
        self._mode = {"decode": False}
        _replace_linears(model, self._mode)
        replace_norms(model)
        self._model = model
        self.n_layers = int(self.config.num_hidden_layers)
        self.n_heads = int(self.config.num_attention_heads)
        self.n_kv_heads = int(self.config.num_key_value_heads)
        self.head_dim = head_dim_of(self.config)
        self.vocab_size = int(self.config.vocab_size)
        self.eos_token_ids = _eos_ids(model)

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, step: AttentionStep, *, decode: bool) -> Tensor:
        """token_ids int64 [T] (packed tokens of one chunk, or one per decoding row) -> [T, hidden]."""
        self._mode["decode"] = decode
        out = self._model.model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=torch.zeros(1, len(token_ids), dtype=torch.int64),
            use_cache=False,
            longreach=step,
        )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab]; always our own kernel, so a row's bits never change."""
        self._mode["decode"] = True
        return self._model.lm_head(hidden)  # type: ignore[no-any-return]


def _eos_ids(model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for source in (model.generation_config, model.config):
        eos = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else (eos or []))
    return frozenset(ids)
