"""Training of a bookmark retriever: the model is frozen, only what a bookmark adds to it learns.

A step takes a few captured contexts, puts pages on a grid that begins anywhere, runs one forward of all
their bookmarks and compares each layer's scores with the dense model's attention, or with gold pages.
Nothing random outlives a step: its generator is made of the seed and the step's number, so that a run
that is taken up again goes on with the same bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .bookmarks import Bookmarks, bookmark_scores
from .train_capture import CELL, Capture
from .train_forward import Frozen, states_of
from .train_losses import (
    WINDOW,
    candidates,
    contrastive_loss,
    kl_loss,
    page_distances,
    page_mass,
    recall,
)
from .train_schedule import Schedule

Loss = Literal["kl", "contrastive", "both"]
FIRST_LAYER = 2
"""Recall leaves out the layers before it: at layer 0 all bookmarks are equal, and policies select there
otherwise."""
RECALL_SHARES = (1 / 8, 1 / 3)
"""Of the candidate pages, at which recall is told."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Schedule):
    """What a run does, apart from its data; a checkpoint fits only the plan it was made with."""

    n_steps: int = 700
    learning_rate: float = 3e-3
    n_queries: int = 32
    """Bookmarks per context that only ask, beside those of the pages."""
    loss: Loss = "kl"
    contrastive_weight: float = 0.2
    """Beside KL, where both are wanted."""
    evaluate_every: int = 100


@dataclass(frozen=True)
class Grid:
    """Where bookmarks stand in a context: int64 positions of page ends [m], and of all that ask [n],
    which begin with the page ends. asks: number of the question at a position, -1 elsewhere."""

    page_ends: Tensor
    positions: Tensor
    asks: tuple[int, ...]

    def distances(self, page_tokens: int) -> Tensor:
        """From each page's start to the token after each position, in pages: [n, m]."""
        return page_distances(self.page_ends, self.positions, page_tokens)


def grid_of(capture: Capture, page_tokens: int, offset: int, extra: Sequence[int]) -> Grid:
    """Pages that begin at `offset`; extra: further positions; the questions' positions are added."""
    page_ends = torch.arange(offset + page_tokens - 1, capture.n_tokens, page_tokens)
    asked = [ask.position for ask in capture.asks]
    positions = torch.cat((page_ends, torch.tensor([*extra, *asked], dtype=torch.int64)))
    asks = (-1,) * (len(positions) - len(asked)) + tuple(range(len(asked)))
    return Grid(page_ends, positions, asks)


