"""What a bookmark retriever is trained on: which pages the frozen model's attention goes to, or should.

Everything is per layer. A page is a candidate for a query if it ended before the query's block began and
is not the first page, which every policy keeps. Sources: KL to pooled attention as in SeerAttention and DSA's
indexer; InfoNCE as RetroLM's equation 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .train_capture import CELL

QUERY_TOKENS = 64
"""Tokens that end with the bookmark and whose attention its query stands for in prefill."""
NEXT_TOKENS = 32
"""Tokens after it, for which it stands in decode."""
WINDOW = 1024
"""Latest tokens that a policy keeps anyway."""


def candidates(page_ends: Tensor, positions: Tensor, window: int = 0) -> Tensor:
    """Pages that a query may choose: bool [n, m].

    page_ends int64 [m]: position of each page's last token; positions int64 [n] of bookmarks that ask.
    window: latest tokens that are kept anyway; pages that reach into them are no candidates.
    """
    last = positions[:, None] - max(QUERY_TOKENS, window)
    found = page_ends <= last
    found[:, 0] = False
    return found


def page_distances(page_ends: Tensor, positions: Tensor, page_tokens: int) -> Tensor:
    """From each page's start to the token after each position, in pages: float32 [n, m]."""
    return (positions[:, None] - page_ends) / page_tokens + 1


def page_mass(mass: Tensor, page_ends: Tensor, page_tokens: int, positions: Tensor) -> Tensor:
    """Attention on pages from the block a bookmark ends and from the tokens after it: [2, ..., n, m].

    mass [..., T / CELL, T / CELL] by cells of queries and keys. Pages and positions end cells. Near a
    text's end there may be no tokens after a position: then that part is 0.
    """
    by_page = _sums(mass, page_ends, page_tokens, dim=-1)
    block = _sums(by_page, positions, QUERY_TOKENS, dim=-2)
    after = _sums(by_page, positions + NEXT_TOKENS, NEXT_TOKENS, dim=-2)
    return torch.stack((block, after))


def _sums(cells: Tensor, ends: Tensor, n_tokens: int, dim: int) -> Tensor:
    """Sums of the n_tokens that end at each of `ends`, what lies outside counting 0."""
    total = cells.cumsum(dim)
    zero = torch.zeros_like(total.narrow(dim, 0, 1))
    total = torch.cat((zero, total), dim=dim)
    n = cells.shape[dim]
    last = ((ends + 1) // CELL).clamp(max=n)
    first = ((ends + 1 - n_tokens) // CELL).clamp(min=0, max=n)
    return total.index_select(dim, last) - total.index_select(dim, first)


def shares(mass: Tensor, allowed: Tensor) -> Tensor:
    """Distribution over the candidates: [..., n, m]; rows without mass are 0."""
    kept = mass.clamp(min=0) * allowed
    return kept / kept.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def kl_loss(scores: Tensor, mass: Tensor, allowed: Tensor) -> Tensor:
    """KL(shares of the dense model || softmax of scores) by layer: [L], the mean over queries.

    scores [L, n, m]; mass [2, L, n, m] as `page_mass` gives it, both parts of which count as much; allowed
    [n, m]. Queries with fewer than two candidates or without mass do not count.
    """
    asked = allowed.sum(dim=-1) >= 2
    parts = [shares(part, allowed) for part in mass]
    filled = torch.stack([part.sum(dim=-1) > 0.5 for part in parts])
    target = sum(parts) / filled.sum(dim=0).clamp(min=1)[..., None]
    guess = scores.masked_fill(~allowed, -torch.inf)[:, asked].log_softmax(dim=-1)
    target = target[:, asked]
    terms = torch.where(target > 0, target * (target.clamp(min=1e-9).log() - guess), 0.0)
    counted = filled.any(dim=0)[:, asked]
    total: Tensor = (terms.sum(dim=-1) * counted).sum(dim=-1)
    return total / counted.sum(dim=-1).clamp(min=1)


def contrastive_loss(
    scores: Tensor, gold: Tensor, allowed: Tensor, others: Tensor | None = None
) -> Tensor:
    """InfoNCE by layer: [L]. scores [L, n, m]; gold bool [n, m], the pages that answer; the other candidates
    are the negatives, and so are `others` [L, n, k]: scores of other contexts' pages.

    Queries whose gold pages are no candidates do not count.
    """
    gold = gold & allowed
    asked = gold.any(dim=-1)
    if not bool(asked.any()):
        return scores.sum(dim=(1, 2)) * 0.0
    logits = scores.masked_fill(~allowed, -torch.inf)[:, asked]
    right = logits.masked_fill(~gold[asked], -torch.inf).logsumexp(dim=-1)
    every = logits if others is None else torch.cat((logits, others[:, asked]), dim=-1)
    loss: Tensor = (every.logsumexp(dim=-1) - right).mean(dim=-1)
    return loss


def recall(scores: Tensor, mass: Tensor, allowed: Tensor, share: float) -> Tensor:
    """Share of the candidates' mass on the best pages, as many as `share` of the candidates rounded up:
    [..., n]; rows without mass are nan. scores, mass [..., n, m]. Ties go to the lower page."""
    n_kept = (allowed.sum(dim=-1) * share).ceil().long()
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranked = (mass.clamp(min=0) * allowed).gather(-1, order.expand(mass.shape))
    kept = torch.arange(mass.shape[-1]) < n_kept[:, None]
    total = ranked.sum(dim=-1)
    return (ranked * kept).sum(dim=-1) / total.where(total > 0, torch.nan)
