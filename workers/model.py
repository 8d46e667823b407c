"""Model adapter: any dense RoPE decoder of transformers, with our attention and no rotary of its own.

q and k reach us unrotated: the model's rotary module is replaced by an identity, its frequencies and
scaling are read first. Attention is registered through AttentionInterface (DESIGN 5).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModel
from ..kernels.ops import Rope
from .bookmarks import SIDES, Bookmarks, BookmarkStates, PagesOfLayer, run_bookmarks
from .decoder_blocks import find_blocks
from .model_source import head_dim_of, load_model_config
from .row_layers import RowLinear, RowNorm, replace_linears, replace_norms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AttentionStep", "ModelAdapter", "RowLinear", "RowNorm", "replace_norms"]

ATTENTION = "longreach"
"""Name of our attention in transformers."""


class AttentionStep(Protocol):
    """What one forward pass hands to every layer's attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [H, T, D], k and v [Hkv, T, D], unrotated, T packed tokens. Returns [T, H, D].

        The next layer writes over q, k and v.
        """
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


class ModelAdapter:
    """A loaded model: `hidden` runs the decoder with our attention, `logits` its head.

    own_kernels: products and norms are the CPU's own, with the same bits for any number of rows.
    """

    def __init__(
        self,
        source: Path | PreTrainedModel,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        own_kernels: bool = True,
    ) -> None:
        """source: a directory, or a model of transformers that was made with `ATTENTION`."""
        model = load_model(source, dtype) if isinstance(source, Path) else source
        self.config = model.config
        model.eval().requires_grad_(False)
        rotary = model.model.rotary_emb
        self.rope = Rope(rotary.inv_freq.float().cpu().clone(), float(rotary.attention_scaling))
        model.model.rotary_emb = _IdentityRotary()
        self._mode = {"decode": False}
        if own_kernels:
            replace_linears(model, self._mode)
            replace_norms(model)
        self._model = model.to(device)
        self.n_layers = int(self.config.num_hidden_layers)
        self.n_heads = int(self.config.num_attention_heads)
        self.n_kv_heads = int(self.config.num_key_value_heads)
        self.head_dim = head_dim_of(self.config)
        self.vocab_size = int(self.config.vocab_size)
        self.eos_token_ids = _eos_ids(model)
        self._blocks = None
        if own_kernels:
            self._blocks = find_blocks(model, lambda ids, step: self._by_modules(ids, step, True))

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, for who runs them otherwise: bookmarks do."""
        return list(self._model.model.layers)

    @property
    def embeddings(self) -> Tensor:
        """[vocab, hidden]"""
        return self._model.model.embed_tokens.weight  # type: ignore[no-any-return]

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, step: AttentionStep, *, decode: bool) -> Tensor:
        """token_ids int64 [T] (packed tokens of one chunk, or one per decoding row) -> [T, hidden]."""
        if decode and self._blocks is not None:
            return self._blocks.hidden(token_ids, step)
        return self._by_modules(token_ids, step, decode)

    @torch.inference_mode()
    def _by_modules(self, token_ids: Tensor, step: AttentionStep, decode: bool) -> Tensor:
        self._mode["decode"] = decode
        out = self._model.model(
            input_ids=token_ids.unsqueeze(0),
            # all zero, since the rotary module ignores them
            position_ids=torch.zeros_like(token_ids).unsqueeze(0),
            use_cache=False,
            longreach=step,
        )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def hidden_beside(
        self, token_ids: Tensor, step: AttentionStep, bookmarks: Bookmarks, n_bookmarks: int
    ) -> Tensor:
        """`hidden` of a chunk of prefill with so many bookmarks behind it, which `step` tells apart: rows
        of their own in every product, with q, k, v of their own. int64 [T] -> [T, hidden]."""
        self._mode["decode"] = False
        tokens = self._model.model.embed_tokens(token_ids)
        embedded = torch.cat((tokens, bookmarks.embedding.expand(n_bookmarks, -1)))
        joints = [layer.self_attn.q_proj.joint for layer in self._model.model.layers]
        for layer, joint in enumerate(joints):
            joint.beside = functools.partial(_add_own, bookmarks, layer, n_bookmarks)
        try:
            out = self._model.model(
                inputs_embeds=embedded.unsqueeze(0),
                position_ids=torch.zeros(1, len(embedded), dtype=torch.int64),
                use_cache=False,
                longreach=step,
            )
        finally:
            for joint in joints:
                joint.beside = None
        return out.last_hidden_state[0, : len(token_ids)]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def bookmarks(
        self, bookmarks: Bookmarks, pages: PagesOfLayer, n_tokens: Tensor, n_layers: int
    ) -> BookmarkStates:
        """`run_bookmarks` through the first n_layers; a bookmark's bits do not depend on the others."""
        self._mode["decode"] = False
        layers = self._model.model.layers[:n_layers]
        return run_bookmarks(bookmarks, layers, self.rope, pages, n_tokens)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab]; always our own kernel, so a row's bits never change."""
        self._mode["decode"] = True
        return self._model.lm_head(hidden)  # type: ignore[no-any-return]


def _add_own(bookmarks: Bookmarks, layer: int, n: int, rows: Tensor, out: Tensor) -> None:
    own = [bookmarks.added(side, layer, rows[-n:]) for side in SIDES]
    out[-n:] += torch.cat(own, dim=-1)


def load_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers with our attention. Raises UnsupportedModel."""
    from transformers import AutoModelForCausalLM

    load_model_config(directory)  # refuses what we do not support
    register_attention()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=ATTENTION
        )
    except (OSError, ValueError, RuntimeError) as exc:
        raise UnsupportedModel(f"{directory}: weights cannot be loaded: {exc}") from exc
    return model


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _eos_ids(model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for source in (model.generation_config, model.config):
        eos = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else (eos or []))
    return frozenset(ids)
