"""The contract of kvstore/transport.py, on every transport."""

from __future__ import annotations

import gc
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from longreach.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidInput,
    StoreFull,
    Unavailable,
)
from longreach.kvstore.transport import Channel, Reply, Server, connect, serve
from longreach.kvstore.zmq_transport import ZmqChannel

from .echo_service import EchoService

TIMEOUT_S = 10.0


@pytest.fixture(params=["mem", "tcp"])
def address(request: pytest.FixtureRequest) -> str:
    return f"mem://{uuid.uuid4().hex}" if request.param == "mem" else "tcp://127.0.0.1:0"


@pytest.fixture
def service() -> EchoService:
    return EchoService()


@pytest.fixture
def server(address: str, service: EchoService) -> Iterator[Server]:
    server = serve(service, address, n_threads=4)
    yield server
    service.release.set()
    server.stop(1.0)


@pytest.fixture
def channel(server: Server) -> Iterator[Channel]:
    channel = connect(server.address)
    yield channel
    channel.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def test_unary_carries_header_and_buffers(channel: Channel) -> None:
    header = {"text": "ä", "n": -(2**40), "x": 0.5, "raw": b"\0\xff", "list": [1, None], "on": True}
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    reply = channel.call("echo", header, [b"", b"abc", memoryview(array)], timeout_s=TIMEOUT_S)
    assert reply.header == header
    assert [bytes(b) for b in reply.buffers] == [b"", b"abc", array.tobytes()]


def test_no_header_no_buffers(channel: Channel) -> None:
    assert channel.call("echo", timeout_s=TIMEOUT_S) == Reply({}, [])


def test_the_services_own_error_arrives_as_itself(channel: Channel) -> None:
    with pytest.raises(StoreFull, match="9 of 9") as caught:
        channel.call("fail", timeout_s=TIMEOUT_S)
    assert caught.value.details == {"slots": 9}


@pytest.mark.parametrize("method", ["bug", "unsendable"])
def test_anything_else_becomes_internal_error(channel: Channel, method: str) -> None:
    with pytest.raises(InternalError):
        channel.call(method, timeout_s=TIMEOUT_S)
    assert channel.call("echo", {"a": 1}, timeout_s=TIMEOUT_S).header == {"a": 1}


def test_unsendable_request_is_the_callers_error(channel: Channel) -> None:
    with pytest.raises(InvalidInput):
        channel.call("echo", {"x": object()}, timeout_s=TIMEOUT_S)
    with pytest.raises(InvalidInput):
        channel.call(
            "echo", {}, [memoryview(np.zeros((4, 4), np.uint8)[:, :2])], timeout_s=TIMEOUT_S
        )


def test_big_buffers(channel: Channel) -> None:
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 256, 4 << 20, dtype=np.uint8) for _ in range(3)]
    reply = channel.call("echo", {}, [memoryview(a) for a in sent], timeout_s=TIMEOUT_S)
    for array, buffer in zip(sent, reply.buffers, strict=True):
        assert np.array_equal(np.frombuffer(buffer, np.uint8), array)
        assert memoryview(buffer).readonly


def test_received_buffers_outlive_the_channel(server: Server) -> None:
    channel = connect(server.address)
    reply = channel.call("echo", {}, [b"x" * (1 << 20)], timeout_s=TIMEOUT_S)
    channel.close()
    gc.collect()
    assert bytes(reply.buffers[0]) == b"x" * (1 << 20)


def test_stream_in_order_to_its_end(channel: Channel) -> None:
    stream = channel.stream("count", {"n": 500}, idle_timeout_s=TIMEOUT_S)
    assert [reply.header["i"] for reply in stream] == list(range(500))
    assert next(iter(stream), None) is None


def test_empty_stream(channel: Channel) -> None:
    assert list(channel.stream("count", {"n": 0}, idle_timeout_s=TIMEOUT_S)) == []


def test_stream_of_a_unary_method_has_one_reply(channel: Channel) -> None:
    assert [r.header for r in channel.stream("echo", {"a": 1}, idle_timeout_s=TIMEOUT_S)] == [
        {"a": 1}
    ]


def test_call_of_a_streaming_method_is_refused(channel: Channel) -> None:
    with pytest.raises(InvalidInput, match="stream"):
        channel.call("count", {"n": 1}, timeout_s=TIMEOUT_S)


