"""Summaries of runs of keys, over UNROTATED keys (DESIGN 1.2), for the bounds and mean scorers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .paged import PagedKV, gather_blocks

SummaryKind = Literal["bounds", "mean"]
SummarySource = Callable[[SummaryKind, Tensor, int], Tensor]
"""(kind, starts int64 [Hkv, n], chunk) -> float32 [Hkv, n, 2 or 1, D], see `summarise`. Asked only
for whole chunks; the cut last chunk of a query block is always computed from its keys."""


def summarise(kind: SummaryKind, keys: Tensor, sizes: Tensor) -> Tensor:
    """Summaries of runs of keys.

    keys: [Hkv, n, chunk, D] float32, of which the first sizes [Hkv, n] of each run count.
    Returns [Hkv, n, 2, D] (minimum, maximum) for "bounds", [Hkv, n, 1, D] for "mean". Runs of
    size 0 give zeros.
    """
    counted = (torch.arange(keys.shape[2]) < sizes[..., None])[..., None]
    if kind == "mean":
        total = keys.masked_fill(~counted, 0.0).sum(dim=2)
        return (total / sizes.clamp(min=1)[..., None])[:, :, None]
    low = keys.masked_fill(~counted, torch.inf).amin(dim=2)
    high = keys.masked_fill(~counted, -torch.inf).amax(dim=2)
    return torch.stack((low, high), dim=2).masked_fill((sizes == 0)[..., None, None], 0.0)


def chunk_summaries(
    kind: SummaryKind,
    view: PagedKV,
    starts: Tensor,
    chunk: int,
    end: int,
    source: SummarySource | None = None,
) -> Tensor:
    """Summaries of the chunks at starts [Hkv, n] (-1 = padding), each cut at token `end`.

    Returns [Hkv, n, 2 or 1, D]. With a source, only cut chunks are read from their keys.
    """
    sizes = (end - starts).clamp(max=chunk).masked_fill(starts < 0, 0)
    whole = sizes == chunk
    if source is None or not bool(whole.any()):
        keys = gather_blocks(view, starts, chunk).unflatten(1, (-1, chunk))
        return summarise(kind, keys, sizes)
    ready = source(kind, starts.masked_fill(~whole, -1), chunk).clone()
    head, index = ((sizes > 0) & (sizes < chunk)).nonzero(as_tuple=True)
    if head.numel():
        # at most one cut chunk per head, always the last of its list
        cut = torch.full((starts.shape[0], 1), -1)
        cut[head, 0] = starts[head, index]
        cut_sizes = torch.zeros_like(cut)
        cut_sizes[head, 0] = sizes[head, index]
        keys = gather_blocks(view, cut, chunk).unflatten(1, (-1, chunk))
        ready[head, index] = summarise(kind, keys, cut_sizes)[head, 0]
    return ready.masked_fill((sizes == 0)[..., None, None], 0.0)
