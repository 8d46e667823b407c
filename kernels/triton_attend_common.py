"""What the attention kernels share: which keys a tile has, where they lie, one step of a softmax.

A tile is TILE keys of the sequence sinks, selected blocks, window, each padded to whole tiles: which
keys stand together is a function of the policy, the position and the selection, never of the batch.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ..core.stage import LayerPolicy
from .gpu_pages import DeviceMask
from .triton_common import NO_SCORE, load_halves, rotate, turn_of

TILE_KEYS = 64
TILE: tl.constexpr = tl.constexpr(TILE_KEYS)


def window_tiles(window: int) -> int:
    """Most tiles, aligned to absolute positions, that the window of one query touches."""
    return (window + TILE_KEYS - 2) // TILE_KEYS + 1 if window else 0


def part_sizes(policy: LayerPolicy, mask: DeviceMask | None) -> dict[str, int | bool]:
    """A policy as constants of a kernel; those of a dense one are of no use but DENSE. Raises ValueError
    if only one of policy and mask selects, or if the mask has room for more blocks than it keeps."""
    if policy.dense != (mask is None):
        raise ValueError("a pruning policy needs a mask, and a dense one has none")
    sizes = {"SINK": policy.sink, "WINDOW": policy.window, "BLOCK": 1, "KEEP": 0, "LISTS": 1}
    if mask is not None:
        sizes["BLOCK"], sizes["KEEP"] = policy.block_tokens, policy.stages[-1].keep
        sizes["LISTS"] = mask.n_lists
        if mask.blocks.shape[2] * policy.block_tokens > policy.stages[-1].keep:
            raise ValueError(
                f"the mask has room for {mask.blocks.shape[2]} blocks of {policy.block_tokens} tokens, "
                f"the policy keeps only {policy.stages[-1].keep} tokens"
            )
    return {**sizes, "STREAMING": policy.attend_rope == "streaming", "DENSE": policy.dense}


@triton.jit
def rows_of(
    address, page_ids, kv_head, n_page_ids, token, live, PAGE_TOKENS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):  # fmt: skip
    """int64 [N]: addresses of the stored keys of tokens (int32 [N]); a value lies PAGE_TOKENS * ROW_BYTES
    behind its key. page_ids: of the row that the tokens belong to. Where not live nothing is read."""
    page = tl.load(page_ids + token // PAGE_TOKENS, mask=live, other=0).to(tl.int64)
    leaf = tl.load(address + kv_head.to(tl.int64) * n_page_ids + page, mask=live, other=0)
    return leaf + token % PAGE_TOKENS * ROW_BYTES


@triton.jit
def base_of(first, n_blocks, SINK: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """First position of the renumbered sequence, streaming (section 4, "ST exactly")."""
    return tl.maximum(0, first - WINDOW - SINK - n_blocks * BLOCK + 1)


@triton.jit
def keys_of(
    tile, n_sink, n_selected, first, last, base, blocks, n_blocks, SINK: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, STREAMING: tl.constexpr,
):  # fmt: skip
    """Keys of a tile for queries at [first, last], as `reference.attended_keys`.

    n_sink, n_selected: tiles of the parts before the window. Returns tokens and positions int32 [TILE],
    whether any of the queries may see them, and whether the tile belongs to the window.
    """
    lane = tl.arange(0, TILE)
    is_sink = tile < n_sink
    in_window = tile >= n_sink + n_selected
    sink = tile * TILE + lane
    index = (tile - n_sink) * TILE + lane
    rank = index // BLOCK
    chosen = (index >= 0) & (rank < n_blocks) & (tile < n_sink + n_selected)
    selected = tl.load(blocks + rank, mask=chosen, other=0) + index % BLOCK
    window = tl.maximum(0, first - WINDOW + 1) // TILE * TILE
    window += (tile - n_sink - n_selected) * TILE + lane
    token = tl.where(is_sink, sink, tl.where(in_window, window, selected))
    kept = tl.where(is_sink, sink < SINK, chosen & (selected >= SINK))
    near = (token > first - WINDOW) & (token <= last)
    live = tl.where(in_window, near, kept & (token <= last - WINDOW))
    position = token
    if STREAMING:
        old = tl.where(is_sink, base + sink, base + SINK + index)
        position = tl.where(in_window, window, old)
    return token, position, live, in_window


@triton.jit
def load_turned(
    row, distance, live, column, HALF: tl.constexpr, KIND: tl.constexpr, fine_cos, fine_sin,
    coarse_cos, coarse_sin,
):  # fmt: skip
    """Stored keys, turned by their distances int32 [N]: two halves, float32 [N, BLOCK_HALF]."""
    first, second = load_halves(row, live, column, HALF, KIND)
    cos, sin = turn_of(distance, live, column, HALF, fine_cos, fine_sin, coarse_cos, coarse_sin)
    return rotate(first, second, cos, sin)


@triton.jit
def weigh(q1, q2, k1, k2, seen, to_log2, best, total, PRECISION: tl.constexpr):
    """Weights of a tile, in an online softmax of base 2 that is not normalised.

    q1, q2, k1, k2: halves [R or TILE, BLOCK_HALF]; seen: [R, TILE]; to_log2: factor of the dot products.
    Returns weights [R, TILE], the factor [R] of what was summed before, largest logit and total [R]. A
    visible NaN never enters the largest but reaches the total and the sums, so that it shows.
    """
    score = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    score = tl.dot(q2, tl.trans(k2), score, input_precision=PRECISION)
    score = tl.where(seen, score * to_log2, NO_SCORE)
    most = tl.maximum(best, tl.max(tl.where(score == score, score, NO_SCORE), 1))
    # of a row that has seen nothing yet the difference is 0, not -inf: hence the mask
    weight = tl.where(seen, tl.exp2(score - most[:, None]), 0.0)
    fade = tl.exp2(best - most)
    return weight, fade, most, total * fade + tl.sum(weight, 1)


@triton.jit
def add_values(weight, fade, v1, v2, out1, out2, PRECISION: tl.constexpr):
    """Sums of weighted values [R, BLOCK_HALF], two halves."""
    out1 = tl.dot(weight, v1, out1 * fade[:, None], input_precision=PRECISION)
    out2 = tl.dot(weight, v2, out2 * fade[:, None], input_precision=PRECISION)
    return out1, out2
