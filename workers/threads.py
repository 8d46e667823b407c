"""One thread setting for torch and our kernels, and an allocator that keeps its large blocks."""

from __future__ import annotations

import ctypes
import os

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def use_threads(n_threads: int, *, keep_blocks: bool = True) -> int:
    """Threads of this process' arithmetic; 0 takes the cores it may run on. Returns the number.

    keep_blocks: `keep_large_blocks`, else `return_large_blocks`.
    """
    n_threads = n_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    if keep_blocks:
        keep_large_blocks()
    else:
        return_large_blocks()
    return n_threads


def keep_large_blocks() -> None:
    """Ask glibc to reuse freed megabytes: fresh ones page-fault, which cost 5 times the arithmetic."""
    _mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    _mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_large_blocks() -> None:
    """Ask glibc to give freed megabytes back at once. Training has large tensors of many sizes, between which
    kept memory is lost: as much again as what is in use, for a tenth of the time."""
    _mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _mallopt(parameter: int, value: int) -> None:
    try:
        ctypes.CDLL("libc.so.6").mallopt(parameter, value)
    except (OSError, AttributeError):
        # another C library: correct as it is, only slower or larger
        return
