"""New keys and values into their pages: the one place where KV is rounded to its stored format."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .paged import MOST_OF, RAW, pack

try:
    from . import cpu_append
    from .cpu_pages import KINDS
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_append = None  # type: ignore[assignment]


def append_tokens(
    leaves: Tensor, slots: np.ndarray, offsets: np.ndarray, k: Tensor, v: Tensor
) -> int:
    """Store tokens in pages, rounding to nearest even.

    leaves: [n_slots, 2, page_tokens, stored items] in the KV dtype, contiguous; slots: int64
    [Hkv, T], offsets: int64 [T], where each token goes; k, v: [Hkv, T, D] float32.
    Returns the first token with a number that is not finite once stored, or -1; the others are stored.
    """
    dtype = leaves.dtype
    if cpu_append is not None and dtype in KINDS and leaves.is_contiguous():
        # one compiled variant for all formats of bytes
        raw = leaves.view(torch.int8 if leaves.itemsize == 1 else RAW[dtype]).numpy()
        most = np.float32(MOST_OF[dtype])
        # contiguous, so that there is one compiled variant
        arrays = (np.ascontiguousarray(x) for x in (slots, offsets, k.detach(), v.detach()))
        return int(cpu_append.append(raw, KINDS[dtype], *arrays, most))
    return append_torch(leaves, slots, offsets, k, v)


def append_torch(
    leaves: Tensor, slots: np.ndarray, offsets: np.ndarray, k: Tensor, v: Tensor
) -> int:
    """`append_tokens` where numba is missing."""
    at, where = torch.from_numpy(slots), torch.from_numpy(offsets).expand(slots.shape)
    finite = torch.ones(len(offsets), dtype=torch.bool)
    for side, values in enumerate((k, v)):
        stored = pack(values, leaves.dtype)
        raw = RAW[leaves.dtype]
        leaves.view(raw)[at, side, where] = stored.view(raw)
        # of the values, since float8 would turn infinities into its largest number
        finite &= (values.abs() <= MOST_OF[leaves.dtype]).all(dim=2).all(dim=0)
    wrong = (~finite).nonzero()
    return int(wrong[0]) if len(wrong) else -1
