"""Bookmarks (RetroLM, arXiv 2502.11444): one token more at a page's end, with projections of its own.

A bookmark passes through every layer of the frozen model beside the page's tokens, but attends only to
the `page_tokens` tokens that end where it stands, and to itself. So its key depends on nothing but those
tokens' keys and values: it can be computed in the page's own forward pass, or later from stored pages by
one forward of one token per page, with the same result. Its key in a layer is the page's summary there;
its query selects pages. Neither is rotated: what a page is about does not depend on how far away it is. That
near pages draw more attention is learnt beside it, as one number per layer.
Ordinary tokens never see a bookmark. It takes the position of the last token before it and none of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.ops import Rope
from .row_layers import gemm_rows

SIDES = ("q", "k", "v")


@dataclass(frozen=True)
class BookmarkShape:
    """rank: of what is added to the model's own projections; None gives each layer whole ones."""

    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    page_tokens: int = 128
    rank: int | None = 32

    def width(self, side: str) -> int:
        return (self.n_heads if side == "q" else self.n_kv_heads) * self.head_dim


class Bookmarks(nn.Module):
    """What is trained: an embedding, and per layer what q, k and v of a bookmark add to the model's own.

    As made here nothing is added, so that training starts from the model's own projections.
    """

    def __init__(self, shape: BookmarkShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.zeros(shape.hidden))
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.log_scale = nn.Parameter(torch.zeros(shape.n_layers))
        """Of `bookmark_scores` in each layer, so that their softmax is a share of attention."""
        self.nearness = nn.Parameter(torch.zeros(shape.n_layers))
        """What twice the distance takes from a page's scaled score, in each layer. A logarithm, so that it
        holds for contexts longer than those of training."""
        n = shape.n_layers
        for side in SIDES:
            width = shape.width(side)
            if shape.rank is None:
                self.up[side] = nn.Parameter(torch.zeros(n, width, shape.hidden))
            else:
                down = torch.randn(n, shape.rank, shape.hidden) / shape.hidden**0.5
                self.down[side] = nn.Parameter(down)
                self.up[side] = nn.Parameter(torch.zeros(n, width, shape.rank))

    def added(self, side: str, layer: int, hidden: Tensor) -> Tensor:
        """hidden [n, hidden], normed as the layer's own projection reads it -> [n, width]."""
        if self.shape.rank is not None:
            hidden = gemm_rows(hidden, self.down[side][layer])
        return gemm_rows(hidden, self.up[side][layer])

    def ranked(self, scores: Tensor, distances: Tensor) -> Tensor:
        """What pages are ranked by in every layer, and what the softmax gives shares of: [L, n, m].

        scores [L, n, m] as `bookmark_scores` gives them; distances [n, m] in pages from each page's start to
        the token after the bookmark that asks, at least 1 for a page that may be chosen.
        """
        scaled = scores * self.log_scale.exp()[:, None, None]
        return scaled - self.nearness[:, None, None] * distances.clamp(min=1).log2()


@dataclass(frozen=True)
class BookmarkStates:
    """Of n bookmarks, unrotated: keys [L, n, Hkv, D], queries [L, n, H, D], float32."""

    keys: Tensor
    queries: Tensor


PagesOfLayer = Callable[[int], tuple[Tensor, Tensor]]
"""layer -> unrotated K and V [n, Hkv, page_tokens, D] float32 of the tokens before each bookmark, the
last one last."""


def project(
    bookmarks: Bookmarks, layer: int, attention: Any, normed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated q [n, H, D], k and v [n, Hkv, D] of bookmarks in a layer.

    attention: the layer's `self_attn` module; normed [n, hidden]: after the layer's input norm.
    """
    dim = bookmarks.shape.head_dim
    made = {}
    for side in SIDES:
        own = getattr(attention, f"{side}_proj")(normed)
        made[side] = (own + bookmarks.added(side, layer, normed)).unflatten(-1, (-1, dim))
    for side in ("q", "k"):
        norm = getattr(attention, f"{side}_norm", None)
        if norm is not None:
            made[side] = norm(made[side])
    return made["q"], made["k"], made["v"]


def attend_own_page(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_k: Tensor,
    page_v: Tensor,
    n_tokens: Tensor,
    rope: Rope,
    scale: float,
) -> Tensor:
    """Attention of bookmarks over the tokens before them and themselves: [n, H, D].

    q [n, H, D]; k, v [n, Hkv, D]; page_k, page_v [n, Hkv, P, D], unrotated, of which the last n_tokens
    (int64 [n]) count. Positions are counted from the first of P, so that a page's bits do not depend on
    where in a text it stands.
    """
    n, n_heads, dim = q.shape
    n_kv_heads, n_page = page_k.shape[1], page_k.shape[2]
    where = torch.arange(n_page, device=q.device)
    keys = torch.cat((page_k, k[:, :, None]), dim=2)
    keys = rope.rotate(keys, torch.cat((where, where[-1:])))
    values = torch.cat((page_v, v[:, :, None]), dim=2)
    grouped = rope.rotate(q, n_page - 1).unflatten(1, (n_kv_heads, n_heads // n_kv_heads))
    logits = grouped @ keys.transpose(-1, -2) * scale
    missing = where < n_page - n_tokens[:, None]
    logits[..., :n_page].masked_fill_(missing[:, None, None], -torch.inf)
    mixed: Tensor = logits.softmax(dim=-1) @ values
    return mixed.reshape(n, n_heads, dim)


def run_bookmarks(
    bookmarks: Bookmarks,
    layers: Sequence[Any],
    rope: Rope,
    pages: PagesOfLayer,
    n_tokens: Tensor,
) -> BookmarkStates:
    """One forward of one token per page: keys and queries of bookmarks from stored keys and values.

    layers: decoder layers of a transformers model, as they are or with our products in them; n_tokens
    int64 [n]: how many of the tokens before each bookmark there are (page_tokens but near a text's start).
    """
    hidden = bookmarks.embedding.expand(len(n_tokens), -1)
    keys, queries = [], []
    for i, layer in enumerate(layers):
        attention = layer.self_attn
        q, k, v = project(bookmarks, i, attention, layer.input_layernorm(hidden))
        keys.append(k)
        queries.append(q)
        if i + 1 == len(layers):
            break  # nothing reads what the last layer would give
        page_k, page_v = pages(i)
        mixed = attend_own_page(q, k, v, page_k, page_v, n_tokens, rope, float(attention.scaling))
        hidden = hidden + attention.o_proj(mixed.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return BookmarkStates(torch.stack(keys), torch.stack(queries))


def bookmark_scores(queries: Tensor, keys: Tensor, *, per_kv_head: bool = False) -> Tensor:
    """What selection ranks pages by: inner products summed over heads, over sqrt(D) and their number.

    queries [..., n, H, D], keys [..., m, Hkv, D] -> [..., n, m], or [..., Hkv, n, m] for one choice per KV
    head. A KV head's key meets the sum of its query heads' queries, which is the same sum.
    """
    n_heads, dim = queries.shape[-2:]
    n_kv_heads = keys.shape[-2]
    grouped = queries.unflatten(-2, (n_kv_heads, n_heads // n_kv_heads)).sum(dim=-2)
    if per_kv_head:
        by_head: Tensor = grouped.transpose(-2, -3) @ keys.transpose(-2, -3).transpose(-1, -2)
        return by_head / (math.sqrt(dim) * (n_heads // n_kv_heads))
    summed: Tensor = grouped.flatten(-2) @ keys.flatten(-2).transpose(-1, -2)
    return summed / (math.sqrt(dim) * n_heads)
