"""Worker threads and scratch of the numba kernels: one parallel kernel at a time in a process.

Plain threads that run compiled code without the interpreter lock. Between kernels a helper looks for
work for a moment, giving its core away at each look, and then sleeps: decode runs hundreds of
kernels a token, and waking a sleeper for each costs as much as the kernel. (A pool that spins
without giving way, as OpenMP does, is fatal on shared cores: measured with another process busy,
71 ms for a 4 ms kernel.) Tasks are taken by ticket, so a thread that comes late costs nothing.
Scratch is kept between calls, because fresh megabytes cost page faults.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .cpu_wait import FAILED, LEFT, wait_until

SHARED_BYTES = 1 << 20
"""Weights below this are read by the calling thread alone: waking another costs more."""
LOOKS = 300
"""Looks of a helper for its next job, and of the caller for the helpers' end, before they sleep."""


class _Job:
    """One kernel for one helper: whoever takes the token decides whether it runs."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.token = [True]
        self.done = threading.Semaphore(0)
        self.error: BaseException | None = None

    def claim(self) -> bool:
        try:
            return self.token.pop()
        except IndexError:
            return False


class _Helper:
    """A thread and the one job handed to it last; earlier ones have ended or were taken back."""

    def __init__(self) -> None:
        self._job: _Job | None = None
        self._n_handed = np.zeros(1, dtype=np.int64)
        self._asleep = False
        self._wake = threading.Semaphore(0)
        threading.Thread(target=self._serve, name="kernel", daemon=True).start()

    def hand(self, job: _Job) -> None:
        self._job = job
        self._n_handed[0] += 1
        # after the number: a helper says it sleeps before it looks at the number a last time
        if self._asleep:
            self._asleep = False
            self._wake.release()

    def _serve(self) -> None:
        n_seen = 0
        while True:
            if not wait_until(self._n_handed.ctypes.data, n_seen + 1, LOOKS):
                self._asleep = True
                if self._n_handed[0] == n_seen:
                    self._wake.acquire()
                self._asleep = False
                continue
            n_seen = int(self._n_handed[0])
            job = self._job
            if job is None or not job.claim():
                continue
            try:
                job.work()
            except BaseException as exc:  # handed to the caller, which raises it
                job.error = exc
            finally:
                job.done.release()


class Pool:
    """Helpers beside the calling thread; as many workers as torch has threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while a kernel runs and its scratch is in use."""
        self._helpers: list[_Helper] = []
        self._scratch: dict[str, np.ndarray] = {}

    @property
    def n_workers(self) -> int:
        return torch.get_num_threads()

    def run(self, worker: Callable[..., None], arguments: Sequence[Any], n_tasks: int,
            scratch: Sequence[np.ndarray] = ()) -> bool:  # fmt: skip
        """Call worker(state, n_tasks, *arguments, *(s[w] for s in scratch)) on every thread w.

        state: int64 [3]: next ticket, failure flag, workers that called `leave`. Returns the flag.
        Under `lock`.
        """
        state = np.zeros(3, dtype=np.int64)
        n_workers = max(1, min(self.n_workers, n_tasks))
        while len(self._helpers) < n_workers - 1:
            self._helpers.append(_Helper())
        jobs = []
        for w in range(1, n_workers):
            mine = tuple(s[w] for s in scratch)
            job = _Job(lambda mine=mine: worker(state, n_tasks, *arguments, *mine))  # type: ignore[misc]
            self._helpers[w - 1].hand(job)
            jobs.append(job)
        n_mine = 0
        try:
            worker(state, n_tasks, *arguments, *(s[0] for s in scratch))
            n_mine = 1
        finally:
            running = [job for job in jobs if not job.claim()]
            # a worker that raises never leaves: its job says so
            if not wait_until(state.ctypes.data + 8 * LEFT, n_mine + len(running), LOOKS):
                for job in running:
                    job.done.acquire()
        for job in running:
            if job.error is not None:
                raise job.error
        return bool(state[FAILED])

    def scratch(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """A kept buffer [n_workers, *shape] with old contents. Under `lock`."""
        return self.shared(name, (self.n_workers, *shape), dtype)

    def shared(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """A kept buffer for all workers, with old contents. Under `lock`."""
        n_items = math.prod(shape)
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < n_items or buffer.dtype != dtype:
            buffer = np.zeros(n_items, dtype=dtype)
            self._scratch[name] = buffer
        return buffer[:n_items].reshape(shape)


POOL = Pool()
