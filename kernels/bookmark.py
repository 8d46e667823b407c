"""Which pages bookmarks choose (RetroLM): inner products of one query with the keys at pages' ends, less what
a page's distance costs.

A score's bits depend on nothing but the query, the page's own key and how far away it is: they are added in
a fixed order, so that neither how many pages there are nor where they lie in memory decides between two of
nearly equal scores.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .selection import candidate_end, top_chunks

try:
    from . import cpu_bookmark, cpu_top
except ModuleNotFoundError as exc:  # numba is an optimisation
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_bookmark = cpu_top = None  # type: ignore[assignment]

Keys = np.ndarray
"""float32 [n, Hkv, D], unrotated"""


def whole_pages(q_start: int, policy: LayerPolicy) -> range:
    """Starts of the candidates of the queries at q_start: pages after the sinks that are complete before
    them. An incomplete one has no bookmark yet; with any window of a page or more all of it is inside."""
    page_tokens = policy.stages[0].chunk
    end = min(candidate_end(q_start, policy), q_start // page_tokens * page_tokens)
    return range(policy.sink, max(policy.sink, end), page_tokens)


def keeps_all_pages(q_start: int, policy: LayerPolicy) -> bool:
    """Whether no score is needed, because every candidate is kept."""
    stage = policy.stages[0]
    n_pages = len(whole_pages(q_start, policy))
    return n_pages <= stage.keep // stage.chunk and (stage.top_p is None or not n_pages)


def page_scores(
    query: Tensor, keys: Keys, *, per_kv_head: bool, slots: np.ndarray | None = None
) -> Tensor:
    """Inner products summed over heads, over sqrt(D) and the number of heads.

    query: [H, D] float32, unrotated; slots: int64 [n], where in `keys` each page's lie; as they come by
    default. Returns float32 [1, n], or [Hkv, n] for a score per KV head.
    """
    n_heads, dim = query.shape
    n_kv_heads = keys.shape[1]
    group = n_heads // n_kv_heads
    # a KV head's key meets the sum of its query heads' queries, which is the same sum
    summed = _sum(query.numpy().reshape(n_kv_heads, group, dim).swapaxes(1, 2))
    where = np.arange(len(keys)) if slots is None else slots
    if cpu_bookmark is not None:
        scores = cpu_bookmark.summed_products(summed, keys, where, per_kv_head=per_kv_head)
    else:
        scores = summed_products(summed, keys, where, per_kv_head=per_kv_head)
    # divided last, so that equal sums stay equal
    scores /= np.float32(math.sqrt(dim) * (group if per_kv_head else n_heads))
    return torch.from_numpy(np.ascontiguousarray(scores.T))


def summed_products(
    summed: np.ndarray, keys: Keys, slots: np.ndarray, *, per_kv_head: bool
) -> np.ndarray:
    """summed: float32 [Hkv, D]. Returns float32 [n, 1], or [n, Hkv] of each head alone."""
    scores = _sum(keys[slots] * summed)
    return scores if per_kv_head else _sum(scores)[:, None]


def choose_pages(
    query: Tensor,
    keys: Keys,
    q_start: int,
    policy: LayerPolicy,
    log_scale: float = 0.0,
    nearness: float = 0.0,
    slots: np.ndarray | None = None,
) -> Tensor:
    """What leaves the first stage for the queries at q_start: page starts, int64 [Hsel, n] ascending and
    padded with -1; equal scores go to the lower page.

    keys: of `whole_pages`, or of more, `slots` being where those lie. log_scale, nearness: the layer's, see
    `Bookmarks`; the softmax of what they make of scores estimates the shares that `top_p` counts.
    """
    stage, per_kv_head = policy.stages[0], policy.head_reduce == "kv-group"
    pages = whole_pages(q_start, policy)
    starts = torch.arange(pages.start, pages.stop, pages.step)
    starts = starts.expand(keys.shape[1] if per_kv_head else 1, -1)
    n_keep = stage.keep // stage.chunk
    if keeps_all_pages(q_start, policy):
        return starts.contiguous()
    scores = page_scores(query, keys, per_kv_head=per_kv_head, slots=slots)
    scores *= math.exp(log_scale)
    scores -= nearness * _log_distances(pages, q_start)
    if stage.top_p is not None:
        shares = scores.softmax(dim=-1).numpy()
        return top_chunks(starts, scores, n_keep, shares, stage.top_p)
    if cpu_top is not None:
        return cpu_top.top_chunks(starts, scores, n_keep)
    return top_chunks(starts, scores, n_keep)


def _log_distances(pages: range, q_start: int) -> Tensor:
    """log2 of how many pages it is from each page's start to the queries: float32 [n], 0 right before them.
    Rounded from double precision, so that no machine's float32 log2 decides."""
    distances = (q_start - np.arange(pages.start, pages.stop, pages.step)) / pages.step
    return torch.from_numpy(np.log2(distances).astype(np.float32))


def _sum(x: np.ndarray) -> np.ndarray:
    """Over the last axis, halves added to halves. In numpy, not torch: torch wakes its threads for it."""
    while (n := x.shape[-1]) > 1:
        half = x[..., : n // 2] + x[..., n // 2 : n // 2 * 2]
        if n % 2:
            half[..., 0] += x[..., -1]
        x = half
    return x[..., 0]
