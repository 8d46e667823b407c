"""Worker threads and scratch of the numba kernels: one parallel kernel at a time in a process.

Plain threads that run compiled code without the interpreter lock, and sleep between kernels. A
spinning pool (OpenMP) is faster to start but fatal on shared cores: measured with another process
busy, 71 ms for a 4 ms kernel. Tasks are taken by ticket, so a thread that wakes late costs nothing.
Scratch is kept between calls, because fresh megabytes cost page faults.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch


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


class Pool:
    """Helpers beside the calling thread; as many workers as torch has threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while a kernel runs and its scratch is in use."""
        self._queues: list[SimpleQueue[_Job]] = []
        self._scratch: dict[str, np.ndarray] = {}

    @property
    def n_workers(self) -> int:
        return torch.get_num_threads()

    def run(self, worker: Callable[..., None], arguments: Sequence[Any], n_tasks: int,
            scratch: Sequence[np.ndarray] = ()) -> bool:  # fmt: skip
        """Call worker(state, n_tasks, *arguments, *(s[w] for s in scratch)) on every thread w.

        state: int64 [2], the next ticket and a failure flag, which is returned. Under `lock`.
        """
        state = np.zeros(2, dtype=np.int64)
        n_workers = max(1, min(self.n_workers, n_tasks))
        while len(self._queues) < n_workers - 1:
            queue: SimpleQueue[_Job] = SimpleQueue()
            threading.Thread(target=_serve, args=(queue,), name="kernel", daemon=True).start()
            self._queues.append(queue)
        jobs = []
        for w in range(1, n_workers):
            mine = tuple(s[w] for s in scratch)
            job = _Job(lambda mine=mine: worker(state, n_tasks, *arguments, *mine))  # type: ignore[misc]
            self._queues[w - 1].put(job)
            jobs.append(job)
        try:
            worker(state, n_tasks, *arguments, *(s[0] for s in scratch))
        finally:
            for job in jobs:
                if not job.claim():
                    job.done.acquire()
        for job in jobs:
            if job.error is not None:
                raise job.error
        return bool(state[1])

    def scratch(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """A kept buffer [n_workers, *shape] with old contents. Under `lock`."""
        shape = (self.n_workers, *shape)
        n_items = int(np.prod(shape))
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < n_items or buffer.dtype != dtype:
            buffer = np.zeros(n_items, dtype=dtype)
            self._scratch[name] = buffer
        return buffer[:n_items].reshape(shape)


def _serve(queue: SimpleQueue[_Job]) -> None:
    while True:
        job = queue.get()
        if not job.claim():
            continue
        try:
            job.work()
        except BaseException as exc:  # handed to the caller, which raises it
            job.error = exc
        finally:
            job.done.release()


POOL = Pool()
