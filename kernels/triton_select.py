"""Reduction over heads, exact selection of the best chunks and the step to the next stage, on the device:
`score._reduce`, `selection.reduce_heads`, `top_chunks` and `split_chunks`.

The best are found by their numbers of `ordered`, eight bits a pass: a histogram tells in which of 256 ranges
the last kept score lies. Equal scores go to the lower index. Kept chunks are written in ascending order, so
nothing is sorted.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import Stage
from .gpu_pages import DeviceScratch
from .triton_common import ordered
from .triton_lists import StageLists, as_score, best_of, log_sum, open_list, start_of

TILE = 4096
"""Scores that the selecting program reads at once, at most."""
REDUCE_TILE = 128
"""Chunks of one program of the reduction."""


def reduce_scores(
    scores: Tensor, ends: Tensor | None, lists: StageLists, scale: float, scratch: DeviceScratch
) -> Tensor:
    """The best of the rows of each list: float32 [R, Hsel, most]; scores itself if each list has one row.

    scores: [R, n, most], n rows shared out evenly over the lists. ends: [R, n, splits, 2] of the softmax of
    each row, whose logarithms of shares are compared then: nothing underflows.
    """
    n_rows, n, most = scores.shape
    n_lists: int = lists.constants["LISTS"]
    if n == n_lists and ends is None:
        return scores
    out = scratch.take("select.reduced", (n_rows, n_lists, most))
    splits = 1 if ends is None else ends.shape[2]
    _reduce_kernel[(-(-most // REDUCE_TILE), n_lists, n_rows)](
        scores, scores if ends is None else ends, out, lists.q_start, lists.fresh, lists.n_starts,
        lists.offset, scale, LEAST=lists.least, SOFTMAX=ends is not None, SPLITS=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits), ROWS=n // n_lists,
        BLOCK_ROWS=triton.next_power_of_2(n // n_lists), BLOCK=REDUCE_TILE, num_warps=4,
        **lists.constants,
    )  # fmt: skip
    return out


def keep_best(
    scores: Tensor,
    lists: StageLists,
    stage: Stage,
    child: int,
    kept: Tensor,
    n_kept: Tensor,
    scale: float,
) -> None:
    """Write the best chunks of every list that is due, ascending, or their children, and how many.

    scores: float32 [R, Hsel, most] of `reduce_scores`. child: tokens of the next stage's chunks; those that
    begin at or beyond the end of the candidates are dropped. The last stage has child == stage.chunk.
    kept: int32 [R, Hsel, at least keep / child]; n_kept: int32 [R, Hsel]. scale: scores times scale are the
    logarithms of shares but for a constant (used with top_p alone). Lists that are not due stay as they are.
    """
    n_rows, n_lists, most = scores.shape
    tile = min(1024 if stage.top_p is not None else TILE, max(16, triton.next_power_of_2(most)))
    _keep_kernel[(n_lists, n_rows)](
        scores, kept, n_kept, lists.q_start, lists.fresh, lists.starts, lists.n_starts, lists.offset,
        scale, 1.0 if stage.top_p is None else stage.top_p, ADAPTIVE=stage.top_p is not None,
        KEEP=stage.keep // stage.chunk, CHILD=child, PER_ROW=kept.shape[2], BLOCK=tile,
        num_warps=8 if tile >= 1024 else max(1, tile // 256), **lists.constants,
    )  # fmt: skip


@triton.jit(do_not_specialize=["offset"])
def _reduce_kernel(
    scores, ends, out, q_start, fresh, n_starts, offset, scale, LEAST: tl.constexpr,
    SOFTMAX: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr,
    OVERLAP: tl.constexpr, CHUNK: tl.constexpr, REFRESH: tl.constexpr, LISTS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Program (tile of chunks, list, row)."""
    tile, which, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _position, _end, n = open_list(
        row, which, q_start, fresh, n_starts, offset, FIRST, SINK, OVERLAP, CHUNK, REFRESH, LISTS, MOST
    )  # fmt: skip
    if (n <= LEAST) | (tile * BLOCK >= n):
        return
    index = tile * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, BLOCK_ROWS)
    mine = (row.to(tl.int64) * LISTS + which) * ROWS + i
    live = (i < ROWS)[:, None] & (index < n)[None, :]
    s = tl.load(scores + (mine * MOST)[:, None] + index[None, :], mask=live, other=0.0)
    if SOFTMAX:
        s = s * scale - log_sum(ends, mine, i < ROWS, SPLITS, BLOCK_SPLITS)[:, None]
    to = out + (row.to(tl.int64) * LISTS + which) * MOST + index
    tl.store(to, as_score(best_of(s, live, 0)), mask=index < n)


