"""A service for the transport's tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from longreach.core.errors import InvalidInput, StoreFull
from longreach.kvstore.transport import Reply


class Hooked:
    """An iterator that waits for ever unless its cancel hook is called."""

    def __init__(self, service: EchoService) -> None:
        self._cancelled = threading.Event()
        self._service = service
        self._sent = False

    def __iter__(self) -> Iterator[Reply]:
        return self

    def __next__(self) -> Reply:
        if not self._sent:
            self._sent = True
            return Reply({"i": 0})
        self._cancelled.wait()
        raise StopIteration

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self._service.closed.set()


class EchoService:
    """Does what the method's name says."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.n_made = 0
        self.release = threading.Event()
        self.n_handled = 0

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        self.n_handled += 1
        if method == "echo":
            return Reply(header, buffers)
        if method == "sum":
            return Reply({"sum": int(sum(np.frombuffer(b, np.uint8).sum() for b in buffers))})
        if method == "fail":
            raise StoreFull("9 of 9 slots are pinned", slots=9)
        if method == "bug":
            raise KeyError("secret")
        if method == "unsendable":
            return Reply({"x": object()})
        if method == "wait":
            self.release.wait(float(header.get("seconds", 30.0)))
            return Reply({"waited": True})
        if method == "count":
            return self._count(header["n"], header.get("pause_s", 0.0), header.get("nbytes", 0))
        if method == "count_then_fail":
            return self._count_then_fail(header["n"])
        if method == "hooked":
            return Hooked(self)
        raise InvalidInput(f"no method {method!r}")

    def _count(self, n: int, pause_s: float, nbytes: int) -> Iterator[Reply]:
        try:
            for i in range(n):
                if pause_s and i:
                    time.sleep(pause_s)
                self.n_made += 1
                yield Reply({"i": i}, [bytes([i % 256]) * nbytes] if nbytes else [])
        finally:
            self.closed.set()

    def _count_then_fail(self, n: int) -> Iterator[Reply]:
        for i in range(n):
            yield Reply({"i": i})
        raise StoreFull("no more")
