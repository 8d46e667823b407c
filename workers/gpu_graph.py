"""One CUDA graph per size of batch: a decode step is one launch for the host."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

_log = logging.getLogger(__name__)

WARM_UPS = 2
"""Steps run before a capture: kernels are compiled and scratch is made outside of it."""


def bucket_of(n: int, most: int) -> int:
    """Size of the graph for n rows: the next power of two, at most `most`."""
    size = 1
    while size < n:
        size *= 2
    return min(size, most)


class StepGraphs:
    """Runs `body(size)`, which reads and writes fixed tensors only: on CUDA by replaying what was captured
    of it, elsewhere (and with `enabled` off, for debugging) by calling it."""

    def __init__(self, body: Callable[[int], None], most: int, device: torch.device, enabled: bool):
        self._body = body
        self._most = most
        self._captures = enabled and device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: object | None = None

    @property
    def sizes(self) -> Sequence[int]:
        """Sizes captured so far."""
        return sorted(self._graphs)

    def run(self, n: int) -> None:
        """One step for the first n places of the batch."""
        size = bucket_of(n, self._most)
        if not self._captures:
            self._body(size)
            return
        graph = self._graphs.get(size)
        if graph is None:
            # the step is taken by the warm-up, whose effects on pages a second run repeats exactly
            self._capture(size)
        else:
            graph.replay()

    def _capture(self, size: int) -> None:
        started = time.monotonic()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._body(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
            self._body(size)
        self._pool = self._pool or graph.pool()
        self._graphs[size] = graph
        _log.info("captured a decode step of %d rows in %.1f s", size, time.monotonic() - started)
