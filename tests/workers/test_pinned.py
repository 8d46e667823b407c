from __future__ import annotations

import contextlib
import mmap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    PinRefused,
)
from longreach.workers.pinned import CudaRegistrar, PinnedArena, cuda_registrar

PAGE = mmap.PAGESIZE
LONG_S = 30.0


class Recorder:
    """A registrar that remembers; `gate` holds back registering, `fail_at` counts from 0."""

    def __init__(self, fail_at: int = -1, error: Exception | None = None) -> None:
        self.held: dict[int, int] = {}
        self.calls = 0
        self.gate = threading.Semaphore(0)
        self.fail_at, self.error = fail_at, error or PinRefused("no more", code=2)
        self.unregistered: list[int] = []
        self.sticks: set[int] = set()

    def register(self, address: int, n_bytes: int) -> None:
        assert self.gate.acquire(timeout=LONG_S)
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise self.error
        assert address not in self.held
        self.held[address] = n_bytes

    def unregister(self, address: int) -> None:
        self.unregistered.append(address)
        del self.held[address]
        if address in self.sticks:
            raise PinRefused("it sticks")

    def open(self, n: int = 1000) -> Recorder:
        self.gate.release(n)
        return self


def test_pieces_become_ready_in_order() -> None:
    recorder = Recorder()
    with PinnedArena(5 * PAGE // 2, PAGE, recorder) as arena:
        assert not arena.progress.done
        with pytest.raises(DeadlineExceeded, match="0 of") as caught:
            arena.wait_ready(0, 1, 0.0)
        assert caught.value.retryable
        recorder.open(2)
        arena.wait_ready(100, 2 * PAGE - 100, LONG_S)
        with pytest.raises(DeadlineExceeded):
            arena.wait_ready(2 * PAGE, 1, 0.05)
        recorder.open()
        arena.wait_ready(0, arena.n_bytes, LONG_S)
        assert arena.progress.done
        assert arena.progress.n_bytes == arena.n_bytes
        at = arena.address
        assert recorder.held == {at: PAGE, at + PAGE: PAGE, at + 2 * PAGE: PAGE // 2}
    assert recorder.held == {}
    assert arena.progress.seconds == arena.progress.seconds


def test_without_a_device_all_is_ready_at_once() -> None:
    with PinnedArena(3 * PAGE, PAGE) as arena:
        arena.wait_ready(0, 3 * PAGE, 0.0)
        assert (arena.progress.done, arena.progress.seconds) == (True, 0.0)
    with pytest.raises(FailedPrecondition, match="closed"):
        arena.wait_ready(0, 1, 0.0)


@pytest.mark.parametrize("error", [PinRefused("no more", code=2), OSError("locked limit")])
def test_an_error_reaches_who_waits_for_it_and_nobody_else(error: Exception) -> None:
    recorder = Recorder(fail_at=2, error=error).open()
    with PinnedArena(4 * PAGE, PAGE, recorder) as arena:
        with pytest.raises(PinRefused, match=r"no more|OSError: locked limit") as caught:
            arena.wait_ready(0, 4 * PAGE, LONG_S)
        assert not caught.value.retryable
        arena.wait_ready(0, 2 * PAGE, 0.0)
        assert not arena.progress.done
    assert recorder.held == {}
    assert len(recorder.unregistered) == 2


def test_waiters_wake_when_the_arena_closes() -> None:
    recorder = Recorder()
    arena = PinnedArena(2 * PAGE, PAGE, recorder)
    seen: list[BaseException] = []

    def wait() -> None:
        with contextlib.suppress(FailedPrecondition):
            arena.wait_ready(0, 2 * PAGE, LONG_S)
            seen.append(AssertionError("ready after close"))

    waiter = threading.Thread(target=wait)
    waiter.start()
    closer = threading.Thread(target=arena.close)
    closer.start()
    waiter.join(LONG_S)
    assert not waiter.is_alive()
    recorder.open()
    closer.join(LONG_S)
    assert not closer.is_alive()
    assert not seen
    assert recorder.held == {}
    arena.close()


def test_a_close_that_cannot_wait_leaves_unregistering_to_the_thread() -> None:
    recorder = Recorder().open(1)
    arena = PinnedArena(3 * PAGE, PAGE, recorder)
    arena.wait_ready(0, PAGE, LONG_S)
    arena.close(timeout_s=0.01)
    assert len(recorder.held) == 1
    recorder.open()
    deadline = time.monotonic() + LONG_S
    while recorder.held and time.monotonic() < deadline:
        time.sleep(0.005)
    assert recorder.held == {}
    assert len(recorder.unregistered) == len(set(recorder.unregistered))


def test_a_piece_that_sticks_does_not_keep_the_others() -> None:
    recorder = Recorder().open()
    arena = PinnedArena(3 * PAGE, PAGE, recorder)
    arena.wait_ready(0, 3 * PAGE, LONG_S)
    recorder.sticks = {arena.address + PAGE}
    arena.close()
    assert len(recorder.unregistered) == 3


def test_a_mapped_file_is_used_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 2 * PAGE)
    with PinnedArena(mapped, PAGE, Recorder().open()) as arena:
        arena.wait_ready(0, 2 * PAGE, LONG_S)
        arena.tensor(PAGE, (2, 4), torch.float32).fill_(1.5)
    assert np.frombuffer(path.read_bytes(), np.float32, 8, PAGE).tolist() == [1.5] * 8


def test_views_share_the_memory_and_outlive_the_arena() -> None:
    arena = PinnedArena(2 * PAGE, PAGE)
    view = arena.tensor(64, (3, 5), torch.bfloat16)
    view.fill_(2.0)
    assert view.data_ptr() == arena.address + 64
    assert int(arena.bytes[64:94].sum()) == 15 * 0x40
    arena.close()
    assert float(view.float().sum()) == 30.0


def test_wrong_sizes_are_our_own_bugs(tmp_path: Path) -> None:
    for memory, piece in ((0, PAGE), (PAGE, 100), (PAGE, 0), (bytes(PAGE), PAGE)):
        with pytest.raises(InternalError):
            PinnedArena(memory, piece)
    with PinnedArena(PAGE, PAGE) as arena:
        for offset, n_bytes in ((-1, 1), (0, PAGE + 1), (PAGE, 1)):
            with pytest.raises(InternalError, match="of an arena"):
                arena.wait_ready(offset, n_bytes, 0.0)
        with pytest.raises(InternalError, match="of an arena"):
            arena.tensor(8, (PAGE,), torch.uint8)


def test_memory_that_the_system_does_not_have_is_refused() -> None:
    with pytest.raises(PinRefused, match="gives no"):
        PinnedArena(1 << 62, PAGE)


class Runtime:
    """What `torch.cuda.cudart()` has of these calls."""

    def __init__(self, code: int) -> None:
        self.code, self.calls = code, [] if code == 0 else None

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        if self.calls is not None:
            self.calls.append((address, n_bytes, flags))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        if self.calls is not None:
            self.calls.append((address,))
        return self.code


def test_cuda_is_asked_for_mapped_memory_and_its_refusals_are_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext(SimpleNamespace()))
    runtime = Runtime(0)
    registrar: Any = CudaRegistrar(runtime=lambda: runtime)
    with PinnedArena(2 * PAGE, PAGE, registrar) as arena:
        arena.wait_ready(0, 2 * PAGE, LONG_S)
        at = arena.address
    assert runtime.calls is not None
    assert runtime.calls[:2] == [(at, PAGE, 3), (at + PAGE, PAGE, 3)]
    assert sorted(runtime.calls[2:]) == [(at,), (at + PAGE,)]
    refusing = CudaRegistrar(runtime=lambda: Runtime(2))
    refused = pytest.raises(PinRefused, match=r"error 2.*store\.capacity_bytes")
    with PinnedArena(PAGE, PAGE, refusing) as arena, refused:
        arena.wait_ready(0, PAGE, LONG_S)
    with pytest.raises(PinRefused):
        refusing.unregister(0)


def test_without_cuda_there_is_no_registrar() -> None:
    assert (cuda_registrar() is None) == (not torch.cuda.is_available())


@pytest.mark.gpu
def test_registered_memory_is_read_by_the_device() -> None:
    with PinnedArena(8 << 20, 2 << 20, cuda_registrar()) as arena:
        arena.wait_ready(0, 8 << 20, LONG_S)
        view = arena.tensor(0, (2 << 20,), torch.float32)
        view.fill_(3.0)
        assert float(view[: 1 << 18].to("cuda", non_blocking=True).sum()) == 3.0 * (1 << 18)
        assert view[: 1 << 18].is_pinned()
