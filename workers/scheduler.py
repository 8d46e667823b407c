"""What the engine does next: admission, one prefill chunk, one decode step (pure)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.stage import QUERY_BLOCK, LayerPolicy
from .row import Row, RowState

GROUP_PAGES = 8
"""Most pages that one segment of attention touches."""


PREFETCH_ROWS = 2
"""Queued rows whose pages are fetched before they are admitted."""


@dataclass(frozen=True)
class StepPlan:
    """Rows to open, rows that decode one token together, the row that prefills one chunk, and rows
    that are next in the queue."""

    admit: tuple[Row, ...]
    decode: tuple[Row, ...]
    prefill: Row | None
    queued: tuple[Row, ...] = ()


def plan_step(rows: Sequence[Row], max_rows: int, is_ready: Callable[[Row], bool]) -> StepPlan:
    """rows in arrival order. `is_ready` tells whether a waiting row's shared page has settled.

    Every decoding row takes part in each decode step; between two decode steps at most one chunk of
    the earliest prefilling row runs, so a long prefill never starves the others.
    """
    active = [r for r in rows if r.state in (RowState.PREFILL, RowState.DECODE, RowState.WAITING)]
    room = max_rows - len(active)
    queued = [r for r in rows if r.state is RowState.QUEUED]
    admit, queued = queued[: max(room, 0)], queued[max(room, 0) :]
    admit += [r for r in active if r.state is RowState.WAITING and is_ready(r)]
    prefilling = [r for r in active if r.state is RowState.PREFILL]
    return StepPlan(
        admit=tuple(sorted(admit, key=lambda r: r.order)),
        decode=tuple(r for r in active if r.state is RowState.DECODE),
        prefill=min(prefilling, key=lambda r: r.order, default=None),
        queued=tuple(queued[:PREFETCH_ROWS]),
    )


def chunk_end(start: int, n_prompt: int, chunk_tokens: int) -> int:
    """End of the prefill chunk from `start`: rounded to query blocks, cut only by the prompt's end."""
    blocks_end = (start + max(chunk_tokens, QUERY_BLOCK)) // QUERY_BLOCK * QUERY_BLOCK
    return min(n_prompt, max(blocks_end, start + QUERY_BLOCK))


def query_blocks(
    start: int, end: int, question_start: int, question_block: int
) -> list[tuple[int, int]]:
    """Ranges of queries that share a selection, aligned to absolute positions: QUERY_BLOCK in the
    context, question_block from question_start on. start is at the edge of a QUERY_BLOCK."""
    edges = [
        *range(start, min(end, question_start), QUERY_BLOCK),
        *range(max(start, question_start), end, question_block),
    ]
    return list(zip(edges, [*edges[1:], end], strict=True))


def prefill_start(n_prompt: int, n_existing_tokens: int) -> int:
    """First position to compute: the last block is always recomputed, for the logits."""
    last_block = (n_prompt - 1) // QUERY_BLOCK * QUERY_BLOCK
    return min(n_existing_tokens // QUERY_BLOCK * QUERY_BLOCK, last_block)


def refresh_level(
    refreshes: Sequence[int], position: int, layer: int, n_layers: int, first: bool
) -> int:
    """First stage to recompute at this position, len(refreshes) if all masks are reused.

    Keyed by absolute position, spread over layers by the first stage's interval (DESIGN 6.3): each
    interval divides the one before, so a stage is due together with those before it and never
    because its input came at another time. The first decode step refreshes everything.
    """
    if first:
        return 0
    offset = layer * refreshes[0] // n_layers if refreshes else 0
    for stage, interval in enumerate(refreshes):
        if (position + offset) % interval == 0:
            return stage
    return len(refreshes)


def next_refresh(position: int, layer: int, n_layers: int, interval: int) -> int:
    """The next position after this one at which `refresh_level` is 0 in a layer whose first stage has this
    interval."""
    offset = layer * interval // n_layers
    return position + interval - (position + offset) % interval


def min_device_pages(policies: Sequence[LayerPolicy], page_tokens: int) -> int:
    """Smallest bank a row can run with: sink + window + the 8 pages of one group of blocks, and
    always the block being computed beside one group."""
    block_pages = -(-QUERY_BLOCK // page_tokens)
    kept = max(-(-p.sink // page_tokens) - (-p.window // page_tokens) for p in policies)
    return GROUP_PAGES + max(kept, block_pages + 1)


def rows_that_fit(device_pages: int, chunk_tokens: int, page_tokens: int, max_rows: int) -> int:
    """Rows that may run together: each pins its last page, which is not in the store yet."""
    spare = device_pages - GROUP_PAGES - -(-chunk_tokens // page_tokens)
    return max(1, min(max_rows, spare))
