"""New keys and values into their pages: the one place where KV is rounded to its stored format,
token by token or, in int4c, when a block of 64 is full."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InternalError
from . import by_channel
from .paged import MOST_OF, RAW, pack

try:
    from . import cpu_append, cpu_seal
    from .cpu_pages import KINDS
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_append = cpu_seal = None  # type: ignore[assignment]


def append_tokens(
    leaves: Tensor, slots: np.ndarray, offsets: np.ndarray, k: Tensor, v: Tensor
) -> int:
    """Store tokens in pages, rounding to nearest even.

    leaves: [n_slots, 2, page_tokens, stored items] in the KV dtype, contiguous; slots: int64
    [Hkv, T], offsets: int64 [T], where each token goes; k, v: [Hkv, T, D] float32.
    Returns the first token with a number that is not finite once stored, or -1; the others are stored.
    """
    dtype = leaves.dtype
    if dtype == by_channel.DTYPE:
        raise InternalError("int4c stores blocks: seal_blocks, not append_tokens")
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


def seal_blocks(
    leaves: Tensor, slots: np.ndarray, blocks: np.ndarray, k: Tensor, v: Tensor
) -> None:
    """Store full blocks in pages of int4c.

    leaves: [n_slots, 2, page_tokens, stored items], contiguous; slots: int64 [Hkv, n], blocks: int64 [n],
    the leaf of each block and its number in the page; k, v: [Hkv, n * 64, D] float32, all of which
    `first_not_finite` has passed.
    """
    if cpu_seal is not None:
        raw = leaves.view(torch.int8).flatten(2).numpy()
        arrays = (np.ascontiguousarray(x) for x in (slots, blocks, k.detach(), v.detach()))
        cpu_seal.seal(raw, *arrays)
    else:
        seal_torch(leaves, slots, blocks, k, v)


def seal_torch(leaves: Tensor, slots: np.ndarray, blocks: np.ndarray, k: Tensor, v: Tensor) -> None:
    """`seal_blocks` where numba is missing."""
    block_nbytes = by_channel.BLOCK_TOKENS * leaves.itemsize * leaves.shape[3]
    raw = leaves.view(torch.uint8).flatten(2).unflatten(2, (-1, block_nbytes))
    at, where = torch.from_numpy(slots), torch.from_numpy(blocks).expand(slots.shape)
    k, v = (x.unflatten(1, (-1, by_channel.BLOCK_TOKENS)) for x in (k, v))
    raw[at, 0, where] = by_channel.pack_keys(k)
    raw[at, 1, where] = by_channel.pack_values(v).flatten(-2)


def first_not_finite(k: Tensor, v: Tensor, dtype: torch.dtype) -> int:
    """The first of tokens [Hkv, T, D] with a number that is not finite once stored, or -1."""
    most = MOST_OF[dtype]
    # in numpy: torch would wake its threads, which then spin beside our own
    fine = np.ones(k.shape[1], dtype=bool)
    for values in (k.detach().numpy(), v.detach().numpy()):
        fine &= (np.abs(values) <= most).all(axis=(0, 2))
    wrong = np.flatnonzero(~fine)
    return int(wrong[0]) if len(wrong) else -1
