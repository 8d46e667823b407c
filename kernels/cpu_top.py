"""The best chunks of every list, in numba: `selection.reduce_heads` and `selection.top_chunks` at once.

A radix selection: scores become integers of the same order, their bytes are counted from the highest
down to find the least that is kept, and what is above it is taken in the order of the list.
"""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu_compile import compiled
from .cpu_pool import POOL

_BYTES = 4
_BUCKETS = 256


def top_chunks(starts: Tensor, scores: Tensor, n_keep: int) -> Tensor:
    """starts: int64 [Hsel, n] padded with -1; scores: float32 [Hkv, n], Hsel 1 or Hkv. Returns int64
    [Hsel, <= n_keep] ascending, padded with -1; equal scores go to the lower index, NaN is best."""
    n_lists, n_chunks = starts.shape
    kept = torch.empty(n_lists, min(n_keep, n_chunks), dtype=torch.int64)
    with POOL.lock:
        keys = POOL.shared("top", (n_chunks,), np.int32)
        counts = POOL.shared("top-counts", (_BUCKETS,), np.int64)
        _top(np.ascontiguousarray(starts.numpy()), scores.numpy(), kept.numpy(), keys, counts)
    return kept


@compiled
def _top(starts, scores, kept, keys, counts):
    n_lists, n_chunks = starts.shape
    n_heads, n_keep = scores.shape[0], kept.shape[1]
    bits = scores.view(np.int32)
    for row in range(n_lists):
        first, last = (0, n_heads) if n_lists == 1 else (row, row + 1)
        for c in range(n_chunks):
            best = np.int32(-0x7F800001)  # the key of -inf
            if starts[row, c] >= 0:
                for h in range(first, last):
                    best = max(best, _key(bits[h, c]))
            keys[c] = best
        least, room = _least(keys, n_chunks, n_keep, counts)
        n = 0
        for c in range(n_chunks):
            if keys[c] > least:
                kept[row, n] = starts[row, c]
                n += 1
            elif keys[c] == least and room > 0:
                kept[row, n] = starts[row, c]
                n += 1
                room -= 1


@compiled
def _key(bits):
    """An int32 that is ordered as the float32 of these bits: zeros are equal, NaN is the greatest."""
    magnitude = bits & np.int32(0x7FFFFFFF)
    if magnitude > np.int32(0x7F800000):
        return np.int32(0x7F800001)
    if magnitude == 0:
        return np.int32(0)
    return np.int32(-magnitude - 1) if bits < 0 else magnitude


@compiled
def _least(keys, n, n_keep, counts):
    """The n_keep-th greatest key, and how many keys equal to it are kept."""
    room = n_keep
    least = np.int64(0)
    for i in range(_BYTES):
        shift = 8 * (_BYTES - 1 - i)
        counts[:] = 0
        for c in range(n):
            # from 0 up, so that bytes are ordered as the keys are
            x = np.int64(keys[c]) + np.int64(0x80000000)
            if x >> (shift + 8) == least:
                counts[(x >> shift) & 0xFF] += 1
        bucket = _BUCKETS - 1
        while counts[bucket] < room:
            room -= counts[bucket]
            bucket -= 1
        least = (least << 8) | bucket
    return least - np.int64(0x80000000), room