def test_stream_error_comes_after_its_replies(channel: Channel) -> None:
    stream = channel.stream("count_then_fail", {"n": 3}, idle_timeout_s=TIMEOUT_S)
    assert [next(stream).header["i"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreFull):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_server_does_not_run_far_ahead_of_a_slow_reader(
    channel: Channel, service: EchoService
) -> None:
    with channel.stream("count", {"n": 1000, "nbytes": 1000}, idle_timeout_s=TIMEOUT_S) as stream:
        next(stream)
        time.sleep(0.3)
        assert service.n_made <= 20
        for _ in range(50):
            next(stream)
    assert service.closed.wait(5.0)


def test_closing_a_stream_closes_the_servers_generator(
    channel: Channel, service: EchoService
) -> None:
    stream = channel.stream("count", {"n": 10**6, "pause_s": 0.01}, idle_timeout_s=TIMEOUT_S)
    next(stream)
    stream.close()
    assert service.closed.wait(5.0)
    made = service.n_made
    time.sleep(0.1)
    assert service.n_made == made
    assert made < 100


def test_dropping_a_stream_closes_it(channel: Channel, service: EchoService) -> None:
    stream = channel.stream("count", {"n": 10**6, "pause_s": 0.01}, idle_timeout_s=TIMEOUT_S)
    next(stream)
    del stream
    gc.collect()
    assert service.closed.wait(5.0)


def test_cancel_hook_wakes_a_waiting_iterator(channel: Channel, service: EchoService) -> None:
    stream = channel.stream("hooked", idle_timeout_s=TIMEOUT_S)
    next(stream)
    time.sleep(0.05)
    stream.close()
    assert service.closed.wait(5.0)


def test_client_that_closes_its_channel_cancels_its_streams(
    server: Server, service: EchoService
) -> None:
    channel = connect(server.address)
    stream = channel.stream("count", {"n": 10**6, "pause_s": 0.01}, idle_timeout_s=TIMEOUT_S)
    next(stream)
    channel.close()
    with pytest.raises(Unavailable):
        list(stream)
    assert service.closed.wait(5.0)
    with pytest.raises(Unavailable):
        channel.call("echo", timeout_s=TIMEOUT_S)


def test_call_deadline(channel: Channel) -> None:
    start_s = time.monotonic()
    channel.call("echo", timeout_s=TIMEOUT_S)
    with pytest.raises(DeadlineExceeded):
        channel.call("wait", timeout_s=0.2)
    assert time.monotonic() - start_s < 3.0
    assert channel.call("echo", {"a": 1}, timeout_s=TIMEOUT_S).header == {"a": 1}


def test_calls_that_waited_too_long_are_not_run(
    channel: Channel, service: EchoService, server: Server
) -> None:
    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(channel.call, "wait", timeout_s=TIMEOUT_S) for _ in range(4)]
        assert wait_until(lambda: service.n_handled == 4)
        with pytest.raises(DeadlineExceeded):
            channel.call("echo", timeout_s=0.1)
        # a busy machine may have read it late: its time counts from then on
        time.sleep(0.5)
        service.release.set()
        assert all(f.result().header == {"waited": True} for f in held)
    channel.call("sum", timeout_s=TIMEOUT_S)
    assert service.n_handled == 5  # the four and the sum, not the echo


def test_a_slow_but_live_stream_is_not_given_up(channel: Channel) -> None:
    stream = channel.stream("count", {"n": 2, "pause_s": 2.5}, idle_timeout_s=1.8)
    assert [reply.header["i"] for reply in stream] == [0, 1]


def test_open_streams_leave_room_for_calls(channel: Channel) -> None:
    streams = [channel.stream("hooked", idle_timeout_s=TIMEOUT_S) for _ in range(16)]
    for stream in streams:
        next(stream)
    assert channel.call("echo", {"a": 1}, timeout_s=TIMEOUT_S).header == {"a": 1}
    for stream in streams:
        stream.close()


def test_many_threads_on_one_channel(channel: Channel) -> None:
    def work(i: int) -> None:
        payload = np.full(10_000 * (i % 3) + 1, i % 256, np.uint8)
        for k in range(20):
            reply = channel.call("echo", {"i": i, "k": k}, [memoryview(payload)], timeout_s=30)
            assert reply.header == {"i": i, "k": k}
            assert np.array_equal(np.frombuffer(reply.buffers[0], np.uint8), payload)
        numbers = [r.header["i"] for r in channel.stream("count", {"n": 30}, idle_timeout_s=30)]
        assert numbers == list(range(30))

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work, i) for i in range(16)]:
            future.result(60)


def test_server_stop_ends_streams_and_refuses_calls(
    server: Server, channel: Channel, service: EchoService
) -> None:
    stream = channel.stream("count", {"n": 10**6, "pause_s": 0.02}, idle_timeout_s=TIMEOUT_S)
    next(stream)
    start_s = time.monotonic()
    server.stop(2.0)
    with pytest.raises(Unavailable):
        list(stream)
    assert service.closed.wait(5.0)
    with pytest.raises(Unavailable):
        channel.call("echo", timeout_s=TIMEOUT_S)
    assert time.monotonic() - start_s < 5.0


def test_server_stop_lets_running_calls_finish(
    server: Server, channel: Channel, service: EchoService
) -> None:
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(channel.call, "wait", {"seconds": 0.5}, timeout_s=TIMEOUT_S)
        assert wait_until(lambda: service.n_handled == 1)
        server.stop(5.0)
        assert held.result(5.0).header == {"waited": True}


