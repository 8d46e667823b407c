"""Transport between processes: `tcp://host:port`, ZeroMQ ROUTER and DEALER.

A ZeroMQ socket belongs to one thread, so each end has an I/O thread; other threads hand it frames
through a queue and wake it by a socket pair. Large buffers are neither copied on the way out nor
on the way in. A lost connection is noticed through the socket's monitor (client) and through
unroutable sends (server); half-open ones through ZeroMQ's heartbeats.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..core.errors import FailedPrecondition, InvalidInput
from .rpc_client import RpcClient
from .rpc_frames import KEEPALIVE_S, Frames
from .rpc_server import RpcServer
from .transport import Service

logger = logging.getLogger(__name__)

HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 10_000
MAX_FRAME_BYTES = 1 << 30
LINGER_MS = 1_000
NEVER_MS = 86_400_000
KEPT_MESSAGE_BYTES = 16 << 20
"""Received frames up to this size share memory that is used again."""
KEPT_BYTES = 64 << 20
"""Freed memory that malloc keeps at the end of each of its arenas."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
RECEIVE_BATCH = 64
"""Messages taken in before waiting ones are sent, so that neither direction starves."""
_LOST = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
)
_UP = zmq.Event.HANDSHAKE_SUCCEEDED


@functools.cache
def _reuse_received_memory() -> None:
    """Lets malloc keep what messages of pages were in for the next ones. By default it gives it back to
    the system and takes it anew for each, and the page faults cost as much as the copies (measured:
    110,000 faults per GB of 256 KiB pages, 0.3 to 0.8 s). Only glibc has the setting."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, KEPT_MESSAGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


class _Outbox:
    """Messages for the I/O thread, and a file descriptor that wakes it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._signalled = False

    def put(self, item: Any) -> None:
        self._queue.put(item)
        if not self._signalled:
            self._signalled = True
            with contextlib.suppress(OSError):  # full pipe: awake anyway; closed: nobody listens
                self._writer.send(b"\0")

    def take_all(self) -> list[Any]:
        with contextlib.suppress(OSError):
            self._reader.recv(4096)
        # cleared before draining: whoever puts after this point signals again
        self._signalled = False
        items = []
        with contextlib.suppress(Empty):
            while True:
                items.append(self._queue.get_nowait())
        return items

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def _set_common_options(sock: zmq.Socket[bytes]) -> None:
    sock.set(zmq.LINGER, LINGER_MS)
    # no high-water marks: credit bounds streams, deadlines bound calls, and a ROUTER at its mark
    # would either block all peers or drop messages
    sock.set(zmq.SNDHWM, 0)
    sock.set(zmq.RCVHWM, 0)
    sock.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    sock.set(zmq.TCP_KEEPALIVE, 1)


def _receive(
    sock: zmq.Socket[bytes], deliver: Callable[[list[memoryview]], None], at_most: int
) -> None:
    """Hands over the messages that are there, as views of ZeroMQ's own memory."""
    for _ in range(at_most):
        try:
            frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        deliver([memoryview(frame.buffer) for frame in frames])


