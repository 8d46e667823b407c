"""Operations on a device: the one place the engine imports the Triton kernels from. Importing this needs
Triton; `ops.py` does not."""

from __future__ import annotations

from .gpu_select import select_device
from .triton_append import append_chunk_device, append_device
from .triton_attend import attend_decode
from .triton_gather import promote
from .triton_place import forget
from .triton_prefill import QUERY_BLOCKS, attend_prefill
from .triton_residency import update_residency
from .triton_step import begin_step, schedule_of
from .triton_summaries import summarise_decoded, summarise_range

LEAST_QUERIES = min(QUERY_BLOCKS)
"""Queries of the smallest tile of prefill; a smaller block leaves part of one empty."""

__all__ = [
    "LEAST_QUERIES",
    "append_chunk_device",
    "append_device",
    "attend_decode",
    "attend_prefill",
    "begin_step",
    "forget",
    "promote",
    "schedule_of",
    "select_device",
    "summarise_decoded",
    "summarise_range",
    "update_residency",
]