def test_a_reply_and_the_loss_of_the_connection_may_arrive_together(
    server: Server, channel: Channel, service: EchoService, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(channel, ZmqChannel):
        step = ZmqChannel._step

        class Late:
            """A busy machine: when the thread looks again, both are there."""

            def __init__(self, poller: Any) -> None:
                self._poller = poller

            def poll(self, timeout_ms: int) -> Any:
                time.sleep(0.3)
                return self._poller.poll(0)

        monkeypatch.setattr(ZmqChannel, "_step", lambda self, poller: step(self, Late(poller)))
    channel.call("echo", timeout_s=TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(channel.call, "wait", {"seconds": 0.5}, timeout_s=TIMEOUT_S)
        assert wait_until(lambda: service.n_handled == 2)
        server.stop(5.0)
        assert held.result(5.0).header == {"waited": True}


def test_server_stop_does_not_wait_for_ever(
    server: Server, channel: Channel, service: EchoService
) -> None:
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(channel.call, "wait", {"seconds": 20}, timeout_s=TIMEOUT_S)
        assert wait_until(lambda: service.n_handled == 1)
        start_s = time.monotonic()
        server.stop(0.2)
        with pytest.raises(Unavailable):
            held.result(5.0)
        assert time.monotonic() - start_s < 4.0
        service.release.set()


def test_a_channel_finds_a_server_started_again(server: Server, channel: Channel) -> None:
    channel.call("echo", timeout_s=TIMEOUT_S)
    server.stop(1.0)
    with pytest.raises(Unavailable):
        channel.call("echo", timeout_s=TIMEOUT_S)
    again = serve(EchoService(), server.address)
    try:
        assert channel.call("echo", {"a": 1}, timeout_s=TIMEOUT_S).header == {"a": 1}
    finally:
        again.stop(1.0)


def test_absent_server_is_unavailable_at_once(address: str) -> None:
    if address.startswith("tcp"):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"  # bound, nobody listens
    channel = connect(address)
    start_s = time.monotonic()
    with pytest.raises(Unavailable):
        channel.call("echo", timeout_s=TIMEOUT_S)
    with pytest.raises(Unavailable):
        next(channel.stream("count", {"n": 1}, idle_timeout_s=TIMEOUT_S))
    assert time.monotonic() - start_s < 3.0
    channel.close()


def test_taken_and_malformed_addresses(server: Server) -> None:
    with pytest.raises(FailedPrecondition):
        serve(EchoService(), server.address)
    for bad in ("http://x", "tcp://nowhere.invalid:x", ""):
        with pytest.raises(InvalidInput):
            serve(EchoService(), bad)


def test_replies_of_a_bundle_are_replies(channel: Channel) -> None:
    header = {"n": 100, "nbytes": 1000}
    stream = channel.stream(
        "count", header, idle_timeout_s=TIMEOUT_S, credit=16, bundle_bytes=1 << 20
    )
    replies = list(stream)
    assert [reply.header["i"] for reply in replies] == list(range(100))
    for i, reply in enumerate(replies):
        assert [bytes(buffer) for buffer in reply.buffers] == [bytes([i]) * 1000]


def test_bundles_save_messages(server: Server, service: EchoService) -> None:
    sent = []
    rpc = server._rpc  # type: ignore[attr-defined]
    send = rpc._send
    rpc._send = lambda peer, frames: (sent.append(bytes(frames[0])[:1]), send(peer, frames))
    channel = connect(server.address)
    for bundle_bytes, n_least, n_most in ((0, 64, 64), (8000, 8, 20), (1 << 20, 1, 12)):
        sent.clear()
        header = {"n": 64, "nbytes": 1000}
        stream = channel.stream(
            "count", header, idle_timeout_s=TIMEOUT_S, credit=64, bundle_bytes=bundle_bytes
        )
        assert len(list(stream)) == 64
        n_messages = sum(kind in (b"R", b"B") for kind in sent)
        assert n_least <= n_messages <= n_most, bundle_bytes
    channel.close()


def test_the_first_reply_of_a_bundled_stream_comes_at_once(channel: Channel) -> None:
    header = {"n": 3, "pause_s": 0.3}
    stream = channel.stream("count", header, idle_timeout_s=TIMEOUT_S, bundle_bytes=1 << 20)
    start_s = time.monotonic()
    assert next(stream).header == {"i": 0}
    assert time.monotonic() - start_s < 0.6, "it waited for the second"
    assert [reply.header["i"] for reply in stream] == [1, 2]


def test_bundled_replies_before_a_failure_arrive(channel: Channel) -> None:
    stream = channel.stream(
        "count_then_fail", {"n": 10}, idle_timeout_s=TIMEOUT_S, bundle_bytes=1 << 20
    )
    assert [next(stream).header["i"] for _ in range(10)] == list(range(10))
    with pytest.raises(StoreFull):
        next(stream)
