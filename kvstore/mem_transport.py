"""Transport inside one process: `mem://name`. Same contract, no sockets, buffers by reference."""

from __future__ import annotations

import threading
import weakref

from ..core.errors import FailedPrecondition
from .rpc_client import RpcClient
from .rpc_frames import KEEPALIVE_S, Frames
from .rpc_server import RpcServer
from .transport import Service

_servers: dict[str, MemServer] = {}
_lock = threading.Lock()


class MemServer:
    """Server under a name that is unique in this process."""

    def __init__(self, service: Service, address: str, n_threads: int) -> None:
        self.address = address
        self._peers: weakref.WeakSet[MemChannel] = weakref.WeakSet()
        self._stopped = threading.Event()
        with _lock:
            if address in _servers:
                raise FailedPrecondition(f"{address} is taken in this process")
            # complete before it can be found: somebody may be calling this address already
            self._rpc: RpcServer[MemChannel] = RpcServer(service, n_threads, self._send)
            _servers[address] = self
        threading.Thread(target=self._tick, name=f"mem {address}", daemon=True).start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._rpc.drain(timeout_s)
        self._stopped.set()
        with _lock:
            if _servers.get(self.address) is self:
                del _servers[self.address]
            peers = list(self._peers)
        for peer in peers:
            peer.on_lost("server stopped")

    def attach(self, peer: MemChannel) -> None:
        with _lock:
            self._peers.add(peer)

    def receive(self, peer: MemChannel, frames: Frames) -> None:
        self._rpc.on_message(peer, frames)

    def detach(self, peer: MemChannel) -> None:
        self._rpc.on_peer_lost(peer)

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def _send(self, peer: MemChannel, frames: Frames) -> None:
        peer.on_message(frames)

    def _tick(self) -> None:
        while not self._stopped.wait(KEEPALIVE_S):
            self._rpc.tick()


class MemChannel(RpcClient):
    """Delivers straight into the server's hands."""

    def __init__(self, address: str) -> None:
        super().__init__(address, self._deliver, lambda: self._server is not None)
        self._server: MemServer | None = None

    def close(self) -> None:
        self.shut()
        server = self._server
        if server is not None:
            server.detach(self)

    def _deliver(self, frames: Frames) -> None:
        server = self._server
        if server is None or server.stopped:
            with _lock:
                server = self._server = _servers.get(self.address)
            if server is None:
                self.on_lost("no such server in this process")
                return
            server.attach(self)
        server.receive(self, frames)