def random_grid(capture: Capture, page_tokens: int, n_extra: int, rng: random.Random) -> Grid:
    """A grid at a random offset, and queries anywhere in the later three quarters."""
    offset = rng.randrange(0, page_tokens, CELL)
    cells = range(capture.n_tokens // CELL // 4, capture.n_tokens // CELL)
    extra = [cell * CELL + CELL - 1 for cell in rng.choices(cells, k=n_extra)]
    return grid_of(capture, page_tokens, offset, extra)


def gold_pages(capture: Capture, grid: Grid, page_tokens: int) -> Tensor:
    """bool [n, m]: pages that hold an answer to the question asked at a position."""
    found = torch.zeros(len(grid.positions), len(grid.page_ends), dtype=torch.bool)
    for row, number in enumerate(grid.asks):
        if number >= 0:
            for start, end in capture.asks[number].gold:
                found[row] |= (grid.page_ends >= start) & (grid.page_ends - page_tokens + 1 < end)
    return found


class Training:
    """Bookmarks, their optimizer and the step they have reached."""

    def __init__(self, bookmarks: Bookmarks, frozen: Frozen, plan: TrainingPlan) -> None:
        self.bookmarks, self.plan, self.step = bookmarks, plan, 0
        self.frozen = frozen
        named = dict(bookmarks.named_parameters())
        own = [named.pop(name) for name in ("embedding", "log_scale", "nearness")]
        groups = [{"params": list(named.values()), "times": 1.0}, {"params": own, "times": 3.0}]
        self.learned = dict(bookmarks.named_parameters())
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))

    def train_step(self, captures: Sequence[Capture]) -> dict[str, float]:
        """One step on contexts drawn from these. Returns its losses, means over layers."""
        rng = random.Random(f"{self.plan.seed} {self.step}")
        chosen = [captures[i] for i in self.plan.drawn(self.step, len(captures))]
        page_tokens = self.bookmarks.shape.page_tokens
        grids = [random_grid(c, page_tokens, self.plan.n_queries, rng) for c in chosen]
        losses = self._losses(chosen, grids)
        total = sum(losses.values())
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step) * group["times"]
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(self.bookmarks.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {name: float(loss.detach()) for name, loss in losses.items()} | {"norm": float(norm)}

    def _losses(self, captures: Sequence[Capture], grids: Sequence[Grid]) -> dict[str, Tensor]:
        bookmarks, plan = self.bookmarks, self.plan
        page_tokens = bookmarks.shape.page_tokens
        placed = [(c, grid.positions) for c, grid in zip(captures, grids, strict=True)]
        states = states_of(bookmarks, self.frozen, placed)
        sizes = [len(grid.positions) for grid in grids]
        parts = list(zip(states.queries.split(sizes, 1), states.keys.split(sizes, 1), strict=True))
        keys = [k[:, : len(grid.page_ends)] for (_, k), grid in zip(parts, grids, strict=True)]
        losses: dict[str, list[Tensor]] = {}
        for i, (capture, grid) in enumerate(zip(captures, grids, strict=True)):
            content = bookmark_scores(parts[i][0], keys[i])
            near = candidates(grid.page_ends, grid.positions)
            if plan.loss != "contrastive":
                mass = page_mass(capture.mass(), grid.page_ends, page_tokens, grid.positions)
                far = candidates(grid.page_ends, grid.positions, WINDOW)
                scores = bookmarks.ranked(content, grid.distances(page_tokens))
                terms = (kl_loss(scores, mass, near) + kl_loss(scores, mass, far)) / 2
                losses.setdefault("kl", []).append(terms.mean())
            if plan.loss != "kl":
                gold = gold_pages(capture, grid, page_tokens)
                foreign = [k for j, k in enumerate(keys) if j != i]
                others = None
                if foreign:
                    others = _at_one_distance(
                        bookmarks, bookmark_scores(parts[i][0], torch.cat(foreign, dim=1))
                    )
                asked = _at_one_distance(bookmarks, content)
                terms = contrastive_loss(asked, gold, near, others)[FIRST_LAYER:].mean()
                weight = plan.contrastive_weight if plan.loss == "both" else 1.0
                losses.setdefault("contrastive", []).append(terms * weight)
        return {name: torch.stack(found).mean() for name, found in losses.items()}


def _at_one_distance(bookmarks: Bookmarks, scores: Tensor) -> Tensor:
    """What answers a question may stand anywhere, and other contexts' pages stand nowhere."""
    return bookmarks.ranked(scores, torch.ones(scores.shape[1:]))


@torch.no_grad()
def evaluate(bookmarks: Bookmarks, frozen: Frozen, captures: Sequence[Capture]) -> dict[str, float]:
    """Recall of the dense model's mass on held-out contexts, pages on the real grid: means over layers
    but the first two, over queries and over both roles (the block, the tokens after). What no query has
    enough candidates for is left out."""
    found: dict[str, list[Tensor]] = {}
    page_tokens = bookmarks.shape.page_tokens
    for capture in captures:
        grid = grid_of(capture, page_tokens, 0, [])
        states = states_of(bookmarks, frozen, [(capture, grid.positions)])
        keys = states.keys[:, : len(grid.page_ends)]
        scores = bookmarks.ranked(
            bookmark_scores(states.queries, keys), grid.distances(page_tokens)
        )
        mass = page_mass(capture.mass(), grid.page_ends, page_tokens, grid.positions)
        for name, window in (("all", 0), ("far", WINDOW)):
            allowed = candidates(grid.page_ends, grid.positions, window)
            asked = allowed.sum(dim=-1) >= 8
            for share in RECALL_SHARES:
                kept = recall(scores, mass, allowed, share)[:, FIRST_LAYER:, asked]
                found.setdefault(f"recall {name} {share:.3f}", []).append(kept.flatten())
            if name == "all":
                found.setdefault("kl", []).append(kl_loss(scores, mass, allowed)[FIRST_LAYER:])
    means = {name: float(torch.cat(parts).nanmean()) for name, parts in found.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)}


def prepare(
    bookmarks: Bookmarks, embedding: Tensor, frozen: Frozen, captures: Sequence[Capture]
) -> None:
    """Start of training: the embedding of a token that the model knows as an end, and scores of every
    layer scaled to spread by about one."""
    bookmarks.embedding.data.copy_(embedding)
    spreads = []
    with torch.no_grad():
        for capture in captures[:2]:
            grid = grid_of(capture, bookmarks.shape.page_tokens, 0, [])
            states = states_of(bookmarks, frozen, [(capture, grid.page_ends)])
            scores = bookmark_scores(states.queries, states.keys)
            spreads.append(scores.std(dim=-1).mean(dim=-1))
    spread = torch.stack(spreads).mean(dim=0)
    bookmarks.log_scale.data.copy_(-spread.clamp(min=1e-3).log().clamp(-3, 3))
