"""Decode by block kernels instead of the model's modules, for models proved to be such blocks.

The modules of a layer are a dozen small operations around four products; for one token they take
longer than reading the weights. Which models the kernels fit is not asked by name: the layers must be
made of exactly the parts that the kernels know, and a trial must give the modules' own numbers. All
else stays with the modules, which is slower and never wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..kernels.ops import (
    AfterAttention,
    BeforeAttention,
    BlockRows,
    BlockStep,
    LayersDone,
    Norm,
    Product,
    RowCall,
    has_block_kernel,
    run_layers,
)
from .row_layers import RowLinear, RowNorm, Share

if TYPE_CHECKING:
    from .model import AttentionStep

_log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Of the deviation of what the modules give."""

_MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_SHARES = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
_HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_PRODUCTS = {"self_attn.o_proj", "mlp.down_proj"}
_LAYER_PARTS = {
    *("", "self_attn", "mlp", "mlp.act_fn", *_NORMS, *_PRODUCTS),
    *(f"{parent}.{name}" for parent, names in _SHARES.items() for name in names),
}


@runtime_checkable
class PlannedAttention(Protocol):
    """Attention that says beforehand what it will do: `decode_step.DecodeStep`."""

    def ready(self, layer: int) -> list[RowCall] | None: ...

    def prepare(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> list[RowCall] | Tensor: ...

    def ran(self, first_layer: int, n_layers: int, done: LayersDone, seconds: float) -> None: ...


class _Unfit(Exception):
    """Why a model is not made of the blocks we compute."""


def find_blocks(
    model: Any, by_modules: Callable[[Tensor, AttentionStep], Tensor]
) -> DecoderBlocks | None:
    """model: a causal model with our layers in it; by_modules: its decode by modules, (token ids,
    attention) -> last hidden state. None, and a line in the log, where blocks do not fit."""
    try:
        if not has_block_kernel():
            raise _Unfit("numba is missing")
        blocks = DecoderBlocks(model.model)
        _prove(blocks, by_modules, int(model.config.vocab_size))
    except (_Unfit, ValueError) as reason:
        _log.warning("decode runs the model's own modules, which is slower: %s", reason)
        return None
    return blocks


class DecoderBlocks:
    """The decoder of a model as steps from one attention to the next."""

    def __init__(self, decoder: Any) -> None:
        """Raises _Unfit or ValueError unless every part is one that the kernels know."""
        parts = {name for name, _ in decoder.named_children()}
        if parts != _MODEL_PARTS:
            raise _Unfit(f"the decoder has {_difference(parts, _MODEL_PARTS)}")
        layers = list(decoder.layers)
        for layer in layers:
            _check_parts(layer)
        before: list[BeforeAttention | Norm] = [_before(layer) for layer in layers]
        before.append(_norm(decoder.norm))
        after: list[AfterAttention | None] = [None, *(_after(layer) for layer in layers)]
        self._steps = [BlockStep(a, b) for a, b in zip(after, before, strict=True)]
        self._scales = [float(layer.self_attn.scaling) for layer in layers]
        self._embed = decoder.embed_tokens
        sizes = {(b.n_heads, b.n_kv_heads, b.head_dim) for b in before if not isinstance(b, Norm)}
        if len(sizes) != 1:
            raise _Unfit(f"layers differ in their heads: {sorted(sizes)}")
        (self._heads,) = sizes
        self._kept: dict[int, tuple[BlockRows, Tensor, Tensor, Tensor]] = {}

    def hidden(self, token_ids: Tensor, step: AttentionStep) -> Tensor:
        """int64 [n], a token of each row -> [n, hidden] after the last norm."""
        rows, q, k, v = self._rows(len(token_ids))
        rows.x.copy_(self._embed(token_ids))
        self._steps[0].run(rows)
        layer = 0
        while layer < len(self._scales):
            layer += self._some(layer, rows, (q, k, v), step)
        return rows.out_of(self._steps[-1]).clone()

    def _some(
        self, layer: int, rows: BlockRows, qkv: tuple[Tensor, Tensor, Tensor], step: AttentionStep
    ) -> int:
        """Attention of this layer and the block after it, and as many more as need nothing decided.
        Returns how many layers that were."""
        scale, after = self._scales[layer], layer + 1
        if not isinstance(step, PlannedAttention):
            self._steps[after].run(rows, step.attend(layer, *qkv, scale).contiguous())
            return 1
        calls = step.ready(layer)
        if calls is None:
            made = step.prepare(layer, *qkv, scale)
            if isinstance(made, Tensor):
                self._steps[after].run(rows, made.contiguous())
                return 1
            calls = made
        run = [calls]
        while layer + len(run) < len(self._scales):
            calls = step.ready(layer + len(run))
            if calls is None:
                break
            run.append(calls)
        started = time.monotonic()
        done = run_layers(rows, self._steps[after : after + len(run)], run)
        step.ran(layer, len(run), done, time.monotonic() - started)
        return len(run)

    def _rows(self, n_rows: int) -> tuple[BlockRows, Tensor, Tensor, Tensor]:
        """Rows to work in, and q, k and v in them as attention reads them."""
        kept = self._kept.get(n_rows)
        if kept is None:
            rows = BlockRows(n_rows, self._steps)
            n_heads, n_kv_heads, dim = self._heads
            heads = rows.out_of(self._steps[0]).view(n_rows, -1, dim).transpose(0, 1)
            q, k, v = heads.split([n_heads, n_kv_heads, n_kv_heads])
            kept = self._kept[n_rows] = rows, q, k, v
        return kept


def _difference(found: set[str], wanted: set[str]) -> str:
    extra, missing = sorted(found - wanted), sorted(wanted - found)
    return f"{extra} too many and {missing} too few parts"


def _check_parts(layer: nn.Module) -> None:
    """Exactly the known modules, of our own kinds, and no parameter outside them."""
    modules: dict[str, Any] = dict(layer.named_modules())
    if set(modules) - _HEAD_NORMS != _LAYER_PARTS or len(modules.keys() & _HEAD_NORMS) == 1:
        raise _Unfit(f"a layer has {_difference(set(modules) - _HEAD_NORMS, _LAYER_PARTS)}")
    kinds: dict[str, type] = dict.fromkeys(_PRODUCTS, RowLinear)
    kinds |= dict.fromkeys(_NORMS | (modules.keys() & _HEAD_NORMS), RowNorm)
    for parent, names in _SHARES.items():
        kinds |= {f"{parent}.{name}": Share for name in names}
    for name, kind in kinds.items():
        if type(modules[name]) is not kind:
            raise _Unfit(f"{name} is a {type(modules[name]).__name__}, not a {kind.__name__}")
    loose = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    loose = [name for name in loose if name.rpartition(".")[0] not in kinds]
    if loose:
        raise _Unfit(f"a layer has parameters that no product or norm owns: {loose}")
    missing = [name for name in ("head_dim", "scaling") if not hasattr(layer.self_attn, name)]
    if missing:
        raise _Unfit(f"self_attn does not say its {missing}")
    trial = torch.linspace(-9, 9, 37)
    if not torch.equal(modules["mlp.act_fn"](trial), nn.functional.silu(trial)):
        raise _Unfit(f"the activation {type(modules['mlp.act_fn']).__name__} is not SiLU")


def _norm(norm: Any) -> Norm:
    if type(norm) is not RowNorm:
        raise _Unfit(f"a norm is a {type(norm).__name__}, not a RowNorm")
    return Norm(norm.weight.detach(), norm.eps)  # type: ignore[operator]


def _product(linear: RowLinear) -> Product:
    return Product(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _joint(parent: nn.Module, names: tuple[str, ...]) -> tuple[Product, list[int]]:
    """The product that shares are outputs of, and the rows of each."""
    shares: list[Any] = [getattr(parent, name) for name in names]
    joint, ends = shares[0].joint, [share.last for share in shares]
    if any(share.joint is not joint for share in shares) or ends[-1] != len(joint.weight):
        raise _Unfit(f"{names} are not one product")
    if [share.first for share in shares] != [0, *ends[:-1]]:
        raise _Unfit(f"{names} do not follow each other")
    return _product(joint), [share.last - share.first for share in shares]


def _before(layer: Any) -> BeforeAttention:
    attention = layer.self_attn
    qkv, (n_q, n_k, n_v) = _joint(attention, _SHARES["self_attn"])
    dim = int(attention.head_dim)
    if n_q % dim or n_k % dim or n_k != n_v:
        raise _Unfit(f"q, k, v of {n_q}, {n_k}, {n_v} numbers are not heads of {dim}")
    norms = [_norm(getattr(attention, n)) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
    return BeforeAttention(_norm(layer.input_layernorm), qkv, n_q // dim, n_k // dim, dim, *norms)


def _after(layer: Any) -> AfterAttention:
    gate_up, (n_gate, n_up) = _joint(layer.mlp, _SHARES["mlp"])
    if n_gate != n_up:
        raise _Unfit(f"gate and up have {n_gate} and {n_up} numbers")
    norm = _norm(layer.post_attention_layernorm)
    return AfterAttention(
        _product(layer.self_attn.o_proj), norm, gate_up, _product(layer.mlp.down_proj)
    )


class _Trial:
    """Attention of each token to itself alone, as the first of a text has it: sizes are the model's own,
    so that no part drowns, and q and k come to light because all that is asked is remembered."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, float], tuple[Tensor, ...]]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.asked.append(((layer, scale), tuple(t.clone() for t in (q, k, v))))
        return v.repeat_interleave(len(q) // len(v), dim=0).transpose(0, 1).contiguous()


@torch.inference_mode()
def _prove(
    blocks: DecoderBlocks, by_modules: Callable[[Tensor, AttentionStep], Tensor], n_vocab: int
) -> None:
    """q, k, v and scale of every layer and the result, for two tokens, as the modules compute them."""
    token_ids = torch.tensor([n_vocab // 3, n_vocab - 1])
    ours, theirs = _Trial(), _Trial()
    got, want = blocks.hidden(token_ids, ours), by_modules(token_ids, theirs)
    pairs = []
    if [call for call, _ in ours.asked] != [call for call, _ in theirs.asked]:
        raise _Unfit("the modules attend in other layers or with another scale")
    for (call, mine), (_, others) in zip(ours.asked, theirs.asked, strict=True):
        for name, a, b in zip("qkv", mine, others, strict=True):
            pairs.append((f"{name} of layer {call[0]}", a, b))
    pairs.append(("the result", got, want))
    for name, a, b in pairs:
        if a.shape != b.shape:
            raise _Unfit(f"{name} is {tuple(b.shape)} by modules, {tuple(a.shape)} by blocks")
        error, deviation = float((a - b).abs().max()), float(b.std())
        if not error <= TOLERANCE * deviation:
            raise _Unfit(f"{name} is off by {error:.3g}, where its deviation is {deviation:.3g}")