@triton.jit
def _number_to_keep(mine, n, scale, top_p, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the best chunks have shares that reach top_p, at least 1 and at most KEEP.

    The score of the last of them is found four bits a pass, by the shares in each of 16 ranges.
    """
    most = tl.full([], -1.0e30, tl.float32)
    for at in range(0, n, BLOCK):
        index = at + tl.arange(0, BLOCK)
        s = tl.load(mine + index, mask=index < n, other=float("-inf")) * scale
        most = tl.maximum(most, tl.max(s, axis=0))
    total = tl.zeros([], tl.float32)
    for at in range(0, n, BLOCK):
        index = at + tl.arange(0, BLOCK)
        s = tl.load(mine + index, mask=index < n, other=float("-inf")) * scale
        total += tl.sum(tl.exp(s - most), axis=0)
    target = total * top_p
    bins = tl.arange(0, 16)
    found, done = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    above, n_above = tl.zeros([], tl.float32), tl.zeros([], tl.int32)
    equal, n_equal = tl.zeros([], tl.float32), tl.zeros([], tl.int32)
    for step in range(8):
        shift = 28 - 4 * step
        shares, counts = tl.zeros([16], tl.float32), tl.zeros([16], tl.int32)
        for at in range(0, n, BLOCK):
            index = at + tl.arange(0, BLOCK)
            s = tl.load(mine + index, mask=index < n, other=float("-inf"))
            digits, live = _digits(s, index < n, found, done, shift, 15)
            here = (digits[:, None] == bins[None, :]) & live[:, None]
            share = tl.exp(s * scale - most)
            shares += tl.sum(tl.where(here, share[:, None], 0.0), axis=0)
            counts += tl.sum(here.to(tl.int32), axis=0)
        reached = above + tl.cumsum(shares, axis=0, reverse=True) >= target
        digit = tl.max(tl.where(reached & (counts > 0), bins, -1), axis=0)
        # sums in another order may miss the target by a rounding: the lowest that there is
        lowest = tl.min(tl.where(counts > 0, bins, 15), axis=0)
        digit = tl.where(digit < 0, lowest, digit)
        above += tl.sum(tl.where(bins > digit, shares, 0.0), axis=0)
        n_above += tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        equal = tl.sum(tl.where(bins == digit, shares, 0.0), axis=0)
        n_equal = tl.sum(tl.where(bins == digit, counts, 0), axis=0)
        found = found | (digit << shift)
        done = done | ((digit * 0 + 15) << shift)
    # all that are left have the same score
    one = equal / tl.maximum(n_equal, 1).to(tl.float32)
    room = tl.ceil((target - above) / tl.where(one > 0.0, one, 1.0))
    n_last = tl.minimum(tl.maximum(room, 1.0), n_equal.to(tl.float32)).to(tl.int32)
    # no number among the scores: it alone is kept
    n_keep = tl.where(total == total, n_above + n_last, 1)
    return tl.minimum(tl.maximum(n_keep, 1), KEEP)


@triton.jit
def _digits(score, live, found, done, shift, MOST_DIGIT: tl.constexpr):
    """The bits from shift on of scores' numbers, counted from the smallest, and which of them agree with the
    bits that are found so far (those set in done)."""
    bits = ordered(score) ^ -2147483648
    return (bits >> shift) & MOST_DIGIT, live & ((bits & done) == found)


@triton.jit(do_not_specialize=["offset"])
def _keep_kernel(
    scores, kept, n_kept, q_start, fresh, starts, n_starts, offset, scale, top_p,
    ADAPTIVE: tl.constexpr, KEEP: tl.constexpr, CHILD: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr, OVERLAP: tl.constexpr,
    CHUNK: tl.constexpr, REFRESH: tl.constexpr, LISTS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Program (list, row)."""
    which, row = tl.program_id(0), tl.program_id(1)
    _position, end, n = open_list(
        row, which, q_start, fresh, n_starts, offset, FIRST, SINK, OVERLAP, CHUNK, REFRESH, LISTS, MOST
    )  # fmt: skip
    if n < 0:
        return
    mine = scores + (row.to(tl.int64) * LISTS + which) * MOST
    n_keep = tl.zeros([], tl.int32) + KEEP
    if ADAPTIVE:
        n_keep = _number_to_keep(mine, n, scale, top_p, KEEP, BLOCK)
    least = tl.full([], -2147483648, tl.int32)
    room = n
    if n > n_keep:
        # the score of the last that is kept, and how many of that score are
        bins = tl.arange(0, 256)
        found, done = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
        room = n_keep
        for step in range(4):
            shift = 24 - 8 * step
            counts = tl.zeros([256], tl.int32)
            for at in range(0, n, BLOCK):
                index = at + tl.arange(0, BLOCK)
                s = tl.load(mine + index, mask=index < n, other=0.0)
                digits, live = _digits(s, index < n, found, done, shift, 255)
                counts += tl.histogram(digits, 256, mask=live)
            at_least = tl.cumsum(counts, axis=0, reverse=True)
            digit = tl.sum((at_least >= room).to(tl.int32), axis=0) - 1
            room -= tl.sum(tl.where(bins > digit, counts, 0), axis=0)
            found = found | (digit << shift)
            done = done | ((digit * 0 + 255) << shift)
        least = found ^ -2147483648
    begins = starts + (row * LISTS + which) * MOST
    to = kept + (row.to(tl.int64) * LISTS + which) * PER_ROW
    n_done, n_equal, n_written = (
        tl.zeros([], tl.int32),
        tl.zeros([], tl.int32),
        tl.zeros([], tl.int32),
    )
    for at in range(0, n, BLOCK):
        index = at + tl.arange(0, BLOCK)
        live = index < n
        key = ordered(tl.load(mine + index, mask=live, other=0.0))
        same = live & (key == least)
        rank = n_equal + tl.cumsum(same.to(tl.int32), axis=0)
        keep = (live & (key > least)) | (same & (rank <= room))
        place = n_done + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        start = start_of(index, live, begins, FIRST, SINK, CHUNK)
        # children of the last chunk alone are dropped, so places of the others stay
        for step in tl.static_range(CHUNK // CHILD):
            token = start + step * CHILD
            good = keep
            if CHILD != CHUNK:
                good = keep & (token < end)
            tl.store(to + place * (CHUNK // CHILD) + step, token, mask=good)
            n_written += tl.sum(good.to(tl.int32), axis=0)
        n_done += tl.sum(keep.to(tl.int32), axis=0)
        n_equal += tl.sum(same.to(tl.int32), axis=0)
    tl.store(n_kept + row * LISTS + which, n_written)
