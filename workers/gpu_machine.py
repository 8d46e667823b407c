"""The GPU and the host memory that are here, or those that somebody thinks of buying."""

from __future__ import annotations

import os

import torch

from .gpu_estimate import GpuMachine

USUAL_DEVICE_BYTES = 80_000_000_000
"""Of the GPU that is assumed where there is none."""


def machine_of(device_gib: float = 0.0, host_gib: float = 0.0) -> GpuMachine:
    """Sizes given in GiB win over what is here; without a GPU one of 80 GB is assumed."""
    device_bytes = int(device_gib * 2**30)
    if not device_bytes and torch.cuda.is_available():
        device_bytes = int(
            torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        )
    host_bytes = int(host_gib * 2**30)
    if not host_bytes:
        host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return GpuMachine(device_bytes or USUAL_DEVICE_BYTES, host_bytes)
