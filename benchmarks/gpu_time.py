"""Time on a device: whole launches by events, many in a graph, so that the host is not in the figure."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(
    act: Callable[[], object], device: torch.device, *, repeats: int = 20, graph: bool = True
) -> float:
    """Median seconds of one call. On CUDA after two calls to warm up, replayed from a graph of one call
    where `graph`; on a CPU (the interpreter) one call, timed by the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        act()
        return time.perf_counter() - started
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        act()
        act()
    torch.cuda.current_stream().wait_stream(side)
    run = act
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            act()
        run = captured.replay
    laps = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        laps.append(first.elapsed_time(last) / 1e3)
    return sorted(laps)[len(laps) // 2]


def copy_rates(device: torch.device, n_bytes: int) -> dict[str, float]:
    """GB/s of a copy on the device (read and written bytes counted), and of copies across the link."""
    here = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    there = torch.zeros_like(here)
    host = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    moves = {
        "device_copy": (lambda: there.copy_(here), 2 * n_bytes),
        "host_to_device": (lambda: there.copy_(host, non_blocking=True), n_bytes),
        "device_to_host": (lambda: host.copy_(here, non_blocking=True), n_bytes),
    }
    rates = {}
    for name, (move, moved) in moves.items():
        rates[name] = round(moved / seconds_of(move, device, repeats=8, graph=False) / 1e9, 1)
    return rates
