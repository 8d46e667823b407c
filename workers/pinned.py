"""Host memory that the device reads and writes itself, registered with CUDA piece by piece in the background:
registering a terabyte takes minutes, and the first pages are of use after the first piece.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.errors import DeadlineExceeded, FailedPrecondition, InternalError, PinRefused

_log = logging.getLogger(__name__)
CLOSE_TIMEOUT_S = 30.0
"""Longest wait of `close` for the piece that is being registered."""


class Registrar(Protocol):
    """What makes memory readable by the device. Both raise PinRefused."""

    def register(self, address: int, n_bytes: int) -> None: ...

    def unregister(self, address: int) -> None: ...


@dataclass(frozen=True)
class PinProgress:
    """How far registering is."""

    n_bytes: int
    """Registered so far; all of them where there is no device."""
    total_bytes: int
    seconds: float
    """Since the start, or what it took in all."""

    @property
    def done(self) -> bool:
        return self.n_bytes == self.total_bytes


class PinnedArena:
    """Bytes in huge pages where the system grants them. The caller closes it; views stay readable.

    Pieces are registered in ascending order. A leaf may lie across two of them: the device reads both
    sides at the addresses of the host.
    """

    def __init__(
        self, memory: int | Any, piece_bytes: int, registrar: Registrar | None = None
    ) -> None:
        """memory: bytes to take, or a buffer such as a mapped file of the node's arena, at the start of a
        memory page; piece_bytes: a multiple of the memory page. registrar None: nothing is
        registered (no device), all is ready.

        Returns at once. Raises PinRefused if there is no such memory, InternalError for wrong sizes.
        """
        buffer = _take(memory) if isinstance(memory, int) else memory
        self.bytes: np.ndarray = np.frombuffer(buffer, dtype=np.uint8)
        """uint8 [n_bytes]"""
        self.address = int(self.bytes.ctypes.data)
        page = mmap.PAGESIZE
        if piece_bytes <= 0 or piece_bytes % page or self.address % page:
            raise InternalError(f"pieces of {piece_bytes} bytes do not begin at memory pages")
        if not len(self.bytes):
            raise InternalError("memory for the device must not be empty")
        self._piece_bytes = piece_bytes
        self._registrar = registrar
        self._changed = threading.Condition()
        self._n_ready = 0 if registrar is not None else len(self.bytes)
        self._error: PinRefused | None = None
        self._closing = False
        self._registered: list[int] = []
        self._started_s = time.monotonic()
        self._seconds: float | None = None if registrar is not None else 0.0
        self._thread: threading.Thread | None = None
        if registrar is not None:
            self._thread = threading.Thread(
                target=self._run, args=(registrar,), name="pin", daemon=True
            )
            self._thread.start()

    @property
    def n_bytes(self) -> int:
        return len(self.bytes)

    @property
    def progress(self) -> PinProgress:
        with self._changed:
            seconds = self._seconds
            if seconds is None:
                seconds = time.monotonic() - self._started_s
            return PinProgress(self._n_ready, self.n_bytes, seconds)

    def wait_ready(self, offset: int, n_bytes: int, timeout_s: float) -> None:
        """Until the device can read [offset, offset + n_bytes).

        Raises DeadlineExceeded (retryable), PinRefused if registering has failed before these bytes,
        FailedPrecondition if the arena is closed, InternalError for bytes that it does not have.
        """
        end = offset + n_bytes
        if offset < 0 or n_bytes < 0 or end > self.n_bytes:
            raise InternalError(f"bytes {offset} to {end} of an arena of {self.n_bytes}")
        with self._changed:
            self._changed.wait_for(
                lambda: self._n_ready >= end or self._error is not None or self._closing, timeout_s
            )
            if self._closing:
                raise FailedPrecondition("the arena of host memory is closed")
            if self._n_ready >= end:
                return
            if self._error is not None:
                raise self._error
            raise DeadlineExceeded(
                f"{self._n_ready} of {self.n_bytes} bytes of host memory are registered with the device, "
                f"byte {end} is not, after {timeout_s} s",
                registered=self._n_ready,
                needed=end,
            )

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of bytes from offset on; the same memory. Raises InternalError if they are not there."""
        end = offset + math.prod(shape) * dtype.itemsize
        if offset < 0 or end > self.n_bytes or offset % dtype.itemsize:
            raise InternalError(f"bytes {offset} to {end} of an arena of {self.n_bytes}")
        return torch.from_numpy(self.bytes[offset:end]).view(dtype).view(shape)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Unregister what was registered, in whatever state; waiters get FailedPrecondition. Never raises.

        The piece under way is waited for; if that takes longer than timeout_s, the thread unregisters
        when it gets there.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.warning("host memory is still being registered after %.0f s", timeout_s)
                return
        self._unregister()

    def __enter__(self) -> PinnedArena:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, registrar: Registrar) -> None:
        error: PinRefused | None = None
        try:
            for start in range(0, self.n_bytes, self._piece_bytes):
                if self._closing:
                    break
                n = min(self._piece_bytes, self.n_bytes - start)
                registrar.register(self.address + start, n)
                with self._changed:
                    self._registered.append(self.address + start)
                    self._n_ready = start + n
                    self._changed.notify_all()
        except PinRefused as exc:
            error = exc
        except Exception as exc:
            error = PinRefused(f"registering host memory failed: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
        with self._changed:
            self._seconds = time.monotonic() - self._started_s
            self._error = error
            closing = self._closing
            self._changed.notify_all()
        if error is not None:
            _log.error("host memory: %s", error.message)
        if closing:
            self._unregister()

    def _unregister(self) -> None:
        """Each piece once, whoever comes first: `close` or the thread."""
        while True:
            with self._changed:
                if not self._registered:
                    return
                address = self._registered.pop()
            assert self._registrar is not None
            try:
                self._registrar.unregister(address)
            except Exception as exc:
                # the others must go nevertheless
                _log.warning("host memory at %#x stays registered: %s", address, exc)


def _take(n_bytes: int) -> mmap.mmap:
    if n_bytes <= 0:
        raise InternalError(f"an arena of {n_bytes} bytes")
    try:
        # private: shared anonymous memory is never given huge pages
        region = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as exc:
        raise PinRefused(
            f"the system gives no {n_bytes} bytes of host memory: {exc}", n_bytes=n_bytes
        ) from exc
    with contextlib.suppress(OSError, AttributeError):
        # a kernel without transparent huge pages refuses: correct as it is, only slower
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


class CudaRegistrar:
    """cudaHostRegister, portable and mapped. Where addresses are unified (64-bit Linux) the device uses those
    of the host."""

    PORTABLE, MAPPED, READ_ONLY = 1, 2, 8

    def __init__(
        self,
        device: int = 0,
        runtime: Callable[[], Any] = torch.cuda.cudart,
        *,
        read_only: bool = False,
    ) -> None:
        """runtime: gives the CUDA runtime that torch has loaded. read_only: for memory that this process has
        mapped for reading, such as a store's arena."""
        self._device = device
        self._flags = self.PORTABLE | self.MAPPED | (self.READ_ONLY if read_only else 0)
        self._cuda = runtime()

    def register(self, address: int, n_bytes: int) -> None:
        with torch.cuda.device(self._device):
            code = int(self._cuda.cudaHostRegister(address, n_bytes, self._flags))
        if code:
            raise PinRefused(
                f"CUDA refuses to register {n_bytes} bytes of host memory (error {code}); lower "
                "store.capacity_bytes or raise the limit of locked memory (ulimit -l)",
                address=address,
                n_bytes=n_bytes,
                code=code,
            )

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self._device):
            code = int(self._cuda.cudaHostUnregister(address))
        if code:
            raise PinRefused(f"CUDA cannot unregister host memory (error {code})", code=code)


def cuda_registrar(device: int = 0, *, read_only: bool = False) -> Registrar | None:
    """None where there is no CUDA."""
    if not torch.cuda.is_available():
        return None
    return CudaRegistrar(device, read_only=read_only)
