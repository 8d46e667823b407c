"""Cut the keys of one query block into segments, a function of position and selection alone.

A segment is the unit of attention partials (DESIGN 4, bank): however many segments one call gets,
each has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InternalError
from ..core.stage import LayerPolicy
from .selection import Selection

SegmentKind = Literal["sink", "selected", "window"]

GROUP = 8
"""Pages of a sink or window segment, blocks of a selected one, at most."""


@dataclass(eq=False)
class Segment:
    """Keys that one attention partial covers, in ascending order of tokens.

    Plain arrays and numbers, made by the dozen for every query block and layer; `starts` and
    `pages` are made when asked for.
    """

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


def plan_attend(
    q_start: int,
    n_queries: int,
    selection: Selection | None,
    policy: LayerPolicy,
    page_tokens: int,
) -> list[Segment]:
    """Segments of the queries [q_start, q_start + n_queries), in the order of their merge.

    Sinks (groups of up to 8 pages), selected blocks (8 blocks each), window (absolute groups of 8
    pages, of which only pages that the window touches). A dense policy is all window. Segments
    without any visible key are left out. Raises InternalError if a pruning policy has no selection.
    """
    q_last = q_start + n_queries - 1
    if policy.dense:
        return _windows(0, q_last, page_tokens, (0,))
    if selection is None:
        raise InternalError(f"no selection for queries at {q_start} of a pruning policy")
    base = _base(q_start, selection, policy)
    segments: list[Segment] = []
    # keys beyond `seen` are inside every query's window
    seen = q_last - policy.window
    sink_end = min(policy.sink, seen + 1)
    group = GROUP * page_tokens
    for first in range(0, max(0, sink_end), group):
        runs = np.arange(first, min(first + group, sink_end), page_tokens)[None]
        key_start = (first,) * len(base)
        segments.append(Segment("sink", runs, page_tokens, key_start, base, False, page_tokens))
    segments += _selected(selection, policy, seen, base, page_tokens)
    window_start = max(0, q_start - policy.window + 1)
    return segments + _windows(window_start, q_last, page_tokens, base)


def _base(q_start: int, selection: Selection, policy: LayerPolicy) -> tuple[int, ...]:
    """First position of the renumbered sequence (reference section 4, "ST exactly")."""
    counts: list[int] = selection.counts.tolist()
    if policy.attend_rope == "none":
        return (0,) * len(counts)
    room = q_start - policy.window - policy.sink + 1
    return tuple(max(0, room - n * policy.block_tokens) for n in counts)


def _selected(
    selection: Selection,
    policy: LayerPolicy,
    seen: int,
    base: tuple[int, ...],
    page_tokens: int,
) -> list[Segment]:
    renumbered = policy.attend_rope == "streaming"
    blocks = selection.blocks.numpy()
    # padding is -1 and at the end: dropping what nobody sees keeps the ranks of the rest
    blocks = np.where(blocks <= seen, blocks, -1)
    n_blocks = int((blocks >= 0).sum(axis=1).max()) if blocks.size else 0
    segments = []
    for i in range(0, n_blocks, GROUP):
        runs = blocks[:, i : min(i + GROUP, n_blocks)]
        if renumbered:
            key_start = (policy.sink + i * policy.block_tokens,) * len(base)
        else:
            key_start = tuple(max(0, int(start)) for start in runs[:, 0])
        segments.append(
            Segment("selected", runs, policy.block_tokens, key_start, base, renumbered, page_tokens)
        )
    return segments


def _windows(start: int, q_last: int, page_tokens: int, base: tuple[int, ...]) -> list[Segment]:
    group = GROUP * page_tokens
    segments = []
    first = start // page_tokens * page_tokens
    while first <= q_last:
        stop = min((first // group + 1) * group, q_last + 1)
        runs = np.arange(first, stop, page_tokens)[None]
        key_start = tuple(first - b for b in base)
        segments.append(Segment("window", runs, page_tokens, key_start, base, False, page_tokens))
        first = (first // group + 1) * group
    return segments


def touched_pages(segments: Sequence[Segment], n_kv_heads: int, n_pages: int) -> np.ndarray:
    """bool [n_kv_heads, n_pages]: pages that any of the segments reads, per KV head.

    One pass over all runs (`Segment.pages` serves single segments). Pages at n_pages or beyond,
    which only unwritten slots of a last run can touch, are left out.
    """
    touched = np.zeros((n_kv_heads, n_pages), dtype=bool)
    shapes: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        shapes.setdefault((segment.runs.shape[0], segment.block_tokens), []).append(segment)
    for (n_heads, block_tokens), group in shapes.items():
        runs = np.concatenate([segment.runs for segment in group], axis=1)
        for token in (runs, runs + (block_tokens - 1)):
            page = token // group[0].page_tokens
            live = (runs >= 0) & (page < n_pages)
            if n_heads == 1:
                touched[:, page[live]] = True
            else:
                head = np.broadcast_to(np.arange(n_heads)[:, None], runs.shape)
                touched[head[live], page[live]] = True
    return touched
