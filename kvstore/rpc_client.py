"""The client end of a transport, without its socket: matches replies to waiting callers."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from ..core.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    LongreachError,
    Unavailable,
    error_from_wire,
)
from .rpc_frames import (
    ALIVE,
    BUNDLE,
    CALL,
    CANCEL,
    CREDIT,
    END,
    FAIL,
    OPEN,
    STREAM_CREDIT,
    Frames,
    make_frames,
    parse_buffers,
    parse_bundle,
    parse_header,
    parse_tag,
)
from .transport import Buffer, Reply


class _Waiter:
    """What arrived for one request: (kind, frames), or the error that ended the connection."""

    __slots__ = ("arrived", "last_sign_s")

    def __init__(self) -> None:
        self.arrived: SimpleQueue[tuple[bytes, Frames] | LongreachError] = SimpleQueue()
        self.last_sign_s = time.monotonic()


def _to_reply(kind: bytes, frames: Frames) -> Reply:
    header = parse_header(frames)
    if kind == FAIL:
        raise error_from_wire(header)
    return Reply(header, parse_buffers(frames))


class RpcClient:
    """Thread-safe. `send` hands frames to the link and never waits; `connected` tells whether the
    link ever had its peer, which decides between DeadlineExceeded and Unavailable."""

    def __init__(
        self, address: str, send: Callable[[Frames], None], connected: Callable[[], bool]
    ) -> None:
        self.address = address
        self._send = send
        self._connected = connected
        self._waiters: dict[int, _Waiter] = {}
        self._ids = itertools.count(1)
        self._closed = False
        self._lock = threading.Lock()

    def call(
        self,
        method: str,
        header: dict[str, Any] | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float,
    ) -> Reply:
        envelope = {"method": method, "timeout_s": timeout_s, "body": header or {}}
        request_id, waiter = self._start(CALL, envelope, buffers)
        try:
            arrived = waiter.arrived.get(timeout=max(timeout_s, 0.0))
        except Empty:
            if self._connected():
                raise DeadlineExceeded(
                    f"{method} at {self.address} took more than {timeout_s:.1f} s"
                ) from None
            raise Unavailable(
                f"no connection to {self.address} within {timeout_s:.1f} s ({method})"
            ) from None
        finally:
            self._waiters.pop(request_id, None)
        if isinstance(arrived, LongreachError):
            raise arrived
        return _to_reply(*arrived)

    def stream(
        self,
        method: str,
        header: dict[str, Any] | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        idle_timeout_s: float,
        credit: int = STREAM_CREDIT,
        bundle_bytes: int = 0,
    ) -> RpcStream:
        envelope = {
            "method": method,
            "credit": credit,
            "bundle_bytes": bundle_bytes,
            "body": header or {},
        }
        request_id, waiter = self._start(OPEN, envelope, buffers)
        return RpcStream(self, method, request_id, waiter, idle_timeout_s, credit)

    def on_message(self, frames: Frames) -> None:
        """Called by the link for each message. Never raises; unknown messages are dropped."""
        tag = parse_tag(frames)
        if tag is None:
            return
        kind, request_id = tag
        waiter = self._waiters.get(request_id)
        if waiter is None:
            return  # the caller gave up before
        waiter.last_sign_s = time.monotonic()
        if kind != ALIVE:
            waiter.arrived.put((kind, frames))

    def on_lost(self, reason: str) -> None:
        """Called by the link when its peer is gone: everyone who waits gets Unavailable."""
        for request_id in list(self._waiters):
            waiter = self._waiters.pop(request_id, None)
            if waiter is not None:
                waiter.arrived.put(Unavailable(f"{self.address}: {reason}"))

    def wanted(self, frames: Frames) -> bool:
        """Whether someone still waits for the request that these frames belong to."""
        return int.from_bytes(frames[0][1:], "big") in self._waiters

    def shut(self) -> None:
        """No new requests; ends those in progress."""
        with self._lock:
            self._closed = True
        self.on_lost("channel closed")

    def send_credit(self, request_id: int, credit: int) -> None:
        self._send(make_frames(CREDIT, request_id, {"credit": credit}))

    def forget(self, request_id: int, *, cancel: bool) -> None:
        """A stream is over for the caller; `cancel` also tells the server."""
        if self._waiters.pop(request_id, None) is not None and cancel and not self._closed:
            self._send(make_frames(CANCEL, request_id))

    def _start(
        self, kind: bytes, envelope: dict[str, Any], buffers: Sequence[Buffer]
    ) -> tuple[int, _Waiter]:
        request_id = next(self._ids)
        frames = make_frames(kind, request_id, envelope, buffers)
        waiter = _Waiter()
        with self._lock:
            if self._closed:
                raise Unavailable(f"{self.address}: channel closed")
            self._waiters[request_id] = waiter
        self._send(frames)
        return request_id, waiter


class RpcStream:
    """One open stream at the client. Only `cancel` may come from another thread than the reader's."""

    def __init__(
        self,
        client: RpcClient,
        method: str,
        request_id: int,
        waiter: _Waiter,
        idle_timeout_s: float,
        credit: int,
    ) -> None:
        self._client = client
        self._method = method
        self._request_id = request_id
        self._waiter = waiter
        self._idle_timeout_s = idle_timeout_s
        self._credit = credit
        self._n_unacknowledged = 0
        self._bundle: deque[Reply] = deque()
        self._over = False

    def __iter__(self) -> Iterator[Reply]:
        return self

    def __next__(self) -> Reply:
        if self._over:
            raise StopIteration
        try:
            reply = self._bundle.popleft() if self._bundle else self._next_arrived()
        except LongreachError as exc:
            # the server is told unless it was the one that ended the stream
            self._finish(cancel=isinstance(exc, Unavailable | InternalError))
            raise
        self._n_unacknowledged += 1
        if self._n_unacknowledged >= self._credit // 2:
            self._client.send_credit(self._request_id, self._n_unacknowledged)
            self._n_unacknowledged = 0
        return reply

    def _next_arrived(self) -> Reply:
        arrived = self._wait()
        if isinstance(arrived, LongreachError):
            raise arrived
        kind, frames = arrived
        if kind == END:
            self._finish(cancel=False)
            raise StopIteration
        if kind != BUNDLE:
            return _to_reply(kind, frames)
        self._bundle.extend(parse_bundle(frames))
        return self._bundle.popleft()

    def _wait(self) -> tuple[bytes, Frames] | LongreachError:
        # a reader that comes late has not waited: silence counts from the later of the two
        start_s = time.monotonic()
        while True:
            silent_since_s = max(start_s, self._waiter.last_sign_s)
            remaining_s = silent_since_s + self._idle_timeout_s - time.monotonic()
            try:
                return self._waiter.arrived.get(timeout=max(remaining_s, 0.0))
            except Empty:
                if self._waiter.last_sign_s > silent_since_s:
                    continue
                return Unavailable(
                    f"{self._client.address} was silent for {self._idle_timeout_s:.1f} s "
                    f"({self._method})"
                )

    def _finish(self, *, cancel: bool) -> None:
        self._over = True
        self._client.forget(self._request_id, cancel=cancel)

    def close(self) -> None:
        if not self._over:
            self._finish(cancel=True)

    def cancel(self) -> None:
        """`close` from any thread; a `next` that waits raises Cancelled at once."""
        self.close()
        self._waiter.arrived.put(
            Cancelled(f"{self._method} at {self._client.address} was cancelled")
        )

    def __enter__(self) -> RpcStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
