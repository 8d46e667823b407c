"""Recall of the dense attention's mass, by method, number of pages, layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.workers.train_capture import Capture
from longreach.workers.train_losses import WINDOW, candidates, page_mass

from .recall_methods import PAGE_TOKENS, Asked, Methods

PAGES = (1, 2, 4, 8, 16)
THIRD = "third"
"""A third of the candidates, rounded up."""
WINDOWS = {"all": 0, "far": WINDOW}
FIRST_LAYER = 2
"""Means leave out the layers before it: at layer 0 all bookmarks are equal."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Of one context: recall [L, n, 1 + PAGES] by method and window, the first for a third of the
    candidates, nan for more pages than a third; heads [L, H, n] at a third, of all candidates."""

    recall: dict[str, dict[str, Tensor]]
    heads: dict[str, Tensor]


def measure(methods: Methods, capture: Capture, asked: Asked, texts: list[str]) -> Measured:
    recall: dict[str, dict[str, list[Tensor]]] = {}
    heads: dict[str, list[Tensor]] = {}
    allowed = {
        name: candidates(asked.page_ends, asked.positions, window)
        for name, window in WINDOWS.items()
    }
    by_head = capture.head_mass()
    for layer, scores in methods.by_layer(capture, asked, texts):
        mass = page_mass(by_head[layer].float(), asked.page_ends, PAGE_TOKENS, asked.positions)
        mass = mass[0 if asked.role == "prefill" else 1]  # [H, n, m]
        summed = mass.sum(dim=0)
        for name, rows in (scores | {"oracle": summed}).items():
            for window, mask in allowed.items():
                kept = shares_kept(rows, summed, mask)
                recall.setdefault(name, {}).setdefault(window, []).append(kept)
            kept = shares_kept(rows.expand(mass.shape), mass, allowed["all"])
            heads.setdefault(name, []).append(kept[..., 0])
    return Measured(
        {n: {w: torch.stack(r) for w, r in by.items()} for n, by in recall.items()},
        {name: torch.stack(rows) for name, rows in heads.items()},
    )


def shares_kept(scores: Tensor, mass: Tensor, allowed: Tensor) -> Tensor:
    """Share of the candidates' mass on the best pages: scores, mass [..., n, m] -> [..., n, 1 + PAGES].

    Ties go to the lower page. nan without candidates or mass, and for more pages than a third of them.
    """
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranked = (mass.clamp(min=0) * allowed).gather(-1, order).cumsum(dim=-1)
    n_candidates = allowed.sum(dim=-1)
    third = (n_candidates + 2) // 3
    counts = torch.stack([third, *(torch.full_like(third, n) for n in PAGES)], dim=-1)
    at = (counts - 1).clamp(min=0, max=mass.shape[-1] - 1).expand(*mass.shape[:-1], -1)
    total = ranked[..., -1:]
    kept = ranked.gather(-1, at) / total
    known = (total > 0) & (counts <= third[..., None]) & (n_candidates > 0)[..., None]
    return kept.where(known, torch.nan)


def summary(parts: Sequence[Measured]) -> dict[str, Row]:
    """By method, over contexts; the random ones become one."""
    names = list(parts[0].recall)
    chance = [name for name in names if name.startswith("random")]
    groups = {name: [name] for name in names if name not in chance} | {"random": chance}
    found = {}
    for name, members in groups.items():
        of_window = {
            window: torch.cat([p.recall[m][window] for m in members for p in parts], dim=1)
            for window in WINDOWS
        }
        heads = torch.cat([p.heads[m] for m in members for p in parts], dim=-1).nanmean(dim=-1)
        found[name] = _row(of_window, heads)
    return found


def _row(of_window: dict[str, Tensor], heads: Tensor) -> Row:
    row: Row = {}
    for window, recall in of_window.items():
        used = recall[FIRST_LAYER:]
        means = used.flatten(0, 1).nanmean(dim=0).tolist()
        third = used[..., 0].flatten()
        row[window] = {
            "recall": dict(zip((THIRD, *map(str, PAGES)), _rounded(means), strict=True)),
            "p5": round(float(third[~third.isnan()].quantile(0.05)), 4),
            "by_layer": _rounded(recall[..., 0].nanmean(dim=-1).tolist()),
        }
    used = heads[FIRST_LAYER:]
    worst = int(used.flatten().argmin())
    layer, head = divmod(worst, used.shape[1])
    row["worst_head"] = {
        "layer": layer + FIRST_LAYER,
        "head": head,
        "recall": round(float(used[layer, head]), 4),
    }
    return row


def _rounded(values: list[float]) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values]
