"""Cut the keys of one query block into segments, a function of position and selection alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import InternalError
from ..core.stage import LayerPolicy
from .segments import FIXED, KINDS, Segments
from .selection import Selection, first_chunks

GROUP = 8
"""Pages of a sink or window segment, blocks of a selected one, at most."""

TAIL_GROUP = 64
"""Means of a tail segment, at most."""

_SINK, _SELECTED, _WINDOW, _TAIL = range(len(KINDS))


@dataclass
class _Part:
    """Segments of one kind. runs: int64 [1 or Hkv, n]; sizes: runs of each segment."""

    kind: int
    runs: np.ndarray
    run_tokens: int
    sizes: np.ndarray
    key_starts: np.ndarray
    renumbered: int


def plan_attend(
    q_start: int,
    n_queries: int,
    selection: Selection | None,
    policy: LayerPolicy,
    page_tokens: int,
) -> Segments:
    """Segments of the queries [q_start, q_start + n_queries), in the order of their merge.

    Sinks (groups of up to 8 pages), selected blocks (8 blocks each), window (absolute groups of 8
    pages, of which only pages that the window touches). A dense policy is all window. Segments
    without any visible key are left out. Raises InternalError if a pruning policy has no selection.
    """
    q_last = q_start + n_queries - 1
    if policy.dense:
        return _join([_windows(0, q_last, page_tokens, (0,))], (0,), page_tokens)
    if selection is None:
        raise InternalError(f"no selection for queries at {q_start} of a pruning policy")
    base = base_of(q_start, selection, policy)
    # keys beyond `seen` are inside every query's window
    seen = q_last - policy.window
    parts = []
    if (sink_end := min(policy.sink, seen + 1)) > 0:
        runs = np.arange(0, sink_end, page_tokens)[None]
        starts = runs[0, ::GROUP, None].repeat(len(base), axis=1)
        parts.append(_Part(_SINK, runs, page_tokens, _sizes(runs.shape[1]), starts, False))
    selected = _selected(selection, policy, seen, len(base))
    if selected is not None:
        parts.append(selected)
    window_start = max(0, q_start - policy.window + 1)
    parts.append(_windows(window_start, q_last, page_tokens, base))
    return _join(parts, base, page_tokens)


def plan_dense(q: int, reach: int, page_tokens: int) -> Segments:
    """All keys up to the query at q, with true distances up to `reach` and that one beyond."""
    first_near = max(0, q - reach + 1) // page_tokens
    parts = []
    if first_near:
        runs = np.arange(first_near)[None] * page_tokens
        n_segments = len(_sizes(first_near))
        starts = np.full((n_segments, 1), q - reach)
        parts.append(_Part(_SELECTED, runs, page_tokens, _sizes(first_near), starts, FIXED))
    parts.append(_windows(first_near * page_tokens, q, page_tokens, (0,)))
    return _join(parts, (0,), page_tokens)


def tail_until(q: int, policy: LayerPolicy) -> int:
    """First position after q at which `plan_tail` changes while the selection stays: the next cell leaves
    the window and counts from then on."""
    outside = (q - policy.window + 1 - policy.tail) // policy.tail
    return (outside + 2) * policy.tail + policy.window - 1


def plan_tail(
    q_start: int, selection: Selection, policy: LayerPolicy, page_tokens: int
) -> Segments | None:
    """The means that stand for what entered the last stage and was not kept; None if nothing is left.

    A mean covers `policy.tail` tokens (a cell) and counts for those of them that were not selected, if
    all of them are outside the window of the block's first query. Streaming: all means stand where the
    selected tokens begin; else each stands at its cell's middle.
    """
    cell_tokens, chunk = policy.tail, policy.block_tokens
    entered = selection.inputs[-1] if len(policy.stages) > 1 else None
    starts = first_chunks(q_start, policy)[None] if entered is None else entered
    base = base_of(q_start, selection, policy)
    last = q_start - policy.window + 1 - cell_tokens
    cells, weights = [], []
    for head in range(len(selection.counts)):
        mine = starts[min(head, len(starts) - 1)].numpy()
        cell, n_chunks = np.unique(mine[mine >= 0] // cell_tokens, return_counts=True)
        kept = selection.blocks[head].numpy()
        taken, n_taken = np.unique(kept[kept >= 0] // cell_tokens, return_counts=True)
        at = np.searchsorted(cell, taken)
        n_chunks[at] -= n_taken
        live = (n_chunks > 0) & (cell * cell_tokens <= last)
        cells.append(cell[live])
        weights.append((n_chunks[live] * chunk).astype(np.float32))
    n_most = max(len(c) for c in cells)
    if not n_most:
        return None
    runs = np.full((len(cells), n_most), -1, dtype=np.int64)
    counts = np.ones((len(cells), n_most), dtype=np.float32)
    for head, (cell, weight) in enumerate(zip(cells, weights, strict=True)):
        runs[head, : len(cell)], counts[head, : len(cell)] = cell, weight
    n_bases = len(base)
    streaming = policy.attend_rope == "streaming"
    group = TAIL_GROUP if streaming else 1
    sizes = _sizes(n_most, group)
    first = np.arange(0, n_most, group)
    if streaming:
        key_starts = np.full((len(first), n_bases), policy.sink)
    else:
        middle = runs[:, first].T * cell_tokens + cell_tokens // 2
        key_starts = np.broadcast_to(middle, (len(first), n_bases)).clip(min=0)
    part = _Part(_TAIL, runs, 1, sizes, np.ascontiguousarray(key_starts), FIXED if streaming else 0)
    joined = _join([part], base, page_tokens // cell_tokens, group)
    return replace(joined, run_weights=_by_segment(counts, group))


def base_of(q_start: int, selection: Selection, policy: LayerPolicy) -> tuple[int, ...]:
    """First position of the renumbered sequence (reference section 4, "ST exactly")."""
    counts: list[int] = selection.counts.tolist()
    if policy.attend_rope == "none":
        return (0,) * len(counts)
    room = q_start - policy.window - policy.sink + 1
    return tuple(max(0, room - n * policy.block_tokens) for n in counts)


def _sizes(n_runs: int, group: int = GROUP) -> np.ndarray:
    """Runs per segment: a group, the rest in the last."""
    sizes = np.full(-(-n_runs // group), group)
    sizes[-1] = n_runs - group * (len(sizes) - 1)
    return sizes


def _selected(selection: Selection, policy: LayerPolicy, seen: int, n_bases: int) -> _Part | None:
    blocks = selection.blocks.numpy()
    # padding is -1 and at the end: dropping what nobody sees keeps the ranks of the rest
    blocks = np.where(blocks <= seen, blocks, -1)
    n_blocks = int((blocks >= 0).sum(axis=1).max()) if blocks.size else 0
    if not n_blocks:
        return None
    runs = blocks[:, :n_blocks]
    renumbered = policy.attend_rope == "streaming"
    if renumbered:
        starts = policy.sink + np.arange(0, n_blocks, GROUP) * policy.block_tokens
        starts = starts[:, None].repeat(n_bases, axis=1)
    else:
        starts = runs[:, ::GROUP].T.clip(min=0)
    return _Part(_SELECTED, runs, policy.block_tokens, _sizes(n_blocks), starts, renumbered)


def _windows(start: int, q_last: int, page_tokens: int, base: tuple[int, ...]) -> _Part:
    pages = np.arange(start // page_tokens, q_last // page_tokens + 1)
    groups = pages // GROUP
    sizes = np.bincount(groups - groups[0])
    first = pages[np.concatenate([[0], sizes.cumsum()[:-1]])] * page_tokens
    starts = first[:, None].repeat(len(base), axis=1)
    return _Part(_WINDOW, pages[None] * page_tokens, page_tokens, sizes, starts, False)


def _join(
    parts: list[_Part], base: tuple[int, ...], page_tokens: int, group: int = GROUP
) -> Segments:
    tables, runs, tokens, heads = [], [], [], []
    n_runs = 0
    for part in parts:
        n_heads, n = part.runs.shape
        table = np.empty((len(part.sizes), 6), dtype=np.int64)
        ends = part.sizes.cumsum()
        table[:, 0] = n_runs + n_heads * (ends - part.sizes)
        table[:, 1] = n_heads
        table[:, 2] = part.sizes
        table[:, 3:] = part.run_tokens, part.renumbered, part.kind
        tables.append(table)
        runs.append(_by_segment(part.runs, group))
        tokens.append(np.full(n_heads * n, part.run_tokens))
        own = np.arange(n_heads)[:, None] if n_heads > 1 else np.array([[-1]])
        heads.append(_by_segment(np.broadcast_to(own, part.runs.shape), group))
        n_runs += n_heads * n
    return Segments(
        np.concatenate(tables),
        np.concatenate(runs),
        np.concatenate(tokens),
        np.concatenate(heads),
        np.concatenate([part.key_starts for part in parts]),
        base,
        page_tokens,
    )


def _by_segment(values: np.ndarray, group: int) -> np.ndarray:
    """[heads, n] flat, segment after segment of [heads, group]; several heads are selected or tail
    only, whose segments all have as many runs but the last."""
    if len(values) == 1:
        return values.reshape(-1)
    whole = values.shape[1] // group * group
    by_group = values[:, :whole].reshape(len(values), -1, group).swapaxes(0, 1)
    return np.concatenate([by_group.reshape(-1), values[:, whole:].reshape(-1)])
