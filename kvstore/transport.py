"""The one wire between parts (DESIGN 1.4): requests with a msgpack header and buffers out of band.

The contract, the same on every transport (tests/kvstore/test_transport.py runs on all of them):

- Unary: `Channel.call` sends one request and waits at most `timeout_s`. The service's own
  LongreachError arrives as itself; anything else it raised arrives as InternalError.
- Streaming: `Channel.stream` yields replies as the service makes them. The server never runs more
  than a few replies ahead of the reader. Closing the stream closes the service's iterator; if
  that iterator has a `cancel()` method it is called at once, from another thread, so that an
  iterator that is waiting can wake up. The server sends signs of life about every second, so
  silence means a dead peer.
- A peer that cannot be reached, or went away in the middle: Unavailable. A live peer that is too
  slow: DeadlineExceeded. Malformed messages are answered with InvalidInput where they can be
  answered, dropped otherwise, and never harm a server.
- Received buffers are read-only views of the message; they stay valid as long as they are held.
  Sent buffers must not change until the call returns or the stream ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ..core.errors import InvalidInput

Buffer = bytes | bytearray | memoryview


class Reply(NamedTuple):
    """A header of plain values, and C-contiguous buffers beside it."""

    header: dict[str, Any]
    buffers: Sequence[Buffer] = ()


class Unanswered(Exception):
    """Raised by a service, or by its stream, that leaves its caller without an answer (fault
    injection): nothing is sent, as if the message was lost."""


class Service(Protocol):
    """What a server answers with. Called from many threads at once."""

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        """One request. A streaming method returns an iterator (usually a generator)."""
        ...


class ReplyStream(Protocol):
    """An open stream. Close it, or leave its `with` block, to cancel at the server."""

    def __iter__(self) -> Iterator[Reply]: ...

    def __next__(self) -> Reply: ...

    def __enter__(self) -> ReplyStream: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def close(self) -> None: ...

    def cancel(self) -> None:
        """`close` from any thread: a reader that waits gets Cancelled at once."""
        ...


class Channel(Protocol):
    """A connection to one server; any number of threads may use it. Connects when first used."""

    address: str

    def call(
        self,
        method: str,
        header: dict[str, Any] | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float,
    ) -> Reply:
        """One reply. Raises DeadlineExceeded, Unavailable or the service's own error."""
        ...

    def stream(
        self,
        method: str,
        header: dict[str, Any] | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        idle_timeout_s: float,
        credit: int = ...,
        bundle_bytes: int = ...,
    ) -> ReplyStream:
        """Sends the request now; `next` raises Unavailable after idle_timeout_s of silence.

        credit: replies that may be under way. bundle_bytes: the server may send so many bytes of
        replies together, which is quicker, but keeps one waiting while the service makes the
        next; 0 sends each at once.
        """
        ...

    def close(self) -> None:
        """Ends every open call and stream of this channel with Unavailable."""
        ...


class Server(Protocol):
    """A running server. `address` is what `connect` takes (a port of 0 is already resolved)."""

    address: str

    def stop(self, timeout_s: float = 5.0) -> None:
        """Refuses new requests, lets running calls finish for timeout_s, cancels all streams."""
        ...


def serve(service: Service, address: str = "tcp://127.0.0.1:0", n_threads: int = 8) -> Server:
    """Starts answering at `tcp://host:port` (other processes) or `mem://name` (this process).

    n_threads bounds the unary calls in progress; every open stream has a thread of its own, so
    long streams never keep a health check waiting. Raises FailedPrecondition if the address is
    taken, InvalidInput if it is malformed.
    """
    # imported here because the transports import this module for its protocols
    if address.startswith("tcp://"):
        from .zmq_transport import ZmqServer

        return ZmqServer(service, address, n_threads)
    if address.startswith("mem://"):
        from .mem_transport import MemServer

        return MemServer(service, address, n_threads)
    raise InvalidInput(f"address {address!r} must start with tcp:// or mem://")


def connect(address: str) -> Channel:
    """A channel to a server. Never waits; an absent peer shows in the first call."""
    if address.startswith("tcp://"):
        from .zmq_transport import ZmqChannel

        return ZmqChannel(address)
    if address.startswith("mem://"):
        from .mem_transport import MemChannel

        return MemChannel(address)
    raise InvalidInput(f"address {address!r} must start with tcp:// or mem://")
