"""Cut the keys of one query block into segments, a function of position and selection alone.

A segment is the unit of attention partials (DESIGN 4, bank): however many segments one call gets,
each has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import InternalError
from ..core.stage import LayerPolicy
from .selection import Selection

SegmentKind = Literal["sink", "selected", "window"]

GROUP = 8
"""Pages of a sink or window segment, blocks of a selected one, at most."""


@dataclass(frozen=True)
class Segment:
    """Keys that one attention partial covers, in ascending order of tokens."""

    kind: SegmentKind
    starts: Tensor
    """int64 [n] (all KV heads) or [Hkv, n]: first tokens of runs, -1 = padding at the end."""
    block_tokens: int
    """Tokens of one run."""
    key_start: Tensor
    """int64 [1] or [Hkv]: position of the first run's first key, counted from `base`. Runs of a
    selected segment are renumbered consecutively (streaming) or keep true distances (none)."""
    base: Tensor
    """int64 [1] or [Hkv]: subtracted from true positions of queries and of sink and window keys, so
    that streaming positions begin at 0 (only differences matter; angles stay small and exact)."""
    renumbered: bool
    """Whether runs follow each other without gaps."""
    page_tokens: int

    @cached_property
    def pages(self) -> tuple[tuple[int, ...], ...]:
        """Distinct page indexes, ascending: one tuple for all KV heads, or one per KV head."""
        heads = self.starts if self.starts.dim() == 2 else self.starts[None]
        last = self.block_tokens - 1
        found = []
        for starts in heads.tolist():
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
        return _windows(0, q_last, page_tokens, torch.zeros(1, dtype=torch.int64))
    if selection is None:
        raise InternalError(f"no selection for queries at {q_start} of a pruning policy")
    base = _base(q_start, selection, policy)
    segments: list[Segment] = []
    # keys beyond `seen` are inside every query's window
    seen = q_last - policy.window
    sink_end = min(policy.sink, seen + 1)
    zero = torch.zeros_like(base)
    for first in range(0, max(0, sink_end), GROUP * page_tokens):
        starts = torch.arange(first, min(first + GROUP * page_tokens, sink_end), page_tokens)
        segments.append(
            Segment("sink", starts, page_tokens, zero + first, base, False, page_tokens)
        )
    segments += _selected(selection, policy, seen, base, page_tokens)
    window_start = max(0, q_start - policy.window + 1)
    return segments + _windows(window_start, q_last, page_tokens, base)


def _base(q_start: int, selection: Selection, policy: LayerPolicy) -> Tensor:
    """First position of the renumbered sequence (reference section 4, "ST exactly")."""
    if policy.attend_rope == "none":
        return torch.zeros_like(selection.counts)
    n_selected = selection.counts * policy.block_tokens
    return (q_start - policy.window - policy.sink - n_selected + 1).clamp(min=0)


def _selected(
    selection: Selection, policy: LayerPolicy, seen: int, base: Tensor, page_tokens: int
) -> list[Segment]:
    renumbered = policy.attend_rope == "streaming"
    blocks = selection.blocks.masked_fill(selection.blocks > seen, -1)
    n_blocks = int((blocks >= 0).sum(dim=-1).max()) if blocks.numel() else 0
    segments = []
    for i in range(0, n_blocks, GROUP):
        starts = blocks[:, i : min(i + GROUP, n_blocks)]
        key_start = starts[:, 0].clamp(min=0)
        if renumbered:
            key_start = torch.full_like(key_start, policy.sink + i * policy.block_tokens)
        shared = starts[0] if starts.shape[0] == 1 else starts
        segments.append(
            Segment(
                "selected", shared, policy.block_tokens, key_start, base, renumbered, page_tokens
            )
        )
    return segments


def _windows(start: int, q_last: int, page_tokens: int, base: Tensor) -> list[Segment]:
    group = GROUP * page_tokens
    segments = []
    first = start // page_tokens * page_tokens
    while first <= q_last:
        stop = min((first // group + 1) * group, q_last + 1)
        starts = torch.arange(first, stop, page_tokens)
        segments.append(
            Segment("window", starts, page_tokens, first - base, base, False, page_tokens)
        )
        first = (first // group + 1) * group
    return segments
