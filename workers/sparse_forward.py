"""A model's forward over retrieved pages, with gradients: what post-training learns from (RetroLM, stage 2).

Tokens stand in groups of at most a page. Those of a group attend to the first page, to pages chosen for the
group, to the latest tokens and to one another causally: exactly what `kernels.reference.attended_keys` says
of a block of queries. The pages are chosen by the bookmark of the token before the group, which has seen
nothing but the tokens that end there: nothing that comes later shapes what a token reads. The choice is
discrete and made without gradients, by the bookmarks' own forward through the layers as they are now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..core.stage import LayerPolicy
from ..kernels.ops import Rope, choose_pages, whole_pages
from ..kernels.reference import attended_keys
from .bookmarks import Bookmarks, attend_own_page, project
from .sparse_attention import GroupKeys, sparse_attention

HEAD_TOKENS = 512
"""Tokens whose logits exist at a time."""

Chosen = dict[tuple[int, int], list[int]]
"""(layer, group) -> first tokens of the pages chosen for it, ascending."""


@dataclass(frozen=True)
class Decoder:
    """A causal model of transformers whose rotary module gives nothing, and the rotation in its place."""

    model: Any
    rope: Rope

    @property
    def layers(self) -> list[Any]:
        return list(self.model.model.layers)


@dataclass(frozen=True)
class Groups:
    """Where bookmarks stand in a text of n_tokens, and whom they choose for.

    spans: [start, end) of each group; positions int64 [n] of bookmarks, those of whole pages first; asking:
    per group the row of the bookmark that chooses for it, -1 for the first, which has none before it.
    """

    spans: tuple[tuple[int, int], ...]
    positions: Tensor
    n_pages: int
    asking: tuple[int, ...]


def groups_of(n_tokens: int, page_tokens: int, cuts: Sequence[int] = ()) -> Groups:
    """Groups that begin with pages, and at `cuts`: an answer's first token, whose pages the bookmark behind
    its question chooses, as in decode."""
    starts = sorted({*range(0, n_tokens, page_tokens), *(c for c in cuts if 0 < c < n_tokens)})
    n_pages = n_tokens // page_tokens
    ends = [(page + 1) * page_tokens - 1 for page in range(n_pages)]
    extra = [start - 1 for start in starts if start % page_tokens]
    rows = {position: row for row, position in enumerate((*ends, *extra))}
    spans = tuple(zip(starts, (*starts[1:], n_tokens), strict=True))
    asking = tuple(rows[start - 1] if start else -1 for start in starts)
    return Groups(spans, torch.tensor([*ends, *extra], dtype=torch.int64), n_pages, asking)


class SparseForward:
    """policies: one per layer, dense or with one stage, whose pages bookmarks choose for all heads."""

    def __init__(
        self, decoder: Decoder, bookmarks: Bookmarks, policies: Sequence[LayerPolicy]
    ) -> None:
        self.decoder, self.bookmarks, self.policies = decoder, bookmarks, tuple(policies)
        selecting = [i for i, policy in enumerate(policies) if policy.by_bookmark]
        self._last = max(selecting, default=-1)
        """Bookmarks go no further than this layer."""

    def hidden(self, token_ids: Tensor, groups: Groups, chosen: Chosen) -> Tensor:
        """token_ids int64 [T] -> last hidden states, normed [T, hidden].

        chosen: what is there is kept, what is missing is chosen and put there.
        """
        tokens = self.decoder.model.model.embed_tokens(token_ids)
        marks = self.bookmarks.embedding.detach().expand(len(groups.positions), -1)
        for i in range(len(self.policies)):
            if torch.is_grad_enabled():
                # a layer is computed again for its gradients, so that one alone is in memory
                tokens, marks = checkpoint(
                    self._layer, i, tokens, marks, groups, chosen,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                tokens, marks = self._layer(i, tokens, marks, groups, chosen)
        return self.decoder.model.model.norm(tokens)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab]"""
        return self.decoder.model.lm_head(hidden)  # type: ignore[no-any-return]

    def losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Negative log-likelihood of every token but the first: [T - 1], in nats."""
        parts = []
        for at in range(0, len(token_ids) - 1, HEAD_TOKENS):
            wanted = token_ids[at + 1 : at + 1 + HEAD_TOKENS]
            rows = hidden[at : at + len(wanted)]
            if torch.is_grad_enabled():
                part = checkpoint(
                    self._losses, rows, wanted, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part = self._losses(rows, wanted)
            parts.append(part)
        return torch.cat(parts)

    def _losses(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(hidden).float(), wanted, reduction="none")

    def _layer(
        self,
        i: int,
        tokens: Tensor,
        marks: Tensor,
        groups: Groups,
        chosen: Chosen,
    ) -> tuple[Tensor, Tensor]:
        layer, policy = self.decoder.layers[i], self.policies[i]
        q, k, v = _heads(layer, tokens, self.bookmarks.shape.head_dim)
        with torch.no_grad():
            if i <= self._last:
                marks = self._marks(i, marks, k, v, groups, chosen)
        scale = float(layer.self_attn.scaling)
        if policy.dense:
            mixed = self._dense(q, k, v, scale)
        else:
            mixed = self._sparse(i, q, k, v, scale, groups, chosen)
        tokens = tokens + layer.self_attn.o_proj(mixed.flatten(1))
        tokens = tokens + layer.mlp(layer.post_attention_layernorm(tokens))
        return tokens, marks

    # --- bookmarks ------------------------------------------------------------------------------

    def _marks(
        self,
        i: int,
        marks: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Groups,
        chosen: Chosen,
    ) -> Tensor:
        """Bookmarks through a layer [n, hidden]; on the way they choose its pages. k, v [Hkv, T, D]."""
        layer, page_tokens = self.decoder.layers[i], self.bookmarks.shape.page_tokens
        attention = layer.self_attn
        q, own_k, own_v = project(self.bookmarks, i, attention, layer.input_layernorm(marks))
        if self.policies[i].by_bookmark:
            self._choose(i, q, own_k, groups, chosen)
        if i == self._last:
            return marks
        ids = (groups.positions[:, None] + torch.arange(1 - page_tokens, 1)).clamp(min=0)
        page_k, page_v = (x[:, ids].transpose(0, 1) for x in (k, v))
        n_seen = (groups.positions + 1).clamp(max=page_tokens)
        scale = float(attention.scaling)
        mixed = attend_own_page(q, own_k, own_v, page_k, page_v, n_seen, self.decoder.rope, scale)
        marks = marks + attention.o_proj(mixed.flatten(1))
        return marks + layer.mlp(layer.post_attention_layernorm(marks))  # type: ignore[no-any-return]

    def _choose(
        self,
        i: int,
        queries: Tensor,
        keys: Tensor,
        groups: Groups,
        chosen: Chosen,
    ) -> None:
        policy, page_tokens = self.policies[i], self.bookmarks.shape.page_tokens
        weights = (float(self.bookmarks.log_scale[i]), float(self.bookmarks.nearness[i]))
        of_pages = keys[: groups.n_pages].contiguous().numpy()
        for group, ((start, _), row) in enumerate(zip(groups.spans, groups.asking, strict=True)):
            if (i, group) in chosen:
                continue
            pages = whole_pages(start, policy)
            candidates = of_pages[pages.start // page_tokens :][: len(pages)]
            starts = choose_pages(queries[row], candidates, start, policy, *weights)
            chosen[i, group] = starts[0].tolist()

    # --- attention ------------------------------------------------------------------------------

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [H, T, D], k, v [Hkv, T, D], unrotated -> [T, H, D]"""
        where = torch.arange(q.shape[1])
        q, k = self.decoder.rope.rotate(q, where), self.decoder.rope.rotate(k, where)
        mixed = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)

    def _sparse(
        self,
        i: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        groups: Groups,
        chosen: Chosen,
    ) -> Tensor:
        parts = []
        for group, (start, end) in enumerate(groups.spans):
            read = attended_keys(start, end - start, chosen[i, group], self.policies[i])
            parts.append(GroupKeys(start, end, *read))
        return sparse_attention(q, k, v, parts, self.decoder.rope, scale).transpose(0, 1)


def _heads(layer: Any, tokens: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated q [H, T, D], k and v [Hkv, T, D] of a layer's input [T, hidden]."""
    attention, normed = layer.self_attn, layer.input_layernorm(tokens)
    made = {}
    for side in ("q", "k", "v"):
        rows = getattr(attention, f"{side}_proj")(normed).unflatten(-1, (-1, head_dim))
        norm = getattr(attention, f"{side}_norm", None)
        made[side] = (rows if norm is None else norm(rows)).transpose(0, 1)
    return made["q"], made["k"], made["v"]
