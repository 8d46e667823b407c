"""Segments: the unit of attention partials (DESIGN 4, bank), all of a query block as a few arrays.

However many segments one call of attention gets, each has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

SegmentKind = Literal["sink", "selected", "window", "tail"]
KINDS: tuple[SegmentKind, ...] = ("sink", "selected", "window", "tail")
"""`tail`: means of keys and values in a view of their own; tokens are numbers of means there."""

RUNS_AT, HEADS, N_RUNS, RUN_TOKENS, RENUMBERED, KIND = range(6)
"""Columns of `Segments.table`."""
COLUMNS = 6
FIXED = 2
"""In column RENUMBERED: all keys of the segment stand at its first position."""


@dataclass(eq=False)
class Segment:
    """Keys that one attention partial covers, in ascending order of tokens."""

    kind: SegmentKind
    runs: np.ndarray
    """int64 [1, n] (all KV heads) or [Hkv, n]: first tokens of runs, -1 = padding at the end."""
    block_tokens: int
    """Tokens of one run."""
    key_start: tuple[int, ...]
    """Per head of `base`: position of the first run's first key, counted from `base`. Runs of a
    renumbered segment follow each other without gaps, others keep true distances."""
    base: tuple[int, ...]
    """One for all KV heads or one each: subtracted from true positions of queries and of sink and
    window keys, so that streaming positions begin at 0 (only differences matter; angles stay small
    and exact)."""
    renumbered: bool
    page_tokens: int
    weights: np.ndarray | None = None
    """float32 like `runs`: how many tokens each mean of a tail stands for."""
    fixed: bool = False
    """All keys stand at the first position."""

    @cached_property
    def starts(self) -> Tensor:
        """int64 [n] (all KV heads) or [Hkv, n]: `runs` as a tensor."""
        starts = torch.from_numpy(np.ascontiguousarray(self.runs))
        return starts[0] if len(starts) == 1 else starts

    @cached_property
    def pages(self) -> tuple[tuple[int, ...], ...]:
        """Distinct page indexes, ascending: one tuple for all KV heads, or one per KV head."""
        last = self.block_tokens - 1
        found = []
        for starts in self.runs.tolist():
            pages = {t // self.page_tokens for t in starts if t >= 0}
            pages |= {(t + last) // self.page_tokens for t in starts if t >= 0}
            found.append(tuple(sorted(pages)))
        return tuple(found)


@dataclass(eq=False, frozen=True)
class Segments(Sequence[Segment]):
    """Segments of one query block in the order of their merge.

    Arrays, because a block has dozens and decode makes them for every layer of every token; single
    ones are made when asked for. A slice shares the runs.
    """

    table: np.ndarray
    """int64 [S, 6]: where a segment's runs begin in `runs` ([heads, n], flat), their heads, their
    number, tokens of a run, whether it is renumbered, its kind (index into KINDS)."""
    runs: np.ndarray
    """int64 [R]: first tokens of runs, -1 = padding."""
    run_tokens: np.ndarray
    """int64 [R]: tokens of each run."""
    run_heads: np.ndarray
    """int64 [R]: KV head of each run, -1 = all."""
    key_starts: np.ndarray
    """int64 [S, heads of base]: see `Segment.key_start`, but of windows counted from 0: a base may then
    change without touching them."""
    base: tuple[int, ...]
    page_tokens: int
    run_weights: np.ndarray | None = None
    """float32 [R] of a tail: tokens that each run, one mean, stands for."""

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Segment]:
        return (self._one(i) for i in range(len(self.table)))

    @overload
    def __getitem__(self, at: int) -> Segment: ...
    @overload
    def __getitem__(self, at: slice) -> Segments: ...
    def __getitem__(self, at: int | slice) -> Segment | Segments:
        if isinstance(at, int):
            return self._one(at)
        return Segments(
            self.table[at],
            self.runs,
            self.run_tokens,
            self.run_heads,
            self.key_starts[at],
            self.base,
            self.page_tokens,
            self.run_weights,
        )

    def _one(self, at: int) -> Segment:
        first, heads, n, tokens, renumbered, kind = self.table[at].tolist()
        starts = self.key_starts[at]
        if KINDS[kind] == "window":
            starts = starts - np.array(self.base)
        part = slice(first, first + heads * n)
        weights = None if self.run_weights is None else self.run_weights[part].reshape(heads, n)
        return Segment(
            KINDS[kind],
            self.runs[part].reshape(heads, n),
            tokens,
            tuple(starts.tolist()),
            self.base,
            renumbered == 1,
            self.page_tokens,
            weights,
            renumbered == FIXED,
        )

    @property
    def most_keys(self) -> int:
        """Keys of the longest segment."""
        return int((self.table[:, N_RUNS] * self.table[:, RUN_TOKENS]).max(initial=0))

    @property
    def reach(self) -> int:
        """One past the largest key position, counted from `base`, or a little more."""
        keys = self.table[:, N_RUNS] * self.table[:, RUN_TOKENS]
        ends = self.key_starts.max(axis=1, initial=0) + keys
        truly = ends[self.table[:, RENUMBERED] == 1].max(initial=0)
        return max(int(truly), int((self.runs + self.run_tokens).max(initial=0)) - min(self.base))


def touched_pages(segments: Segments, n_kv_heads: int, n_pages: int) -> np.ndarray:
    """bool [n_kv_heads, n_pages]: pages that any of the segments reads, per KV head.

    Pages at n_pages or beyond, which only unwritten slots of a last run can touch, are left out.
    """
    touched = np.zeros((n_kv_heads, n_pages), dtype=bool)
    if not len(segments):
        return touched
    first, last = segments.table[0], segments.table[-1]
    part = slice(int(first[RUNS_AT]), int(last[RUNS_AT] + last[HEADS] * last[N_RUNS]))
    runs, heads = segments.runs[part], segments.run_heads[part]
    for token in (runs, runs + (segments.run_tokens[part] - 1)):
        page = token // segments.page_tokens
        live = (runs >= 0) & (page < n_pages)
        shared = live & (heads < 0)
        touched[:, page[shared]] = True
        own = live & (heads >= 0)
        touched[heads[own], page[own]] = True
    return touched
