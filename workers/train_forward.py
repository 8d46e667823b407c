"""The bookmarks' forward as training runs it: `bookmarks.run_bookmarks` with what does not learn left out.

Captured keys are rotated to their true positions already, of which only differences matter; a bookmark's own
key and query stand at one position, so their product needs no rotation. Gradients go through the bookmarks
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.ops import Rope
from .bookmarks import Bookmarks, BookmarkStates, project
from .train_capture import Capture


@dataclass(frozen=True)
class Frozen:
    """What training needs of the model: its decoder layers, as transformers has them, and its RoPE."""

    layers: Sequence[Any]
    rope: Rope


Placed = Sequence[tuple[Capture, Tensor]]
"""Contexts, and int64 [n] positions of bookmarks in each."""


def states_of(bookmarks: Bookmarks, frozen: Frozen, placed: Placed) -> BookmarkStates:
    """Keys and queries of bookmarks at positions of several contexts, in their order: L layers of n in all.

    A bookmark near a context's start sees the tokens there are.
    """
    page_tokens = bookmarks.shape.page_tokens
    stored = [capture.rotated_keys_values() for capture, _ in placed]
    positions = torch.cat([at for _, at in placed])
    missing = torch.arange(page_tokens) < (page_tokens - 1 - positions)[:, None]
    hidden = bookmarks.embedding.expand(len(positions), -1)
    keys, queries = [], []
    for i, layer in enumerate(frozen.layers):
        attention = layer.self_attn
        q, k, v = project(bookmarks, i, attention, layer.input_layernorm(hidden))
        keys.append(k)
        queries.append(q)
        if i + 1 == len(frozen.layers):
            break
        windows = [
            _windows(kv[i], at, page_tokens) for kv, (_, at) in zip(stored, placed, strict=True)
        ]
        page_k, page_v = torch.cat(windows).float().unbind(dim=1)
        rotated = frozen.rope.rotate(q, positions[:, None])
        mixed = _attend(q, rotated, k, v, page_k, page_v, missing, float(attention.scaling))
        hidden = hidden + attention.o_proj(mixed.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return BookmarkStates(torch.stack(keys), torch.stack(queries))


def _windows(kv: Tensor, positions: Tensor, page_tokens: int) -> Tensor:
    """kv [2, Hkv, T, D] -> [n, 2, Hkv, page_tokens, D], what lies before the start being its first tokens
    again."""
    starts = (positions + 1 - page_tokens).clamp(min=0).tolist()
    cut = torch.stack([kv[:, :, start : start + page_tokens] for start in starts])
    for row, position in enumerate(positions.tolist()):
        gap = page_tokens - 1 - position
        if gap > 0:  # the last token stands last
            cut[row] = cut[row].roll(gap, dims=2)
    return cut


def _attend(
    q: Tensor,
    rotated: Tensor,
    k: Tensor,
    v: Tensor,
    page_k: Tensor,
    page_v: Tensor,
    missing: Tensor,
    scale: float,
) -> Tensor:
    """q and rotated q [n, H, D]; k, v [n, Hkv, D]; pages [n, Hkv, P, D] -> [n, H, D]."""
    shape = (k.shape[1], q.shape[1] // k.shape[1])
    on_page = rotated.unflatten(1, shape) @ page_k.mT
    on_page = (on_page * scale).masked_fill(missing[:, None, None], -torch.inf)
    on_self = (q.unflatten(1, shape) * k[:, :, None]).sum(dim=-1, keepdim=True) * scale
    shares = torch.cat((on_page, on_self), dim=-1).softmax(dim=-1)
    mixed: Tensor = shares[..., :-1] @ page_v + shares[..., -1:] * v[:, :, None]
    return mixed.flatten(1, 2)
