"""The server end of a transport, without its socket: threads, streams, credit, cancellation."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ..core.errors import Draining, InternalError, InvalidInput, LongreachError, ResourceExhausted
from .rpc_frames import (
    ALIVE,
    CALL,
    CANCEL,
    CREDIT,
    END,
    OPEN,
    Frames,
    fail_frames,
    make_bundle,
    make_frames,
    parse_buffers,
    parse_header,
    parse_tag,
)
from .transport import Reply, Service, Unanswered

logger = logging.getLogger(__name__)
Peer = TypeVar("Peer", bound=Hashable)

MAX_STREAMS = 1024
MAX_WAITING_CALLS = 4096
HOLD_S = 0.005
"""How long a reply may wait for others that share its message."""


class _OpenStream:
    """State of one stream: its iterator, how many replies may still be sent, whether to stop."""

    def __init__(self, credit: int, bundle_bytes: int) -> None:
        self._credit = credit
        self.bundle_bytes = bundle_bytes
        self._changed = threading.Condition()
        self.cancelled = False
        self.iterator: Iterator[Reply] | None = None

    def add_credit(self, credit: int) -> None:
        with self._changed:
            self._credit += credit
            self._changed.notify()

    @property
    def has_credit(self) -> bool:
        return self._credit > 0

    def take_credit(self) -> bool:
        """Waits for leave to send one reply. False: cancelled. Ends with the peer at the latest,
        because a lost peer cancels its streams."""
        with self._changed:
            self._changed.wait_for(lambda: self._credit > 0 or self.cancelled)
            self._credit -= 1
            return not self.cancelled

    def cancel(self) -> None:
        with self._changed:
            self.cancelled = True
            self._changed.notify()
        hook = getattr(self.iterator, "cancel", None)
        if hook is not None:
            try:
                hook()
            except Exception:
                logger.exception("the cancel hook of a stream failed")


class _Bundle:
    """Replies that will share a message: one at first, so that it comes at once, then twice as many
    each time, as far as their bytes allow."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._most = 1
        self._n_bytes = 0
        self._first_s = 0.0
        self.replies: list[Reply] = []

    def add(self, reply: Reply) -> bool:
        """Whether it should be sent now."""
        if not self.replies:
            self._first_s = time.monotonic()
        self.replies.append(reply)
        self._n_bytes += sum(memoryview(buffer).nbytes for buffer in reply.buffers)
        return (
            len(self.replies) >= self._most
            or self._n_bytes >= self._most_bytes
            or time.monotonic() - self._first_s > HOLD_S
        )

    def take(self) -> list[Reply]:
        replies, self.replies = self.replies, []
        self._most, self._n_bytes = 2 * self._most, 0
        return replies


