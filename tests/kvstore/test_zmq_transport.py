"""What only a network can do: malformed messages, frozen and killed processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import zmq

from longreach.core.codec import pack_header
from longreach.core.errors import (
    DeadlineExceeded,
    Unavailable,
)
from longreach.kvstore.transport import connect, serve

from .echo_service import EchoService


def test_malformed_messages_are_answered_or_dropped() -> None:
    server = serve(EchoService())
    raw = zmq.Context.instance().socket(zmq.DEALER)
    raw.linger = 0
    raw.connect(server.address)
    request_id = (7).to_bytes(8, "big")
    good = pack_header({"method": "echo", "timeout_s": 5.0, "body": {}})
    dropped = [[b""], [b"C" + request_id], [b"?" + request_id, good], [b"C", good], [b"x" * 1000]]
    answered = [
        [b"C" + request_id, b""],
        [b"C" + request_id, b"\x01\xc1"],
        [b"C" + request_id, b"\x09" + good[1:]],
        [b"C" + request_id, pack_header({"method": 3, "body": {}})],
        [b"C" + request_id, pack_header({"method": "echo", "timeout_s": "x", "body": {}})],
        [b"C" + request_id, pack_header({"method": "echo", "timeout_s": 1, "body": []})],
        [b"S" + request_id, pack_header({"method": "count", "body": {"n": 1}})],
        [b"S" + request_id, pack_header({"method": "count", "credit": -1, "body": {"n": 1}})],
    ]
    try:
        for frames in dropped:
            raw.send_multipart(frames)
        for kind in (b"K", b"X"):  # for a stream that does not exist
            raw.send_multipart([kind + request_id, pack_header({"credit": 1})])
        for frames in answered:
            raw.send_multipart(frames)
            assert raw.poll(5000)
            tag, header = raw.recv_multipart()[:2]
            assert tag == b"F" + request_id
            assert b"InvalidInput" in header
        raw.send_multipart([b"C" + request_id, good])
        assert raw.poll(5000)
        assert raw.recv_multipart()[0] == b"R" + request_id
        with socket.create_connection(("127.0.0.1", int(server.address.rsplit(":", 1)[1]))) as web:
            web.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        raw.send_multipart([b"C" + request_id, good])
        assert raw.poll(5000)
    finally:
        raw.close(0)
        server.stop(1.0)


def test_a_server_that_never_answers_is_unavailable() -> None:
    """Something accepts the connection and says nothing, as a frozen machine would."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        channel = connect(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        start_s = time.monotonic()
        with pytest.raises(Unavailable):
            channel.call("echo", timeout_s=0.5)
        with pytest.raises(Unavailable):
            next(channel.stream("count", {"n": 1}, idle_timeout_s=0.5))
        assert time.monotonic() - start_s < 3.0
        channel.close()


CHILD = """
import sys, time
sys.path[:0] = {path!r}
from longreach.kvstore.transport import Reply, serve, connect
class Slow:
    def handle(self, method, header, buffers):
        if method == "echo":
            return Reply(header, buffers)
        return self.count()
    def count(self):
        while True:
            time.sleep(0.05)
            yield Reply({{}})
if sys.argv[1] == "server":
    server = serve(Slow())
    print(server.address, flush=True)
    time.sleep(60)
else:
    header = {{"n": 10**6, "pause_s": 0.01}}
    stream = connect(sys.argv[1]).stream("count", header, idle_timeout_s=10)
    next(stream)
    print("reading", flush=True)
    for _ in stream:
        pass
"""


def start_child(argument: str) -> tuple[subprocess.Popen[str], str]:
    import longreach

    assert longreach.__file__ is not None
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(path=[p for p in sys.path if p]), argument],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    said = child.stdout.readline().strip()
    child.stdout.close()
    return child, said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_server_process(how: signal.Signals) -> None:
    child, address = start_child("server")
    try:
        channel = connect(address)
        stream = channel.stream("count", idle_timeout_s=2.0)
        next(stream)
        os.kill(child.pid, how)
        start_s = time.monotonic()
        with pytest.raises(Unavailable):
            list(stream)
        assert time.monotonic() - start_s < 4.0
        with pytest.raises((Unavailable, DeadlineExceeded)):
            channel.call("echo", timeout_s=0.5)
        channel.close()
    finally:
        child.kill()
        child.wait()


def test_killed_client_process_cancels_its_stream() -> None:
    service = EchoService()
    server = serve(service)
    try:
        child, said = start_child(server.address)
        assert said == "reading"
        child.kill()
        child.wait()
        assert service.closed.wait(5.0)
    finally:
        server.stop(1.0)
