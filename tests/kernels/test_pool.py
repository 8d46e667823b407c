"""The worker threads: every task once, sleepers wake, failures arrive."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from longreach.kernels.cpu_compile import compiled
from longreach.kernels.cpu_pages import address
from longreach.kernels.cpu_pool import Pool
from longreach.kernels.cpu_wait import leave, take_ticket, wait_until


@compiled
def _count(state: Any, n_tasks: int, done: Any, mine: Any) -> None:
    while True:
        task = take_ticket(address(state))
        if task >= n_tasks:
            leave(address(state))
            return
        done[task] += 1
        mine[0] += 1


def run(pool: Pool, n_tasks: int) -> np.ndarray:
    done = np.zeros(n_tasks, dtype=np.int64)
    with pool.lock:
        mine = pool.scratch("mine", (1,), np.int64)
        mine[:] = 0
        assert not pool.run(_count, (done,), n_tasks, (mine,))
        # all workers have left: what each has counted is visible
        assert mine.sum() == n_tasks
    return done


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_every_task_runs_once(threads, n_threads):
    threads(n_threads)
    pool = Pool()
    for n_tasks in (1, 2, 7, 1000):
        for _ in range(20):
            assert (run(pool, n_tasks) == 1).all()


def test_a_helper_that_sleeps_wakes(threads):
    threads(3)
    pool = Pool()
    for _ in range(10):
        assert (run(pool, 50) == 1).all()
        time.sleep(0.02)  # far longer than helpers look for work


def test_the_end_waits_for_every_helper(threads):
    threads(2)
    pool, started = Pool(), threading.Event()
    ended: list[bool] = []

    def slow(state: np.ndarray, n_tasks: int) -> None:
        if threading.current_thread().name == "kernel":
            started.set()
            time.sleep(0.1)  # longer than the caller looks for the end
            ended.append(True)
        else:
            started.wait(5)
        leave_(state)

    with pool.lock:
        pool.run(slow, (), 2)
    assert ended == [True]


def test_what_a_helper_raises_reaches_the_caller(threads):
    threads(2)
    pool, started = Pool(), threading.Event()

    def broken(state: np.ndarray, n_tasks: int) -> None:
        if threading.current_thread().name == "kernel":
            started.set()
            raise ValueError("from a helper")
        started.wait(5)
        leave_(state)

    with pool.lock, pytest.raises(ValueError, match="from a helper"):
        pool.run(broken, (), 2)
    assert (run(pool, 10) == 1).all()


def test_what_the_caller_raises_waits_for_the_helpers(threads):
    threads(2)
    pool, started = Pool(), threading.Event()
    ended: list[bool] = []

    def broken(state: np.ndarray, n_tasks: int) -> None:
        if threading.current_thread().name == "kernel":
            started.set()
            time.sleep(0.1)
            ended.append(True)
            leave_(state)
            return
        started.wait(5)
        raise ValueError("from the caller")

    with pool.lock, pytest.raises(ValueError, match="from the caller"):
        pool.run(broken, (), 2)
    assert ended == [True]


@compiled
def leave_(state: Any) -> None:
    leave(address(state))


def test_waiting_ends_with_the_number_or_the_looks():
    number = np.zeros(1, dtype=np.int64)
    assert not wait_until(number.ctypes.data, 1, 50)
    threading.Timer(0.05, lambda: number.__setitem__(0, 3)).start()
    assert wait_until(number.ctypes.data, 3, 10_000_000)
