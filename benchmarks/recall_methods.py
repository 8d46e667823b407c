"""Page indexes that `benchmarks.recall` compares: scores of every page for every selection."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.ops import PagedKV
from longreach.kernels.score import score_chunks
from longreach.kernels.selection import reduce_heads
from longreach.workers.bm25 import Bm25
from longreach.workers.bookmarks import Bookmarks, bookmark_scores
from longreach.workers.train_capture import CELL, Capture
from longreach.workers.train_forward import Frozen, states_of
from longreach.workers.train_losses import QUERY_TOKENS, page_distances
from longreach.workers.train_retriever import grid_of

from .captured import paged

PAGE_TOKENS = 128
NUMBER_BYTES = 2
"""Of a number in a summary, float16."""
STRIDE = 4
"""Queries averaged into one before bounds and means are scored, as in configs/longreach-3k.yaml."""
SPREAD = 0.4
"""Of bounds, as there."""
N_DECODE = 32
"""Positions of a text whose next tokens are selected for."""
N_RANDOM = 8

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
Scores = Tensor
"""float32 [n selections, m pages]"""


@dataclass(frozen=True)
class Asked:
    """Selections in one context: for the block that ends at a position, or for the tokens after it."""

    role: Role
    positions: Tensor
    """int64 [n]"""
    page_ends: Tensor
    """int64 [m]"""

    def queries(self, q: Tensor, i: int) -> tuple[Tensor, int]:
        """Of selection i, from q [H, T, D]: the block's, or that of the first token after; and where
        they start."""
        end = int(self.positions[i]) + 1
        start = end - QUERY_TOKENS if self.role == "prefill" else end
        return q[:, start : end if self.role == "prefill" else end + 1].float(), start


def asked_of(capture: Capture, role: Role) -> Asked:
    """Every block of the later half; for decode, the questions or, of a plain text, positions of the
    later half."""
    n_tokens = capture.n_tokens
    page_ends = torch.arange(PAGE_TOKENS - 1, n_tokens, PAGE_TOKENS)
    if role == "prefill":
        first = n_tokens // 2 // QUERY_TOKENS * QUERY_TOKENS
        positions = torch.arange(first, n_tokens, QUERY_TOKENS)[1:] - 1
    elif capture.asks:
        ends = [(ask.position + 1) // CELL * CELL - 1 for ask in capture.asks]
        positions = torch.tensor(ends)
    else:
        cells = torch.linspace(n_tokens // 2, n_tokens - 64, N_DECODE).long() // CELL
        positions = cells.unique() * CELL - 1
    return Asked(role, positions, page_ends)


class Methods:
    """Trained bookmarks beside what needs no training. `bytes_of` is per page and layer."""

    def __init__(self, bookmarks: Bookmarks, frozen: Frozen, embedding: Tensor) -> None:
        self._bookmarks, self._frozen, self._embedding = bookmarks, frozen, embedding

    def bytes_of(self, name: str) -> int:
        shape = self._bookmarks.shape
        key = shape.n_kv_heads * shape.head_dim * NUMBER_BYTES
        if name.startswith(("bookmark", "mean", "bounds of 256")):
            return key
        if name.startswith("bounds"):
            return 2 * key
        return key * PAGE_TOKENS if name.startswith("search") else 0

    def by_layer(
        self, capture: Capture, asked: Asked, texts: list[str]
    ) -> Iterator[tuple[int, dict[str, Scores]]]:
        """(layer, scores by method). texts: of every token."""
        fixed = self._fixed(asked, texts)
        trained = self._bookmark_scores(self._bookmarks, capture, asked)
        plain = Bookmarks(self._bookmarks.shape)
        plain.embedding.data.copy_(self._embedding)
        untrained = self._bookmark_scores(plain, capture, asked)
        keys, kv, q = capture.keys(), capture.rotated_keys_values(), capture.queries()
        for layer in range(kv.shape[0]):
            view = paged(keys[layer].float(), kv[layer, 1].float())
            found = {"bookmark": trained[layer], "bookmark, untrained": untrained[layer]}
            for name, chunk, policy in _policies():
                found[name] = self._scored(q[layer], view, chunk, policy, asked)
            yield layer, found | fixed

    def _bookmark_scores(self, bookmarks: Bookmarks, capture: Capture, asked: Asked) -> Tensor:
        grid = grid_of(capture, PAGE_TOKENS, 0, asked.positions.tolist())
        with torch.no_grad():
            states = states_of(bookmarks, self._frozen, [(capture, grid.positions)])
            m, n = len(asked.page_ends), len(asked.positions)
            scores = bookmark_scores(states.queries[:, m : m + n], states.keys[:, :m])
            distances = page_distances(asked.page_ends, asked.positions, PAGE_TOKENS)
            return bookmarks.ranked(scores, distances)

    def _scored(
        self, q: Tensor, view: PagedKV, chunk: int, policy: LayerPolicy, asked: Asked
    ) -> Scores:
        n_pages, scale = len(asked.page_ends), self._bookmarks.shape.head_dim**-0.5
        scores = torch.full((len(asked.positions), n_pages), -torch.inf)
        for i in range(len(asked.positions)):
            queries, start = asked.queries(q, i)
            full = start // PAGE_TOKENS * PAGE_TOKENS  # pages that end before the queries
            starts = torch.arange(0, full, chunk)[None]
            rows = score_chunks(
                queries, start, view, starts, policy.stages[0], policy, self._frozen.rope, scale
            )
            pages = reduce_heads(rows, "all")[0].repeat_interleave(chunk // PAGE_TOKENS)
            scores[i, : full // PAGE_TOKENS] = pages[: full // PAGE_TOKENS]
        return scores

    def _fixed(self, asked: Asked, texts: list[str]) -> dict[str, Scores]:
        """What no layer changes."""
        n, m = len(asked.positions), len(asked.page_ends)
        pages = [
            "".join(texts[end + 1 - PAGE_TOKENS : end + 1]) for end in asked.page_ends.tolist()
        ]
        index = Bm25(pages)
        words = [
            "".join(texts[max(0, p + 1 - QUERY_TOKENS) : p + 1]) for p in asked.positions.tolist()
        ]
        by_words = torch.stack([torch.from_numpy(index.scores(text)).float() for text in words])
        rng = random.Random(0)
        chance = {
            f"random {i}": torch.tensor([[rng.random() for _ in range(m)] for _ in range(n)])
            for i in range(N_RANDOM)
        }
        recent = torch.arange(m).float().expand(n, m)
        return {"BM25": by_words, "recency": recent} | chance


def _policies() -> Iterator[tuple[str, int, LayerPolicy]]:
    """Scorers of ours that need no training, with true positions, which keep most of the mass within the
    model's window: (name, tokens per summary, policy)."""
    for name, chunk, scorer, reduce in (
        ("mean (softmax)", PAGE_TOKENS, "mean", "softmax"),
        ("mean (max)", PAGE_TOKENS, "mean", "max"),
        ("bounds (softmax)", PAGE_TOKENS, "bounds", "softmax"),
        ("bounds (max)", PAGE_TOKENS, "bounds", "max"),
        ("bounds of 256 (softmax)", 2 * PAGE_TOKENS, "bounds", "softmax"),
        ("bounds of 256 (max)", 2 * PAGE_TOKENS, "bounds", "max"),
        ("search (max)", PAGE_TOKENS, "search", "max"),
    ):
        stage = Stage(
            scorer=scorer,  # type: ignore[arg-type]
            chunk=chunk,
            keep=chunk,
            query_stride=1 if scorer == "search" else STRIDE,
            spread=SPREAD if scorer == "bounds" else 1.0,
        )
        policy = LayerPolicy(
            stages=(stage,),
            sink=0,
            window=chunk,  # with it every page before the queries is a candidate
            select_rope="none",
            reduce=reduce,  # type: ignore[arg-type]
        )
        yield name, chunk, policy