class ZmqServer:
    """Binds in the constructor; answers until stopped."""

    def __init__(self, service: Service, address: str, n_threads: int) -> None:
        self._outbox = _Outbox()
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        _set_common_options(self._router)
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        try:
            self._router.bind(address[:-1] + "*" if address.endswith(":0") else address)
        except zmq.ZMQError as exc:
            self._router.close(0)
            self._outbox.close()
            if exc.errno == zmq.EADDRINUSE:
                raise FailedPrecondition(f"{address} is taken by another server") from exc
            raise InvalidInput(f"cannot listen at {address}: {exc}") from exc
        self.address: str = self._router.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        self._stopped = threading.Event()
        self._rpc: RpcServer[bytes] = RpcServer(
            service, n_threads, lambda peer, frames: self._outbox.put((peer, frames))
        )
        self._thread = threading.Thread(target=self._run, name=f"zmq {self.address}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._rpc.drain(timeout_s)
        self._stopped.set()
        self._outbox.put(None)
        self._thread.join(timeout=LINGER_MS / 1000 + 1.0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._outbox.fileno(), zmq.POLLIN)
        next_tick_s = time.monotonic() + KEEPALIVE_S
        while not self._stopped.is_set():
            poller.poll(int(max(next_tick_s - time.monotonic(), 0.0) * 1000) + 1)
            if time.monotonic() >= next_tick_s:
                self._rpc.tick()
                next_tick_s = time.monotonic() + KEEPALIVE_S
            _receive(self._router, self._deliver, RECEIVE_BATCH)
            self._send_all()
        self._send_all()
        self._unbind()
        self._router.close(LINGER_MS)
        self._outbox.close()

    def _unbind(self) -> None:
        """Waits until the port is free, so that whoever waits for `stop` can listen there again."""
        with contextlib.suppress(zmq.ZMQError):
            monitor = self._router.get_monitor_socket(int(zmq.Event.CLOSED))
            self._router.unbind(self.address)
            monitor.poll(LINGER_MS)
            self._router.disable_monitor()
            monitor.close(0)

    def _deliver(self, frames: list[memoryview]) -> None:
        self._rpc.on_message(bytes(frames[0]), frames[1:])

    def _send_all(self) -> None:
        for item in self._outbox.take_all():
            if item is None:
                continue
            peer, frames = item
            try:
                self._router.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as exc:
                if exc.errno != zmq.EHOSTUNREACH:
                    logger.warning("a message of %d frames was not sent: %s", len(frames), exc)
                self._rpc.on_peer_lost(peer)


class ZmqChannel(RpcClient):
    """Connects at the first request and again at the first one after a loss.

    There is no reconnecting in the background: a request that was given up must not be delivered
    to whoever listens at that address later.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address, self._enqueue, lambda: self._up)
        _reuse_received_memory()
        self._outbox = _Outbox()
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._up = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()

    def close(self) -> None:
        self.shut()
        with self._start_lock:
            self._stopping = True
            thread = self._thread
        if thread is None:
            self._outbox.close()
            return
        self._outbox.put(None)
        thread.join(timeout=LINGER_MS / 1000 + 1.0)

    def _enqueue(self, frames: Frames) -> None:
        if self._thread is None:
            with self._start_lock:
                if self._thread is None and not self._stopping:
                    self._thread = threading.Thread(
                        target=self._run, name=f"zmq-> {self.address}", daemon=True
                    )
                    self._thread.start()
        self._outbox.put(frames)

    def _run(self) -> None:
        while not self._stopping:
            poller = zmq.Poller()
            poller.register(self._outbox.fileno(), zmq.POLLIN)
            for sock in (self._dealer, self._monitor):
                if sock is not None:
                    poller.register(sock, zmq.POLLIN)
            try:
                while self._step(poller):
                    pass
            except Exception as exc:
                logger.exception("the connection to %s failed", self.address)
                self._disconnect(f"connection failed: {exc}")
        self._disconnect("channel closed")
        self._outbox.close()

    def _step(self, poller: zmq.Poller) -> bool:
        """One round; False when the set of sockets changed."""
        ready = dict(poller.poll(1000))
        if self._dealer is not None:
            _receive(self._dealer, self.on_message, RECEIVE_BATCH)
        if self._monitor is not None and self._monitor in ready and not self._check_monitor():
            return False
        requests = self._outbox.take_all()
        changed = False
        for frames in requests:
            if frames is None:
                return False
            # what was given up, or asks for an end that the loss already made, is not delivered
            if self._dealer is None and not self.wanted(frames):
                continue
            if self._dealer is None:
                self._connect()
                changed = True
            assert self._dealer is not None
            self._dealer.send_multipart(list(frames), zmq.NOBLOCK, copy=False)
        return not changed

    def _check_monitor(self) -> bool:
        """Reads the monitor's events; False if the peer is gone."""
        assert self._monitor is not None
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event & _UP:
                self._up = True
            elif event & _LOST:
                if self._dealer is not None:
                    _receive(self._dealer, self.on_message, sys.maxsize)
                self._disconnect("connection lost" if self._up else "connection refused")
                return False
        return True

    def _connect(self) -> None:
        self._dealer = zmq.Context.instance().socket(zmq.DEALER)
        _set_common_options(self._dealer)
        # never in practice: the socket is closed at the first loss. Not -1, for then ZeroMQ drops
        # the server's last words if they are unread when the connection goes
        self._dealer.set(zmq.RECONNECT_IVL, NEVER_MS)
        self._monitor = self._dealer.get_monitor_socket(_LOST | _UP)
        self._dealer.connect(self.address)

    def _disconnect(self, reason: str) -> None:
        self._up = False
        if self._dealer is not None:
            self._dealer.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(0)
            # what is still queued was given up unless the caller is closing in good order
            self._dealer.close(LINGER_MS if self._stopping else 0)
            self._dealer = self._monitor = None
        self.on_lost(reason)