class RpcServer(Generic[Peer]):
    """Runs a service for a link. The link calls `on_message`, `on_peer_lost` and, about every
    second, `tick`; `send` must be thread-safe and must not wait."""

    def __init__(
        self, service: Service, n_threads: int, send: Callable[[Peer, Frames], None]
    ) -> None:
        self._service = service
        self._send = send
        self._streams: dict[tuple[Peer, int], _OpenStream] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._n_active = 0
        self._draining = False
        self._calls: SimpleQueue[tuple[Peer, int, dict[str, Any], Frames, float] | None] = (
            SimpleQueue()
        )
        # daemon threads: a handler that hangs must not keep the process from exiting
        self._threads = [
            threading.Thread(target=self._serve_calls, name=f"rpc-{i}", daemon=True)
            for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def on_message(self, peer: Peer, frames: Frames) -> None:
        """Never raises and never waits."""
        tag = parse_tag(frames)
        if tag is None:
            return
        kind, request_id = tag
        try:
            header = parse_header(frames)
            if kind == CALL:
                self._accept_call(peer, request_id, header, frames)
            elif kind == OPEN:
                self._accept_stream(peer, request_id, header, frames)
            elif kind == CREDIT:
                stream = self._streams.get((peer, request_id))
                if stream is not None:
                    stream.add_credit(_number(header, "credit", int))
            elif kind == CANCEL:
                stream = self._streams.get((peer, request_id))
                if stream is not None:
                    stream.cancel()
        except LongreachError as exc:
            self._send(peer, fail_frames(request_id, exc))
        except Exception as exc:
            logger.exception("a message was not understood")
            self._send(peer, fail_frames(request_id, exc))

    def on_peer_lost(self, peer: Peer) -> None:
        with self._lock:
            lost = [stream for (owner, _), stream in self._streams.items() if owner == peer]
        for stream in lost:
            stream.cancel()

    def tick(self) -> None:
        """Sends a sign of life on every open stream."""
        with self._lock:
            open_streams = list(self._streams)
        for peer, request_id in open_streams:
            self._send(peer, make_frames(ALIVE, request_id))

    def drain(self, timeout_s: float) -> None:
        """Refuses new work, waits for running calls, ends streams with Draining."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._draining = True
            streams = list(self._streams.items())
        for (peer, request_id), stream in streams:
            self._send(peer, fail_frames(request_id, Draining("the server is stopping")))
            stream.cancel()
        with self._idle:
            self._idle.wait_for(
                lambda: not self._n_active and not self._streams,
                timeout=max(deadline_s - time.monotonic(), 0.0),
            )
        for _ in self._threads:
            self._calls.put(None)

    def _accept_call(
        self, peer: Peer, request_id: int, header: dict[str, Any], frames: Frames
    ) -> None:
        _check_request(header)
        deadline_s = time.monotonic() + _number(header, "timeout_s", float)
        with self._lock:
            if self._draining:
                raise Draining("the server is stopping")
            if self._n_active >= MAX_WAITING_CALLS:
                raise ResourceExhausted(f"{self._n_active} calls are waiting; try again later")
            self._n_active += 1
        self._calls.put((peer, request_id, header, frames, deadline_s))

    def _serve_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            peer, request_id, header, frames, deadline_s = call
            try:
                # nobody waits any more for a call that stood in the queue for too long
                if time.monotonic() < deadline_s:
                    self._send(peer, self._answer(request_id, header, frames))
            except Unanswered:
                pass
            except Exception as exc:
                self._send(peer, fail_frames(request_id, _logged(exc, header)))
            finally:
                del call, frames
                with self._idle:
                    self._n_active -= 1
                    self._idle.notify_all()

    def _answer(self, request_id: int, header: dict[str, Any], frames: Frames) -> Frames:
        reply = self._service.handle(header["method"], header["body"], parse_buffers(frames))
        if not isinstance(reply, Reply):
            close = getattr(reply, "close", None)
            if close is not None:
                close()
            raise InvalidInput(f"method {header['method']!r} streams; open it as a stream")
        return _reply_frames(request_id, [reply])

    def _accept_stream(
        self, peer: Peer, request_id: int, header: dict[str, Any], frames: Frames
    ) -> None:
        _check_request(header)
        bundle_bytes = _number({"bundle_bytes": 0, **header}, "bundle_bytes", int)
        stream = _OpenStream(_number(header, "credit", int), bundle_bytes)
        key = (peer, request_id)
        with self._lock:
            if self._draining:
                raise Draining("the server is stopping")
            if len(self._streams) >= MAX_STREAMS:
                raise ResourceExhausted(f"{MAX_STREAMS} streams are open; try again later")
            if key in self._streams:
                raise InvalidInput(f"request id {request_id} is in use")
            self._streams[key] = stream
        threading.Thread(
            target=self._run_stream,
            args=(peer, request_id, stream, header, parse_buffers(frames)),
            name=f"rpc-stream-{request_id}",
            daemon=True,
        ).start()

    def _run_stream(
        self,
        peer: Peer,
        request_id: int,
        stream: _OpenStream,
        header: dict[str, Any],
        buffers: list[memoryview],
    ) -> None:
        last: Frames | None = None
        bundle = _Bundle(stream.bundle_bytes)

        def send_bundle() -> None:
            if bundle.replies and not stream.cancelled:
                self._send(peer, _reply_frames(request_id, bundle.take()))

        try:
            made = self._service.handle(header["method"], header["body"], buffers)
            stream.iterator = iter([made]) if isinstance(made, Reply) else iter(made)
            if stream.cancelled:
                stream.cancel()  # it came before there was a hook to call
            while True:
                if not stream.has_credit:
                    send_bundle()
                if not stream.take_credit():
                    break
                reply = next(stream.iterator, None)
                if reply is None:
                    send_bundle()
                    last = make_frames(END, request_id)
                    break
                if bundle.add(reply):
                    send_bundle()
        except Unanswered:
            send_bundle()
        except Exception as exc:
            last = fail_frames(request_id, _logged(exc, header))
            with contextlib.suppress(InternalError):  # then it is what failed
                send_bundle()
        finally:
            close = getattr(stream.iterator, "close", None)
            if close is not None:
                try:
                    close()
                except Exception:
                    logger.exception("closing the stream of %r failed", header["method"])
            # out of the table first: no sign of life may follow the last message
            with self._idle:
                self._streams.pop((peer, request_id), None)
                self._idle.notify_all()
            if last is not None and not stream.cancelled:
                self._send(peer, last)


def _check_request(header: dict[str, Any]) -> None:
    if not isinstance(header.get("method"), str) or not isinstance(header.get("body"), dict):
        raise InvalidInput("a request needs `method` (text) and `body` (map)")


def _number(header: dict[str, Any], field: str, kind: type[Any]) -> Any:
    value = header.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise InvalidInput(f"`{field}` must be a number from 0 to 1e9, got {value!r}")
    return kind(value)


def _reply_frames(request_id: int, replies: Sequence[Reply]) -> Frames:
    try:
        return make_bundle(request_id, replies)
    except InvalidInput as exc:  # the service's fault, not the caller's
        raise InternalError(f"unsendable reply: {exc.message}") from exc


def _logged(exc: Exception, header: dict[str, Any]) -> Exception:
    if not isinstance(exc, LongreachError):
        logger.error("method %r failed", header["method"], exc_info=exc)
    return exc
