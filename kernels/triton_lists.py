"""What the kernels of one selection stage share: which chunks enter it, where chunks and queries stand,
and scores as numbers that order.

A row is a decoded row of a batch or a block of queries in prefill. A list is what one row selects from:
one for all heads, or one per KV head.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import QUERY_BLOCK, LayerPolicy
from .gpu_pages import DeviceAngles, DeviceMask, DevicePages
from .selection import overlap_window
from .triton_common import is_due, ordered

FIXED: tl.constexpr = tl.constexpr(0)
CHUNK_INDEXED: tl.constexpr = tl.constexpr(1)
CLAMPED: tl.constexpr = tl.constexpr(2)
STREAMING: tl.constexpr = tl.constexpr(3)
TRUE: tl.constexpr = tl.constexpr(4)
"""Styles of positions, see `selection.stage_positions`. FIXED is relative: all keys at one distance. From
STREAMING on keys advance inside a chunk."""
BLOCK_64: tl.constexpr = tl.constexpr(QUERY_BLOCK)
STYLES = {"relative": 0, "chunk-indexed": 1, "clamped": 2, "streaming": 3, "none": 4}
MOST_SPLITS = 64
"""Programs that share the chunks of one list, at most."""


@dataclass(frozen=True)
class StageLists:
    """One stage of one layer: the rows, the lists that enter it, and what is known of them beforehand."""

    q_start: Tensor
    """int64 [R]: position of the row's first query, -1 = empty place."""
    n_queries: Tensor | None
    """int32 [R], or None: every row has as many as q."""
    fresh: Tensor
    """int32 [R]: 1 = the stage is due whatever the position."""
    starts: Tensor
    """int32 [R, Hsel, most] chunk starts, and n_starts int32 [R, Hsel]; any tensors for the first stage,
    which takes all chunks of its grid."""
    n_starts: Tensor
    offset: int
    """Of the layer's refreshes."""
    most: int
    """Chunks of a list, at most."""
    constants: dict[str, Any]
    """Sizes that `open_list` and `start_of` are compiled for."""
    least: int
    """Lists of at most so many chunks are kept whole and never scored."""
    span: int
    """`select_span` of the policy."""

    @classmethod
    def of(
        cls,
        policy: LayerPolicy,
        index: int,
        mask: DeviceMask,
        q_start: Tensor,
        n_queries: Tensor | None,
        fresh: Tensor,
        offset: int,
        most_tokens: int,
    ) -> StageLists:
        """Of a policy's stage. most_tokens: longest context."""
        stage = policy.stages[index]
        first = index == 0
        if first:
            most = max(1, -(-(most_tokens - policy.sink) // stage.chunk))
            starts, n_starts = mask.n_blocks, mask.n_blocks
        else:
            starts, n_starts = mask.inputs[index - 1], mask.n_inputs[index - 1]
            most = starts.shape[2]
        constants = {
            "FIRST": first,
            "SINK": policy.sink,
            "OVERLAP": overlap_window(policy),
            "CHUNK": stage.chunk,
            "REFRESH": stage.refresh,
            "LISTS": mask.n_lists,
            "MOST": most,
        }
        least = 0 if stage.top_p is not None else stage.keep // stage.chunk
        return cls(
            q_start,
            n_queries,
            fresh,
            starts,
            n_starts,
            offset,
            most,
            constants,
            least,
            policy.select_span,
        )

    def splits(self, tile: int) -> int:
        """Programs that share a list in tiles of so many chunks. Not a function of the batch, so that sums
        have the same order in company."""
        return min(MOST_SPLITS, -(-self.most // tile))


def check_reach(angles: DeviceAngles, most_tokens: int) -> None:
    """Raises ValueError if a context is longer than the tables of angles reach."""
    if angles.n_distances < most_tokens:
        raise ValueError(f"angles reach {angles.n_distances} distances, less than {most_tokens}")


def page_arguments(pages: DevicePages, page_row: Tensor | None) -> tuple[Any, ...]:
    """address, its row length, page ids, their row length, the rows of page ids."""
    return (
        pages.address,
        pages.address.shape[1],
        pages.pages,
        pages.pages.shape[1],
        pages.pages if page_row is None else page_row,
    )


def half_block(head_dim: int) -> int:
    """Columns of a block of half a head: a power of two, at least 16 as products of matrices need."""
    n: int = triton.next_power_of_2(max(16, head_dim // 2))
    return n


def rows_of(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    """x itself. Raises ValueError unless it is contiguous with that shape and dtype."""
    if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"{what} must be contiguous {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}"
        )
    return x


@triton.jit
def open_list(
    row, which, q_start, fresh, n_starts, offset,
    FIRST: tl.constexpr, SINK: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr,
    REFRESH: tl.constexpr, LISTS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Position of a row's first query, end of its candidates, and chunks in its list: -1 if not due."""
    at = tl.load(q_start + row)
    due = is_due(at, tl.load(fresh + row), offset, REFRESH)
    position = at.to(tl.int32)
    end = tl.maximum(position - OVERLAP, SINK)
    if FIRST:
        n = tl.minimum((end - SINK + CHUNK - 1) // CHUNK, MOST)
    else:
        n = tl.minimum(tl.load(n_starts + row * LISTS + which), MOST)
    return position, end, tl.where(due, n, -1)


@triton.jit
def start_of(index, live, mine, FIRST: tl.constexpr, SINK: tl.constexpr, CHUNK: tl.constexpr):
    """First token of chunks, or of one chunk. mine: where the list of starts begins."""
    if FIRST:
        return SINK + index * CHUNK
    else:
        return tl.load(mine + index, mask=live, other=0)


@triton.jit
def streaming_base(n, end, mine, FIRST: tl.constexpr, SINK: tl.constexpr, CHUNK: tl.constexpr):
    """Position of the first entering token: the last one stands before `end`, all chunks but the last are
    whole."""
    last = start_of(n - 1, n > 0, mine, FIRST, SINK, CHUNK)
    return end - n * CHUNK + tl.maximum(last + CHUNK - end, 0)


@triton.jit
def distance_of(
    index, start, position, n, end, base,
    STYLE: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr,
):  # fmt: skip
    """How far a chunk stands behind the row's first query; where keys advance inside it, its first token
    or its middle one. base: of `streaming_base`."""
    if STYLE == CHUNK_INDEXED:
        return tl.minimum(position, n + OVERLAP) - index
    elif STYLE == STREAMING:
        inside = tl.minimum(end - start, CHUNK) // 2 if MIDDLE else 0
        return position - base - index * CHUNK - inside
    elif STYLE == CLAMPED:
        whole = start // BLOCK_64 * BLOCK_64 + BLOCK_64 // 2
        middle = whole if CHUNK < BLOCK_64 else start + CHUNK // 2
        return position - tl.minimum(tl.maximum(middle, tl.maximum(position - SPAN, 0)), position)
    else:
        inside = tl.minimum(end - start, CHUNK) // 2 if MIDDLE else 0
        return position - start - inside


@triton.jit
def as_score(key):
    """The float32 of a number of `ordered`; its NaN is one."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def best_of(scores, live, axis: tl.constexpr):
    """Largest score along an axis as a number of `ordered`, so that NaN is not lost."""
    return tl.max(tl.where(live, ordered(scores), -2147483648), axis=axis)


@triton.jit
def add_tile(most, total, logits, live, axis: tl.constexpr):
    """Largest logit and sum of exponentials, with those of a tile added."""
    logits = tl.where(live, logits, -1.0e30)
    now = tl.maximum(most, tl.max(logits, axis=axis))
    grown = tl.exp(logits - tl.expand_dims(now, axis))
    return now, total * tl.exp(most - now) + tl.sum(tl.where(live, grown, 0.0), axis=axis)


@triton.jit
def log_sum(partial, rows, live, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """Logarithm of the sum of exponentials of rows [N], from what the programs of their lists left:
    partial float32 [rows, SPLITS, 2 (largest logit, sum below it)]."""
    split = tl.arange(0, BLOCK_SPLITS)
    at = partial + (rows[:, None] * SPLITS + split[None, :]) * 2
    mask = live[:, None] & (split < SPLITS)[None, :]
    most = tl.load(at, mask=mask, other=-1.0e30)
    total = tl.load(at + 1, mask=mask, other=0.0)
    top = tl.max(most, axis=1)
    return top + tl.log(tl.sum(total * tl.exp(most - top[:, None]), axis=1))
