"""Round trips between two processes of one node: which wire carries pages (docs/decisions/0002).

    python -m benchmarks.transport [--seconds 2] [--pages 512] [--out benchmarks/results/transport.json]

One request of a few bytes, one answer of 256 KiB or 4 MiB, as a store answers a read. Every peer
runs in a process of its own. "stream" takes 64 answers from one request; its time is per answer.
Then pages as a worker reads them, from stores of their own (page_rates.py). On a machine that other
work keeps busy compare lines of one run, not absolute values.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SIZES = (256 << 10, 4 << 20)
N_STREAM = 64
HERE = Path(__file__).resolve()


# The peers: each prints its address, then answers until it is killed.


def peer_longreach() -> None:
    from longreach.kvstore.transport import Reply, serve

    pages = {size: os.urandom(size) for size in SIZES}

    class Pages:
        def handle(self, method: str, header: dict[str, Any], buffers: Any) -> Any:
            if method == "nothing":
                return Reply({})
            if method == "page":
                return Reply({}, [pages[header["size"]]])
            return (Reply({}, [pages[header["size"]]]) for _ in range(N_STREAM))

    print(serve(Pages()).address, flush=True)
    time.sleep(3600)


def peer_grpc() -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    pages = {size: os.urandom(size) for size in SIZES}

    def unary(request: bytes, context: Any) -> bytes:
        return pages[int(request)]

    def stream(request: bytes, context: Any) -> Iterator[bytes]:
        for _ in range(N_STREAM):
            yield pages[int(request)]

    handlers = {
        "page": grpc.unary_unary_rpc_method_handler(unary),
        "pages": grpc.unary_stream_rpc_method_handler(stream),
    }
    server = grpc.server(ThreadPoolExecutor(4), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


def peer_socket() -> None:
    pages = {size: os.urandom(size) for size in SIZES}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(4):
            connection.sendall(pages[struct.unpack("<I", request)[0]])


GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
PEERS = {"longreach": peer_longreach, "grpc": peer_grpc, "socket": peer_socket}


def start_peer(name: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE), "--peer", name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


# The callers: each yields (what, size -> bytes received, answers per call).

Fetch = Callable[[int], int]


def longreach_calls(address: str) -> dict[str, tuple[Fetch, int]]:
    from longreach.kvstore.transport import connect

    channel = connect(address)

    def unary(size: int) -> int:
        reply = channel.call("page", {"size": size}, timeout_s=30.0)
        return memoryview(reply.buffers[0]).nbytes

    def stream(size: int) -> int:
        replies = channel.stream(
            "pages", {"size": size}, idle_timeout_s=30.0, credit=64, bundle_bytes=2 << 20
        )
        return sum(memoryview(reply.buffers[0]).nbytes for reply in replies)

    def idle(size: int) -> int:
        channel.call("nothing", timeout_s=30.0)
        return size

    return {
        "longreach (zmq) empty": (idle, 1),
        "longreach (zmq) unary": (unary, 1),
        "longreach (zmq) stream": (stream, N_STREAM),
    }


def grpc_calls(address: str) -> dict[str, tuple[Fetch, int]]:
    import grpc

    channel = grpc.insecure_channel(address, options=GRPC_OPTIONS)
    page = channel.unary_unary("/bench/page")
    pages = channel.unary_stream("/bench/pages")

    def unary(size: int) -> int:
        return len(page(str(size).encode(), timeout=30.0))

    def stream(size: int) -> int:
        return sum(len(reply) for reply in pages(str(size).encode(), timeout=30.0))

    return {"gRPC unary": (unary, 1), "gRPC stream": (stream, N_STREAM)}


def socket_calls(address: str) -> dict[str, tuple[Fetch, int]]:
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received = bytearray(max(SIZES))

    def unary(size: int) -> int:
        connection.sendall(struct.pack("<I", size))
        view, n_bytes = memoryview(received)[:size], 0
        while n_bytes < size:
            n_bytes += connection.recv_into(view[n_bytes:])
        return n_bytes

    return {"plain socket": (unary, 1)}


def ray_calls() -> dict[str, tuple[Fetch, int]]:
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )

    class Pages:
        def __init__(self) -> None:
            self._pages = {size: os.urandom(size) for size in SIZES}

        def page(self, size: int) -> bytes:
            return self._pages[size]

    actor = ray.remote(Pages).remote()  # type: ignore[attr-defined]

    def unary(size: int) -> int:
        return len(ray.get(actor.page.remote(size), timeout=30.0))

    return {"Ray actor call": (unary, 1)}


def measure(fetch: Fetch, n_answers: int, size: int, seconds: float) -> dict[str, float]:
    """Milliseconds per answer and GB/s, after a warm-up."""
    for _ in range(3):
        assert fetch(size) == size * n_answers
    times_s = []
    end_s = time.perf_counter() + seconds
    while len(times_s) < 20 or (time.perf_counter() < end_s and len(times_s) < 5000):
        start_s = time.perf_counter()
        fetch(size)
        times_s.append((time.perf_counter() - start_s) / n_answers)
    median_s = statistics.median(times_s)
    return {
        "n_calls": len(times_s),
        "median_ms": round(median_s * 1e3, 3),
        "p95_ms": round(statistics.quantiles(times_s, n=20)[-1] * 1e3, 3),
        "gb_per_s": round(size / median_s / 1e9, 3),
    }


def machine() -> dict[str, Any]:
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def commit(paths: Sequence[str] = ("kvstore", "benchmarks/transport.py")) -> str:
    """The checked-out commit, marked where what is measured differs from it."""
    git = ["git", "-C", str(HERE.parent.parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def run(seconds: float, with_ray: bool) -> list[dict[str, Any]]:
    rows = []
    makers: list[tuple[str, Callable[[str], dict[str, tuple[Fetch, int]]]]] = [
        ("longreach", longreach_calls),
        ("grpc", grpc_calls),
        ("socket", socket_calls),
    ]
    if with_ray:
        makers.append(("", lambda _: ray_calls()))
    for name, make in makers:
        process, address = start_peer(name) if name else (None, "")
        try:
            for what, (fetch, n_answers) in make(address).items():
                for size in SIZES:
                    row = {"what": what, "bytes": size}
                    rows.append({**row, **measure(fetch, n_answers, size, seconds)})
        finally:
            if process is not None:
                process.kill()
                process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per line of the table")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "transport.json")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--pages", type=int, default=512, help="of 256 KiB in a batch")
    parser.add_argument("--times", type=int, default=9, help="batches per line")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        PEERS[arguments.peer]()
        return
    rows = run(arguments.seconds, not arguments.no_ray)
    print(f"{'':24}{'size':>10}{'median ms':>12}{'p95 ms':>10}{'GB/s':>8}")
    for row in rows:
        print(
            f"{row['what']:24}{row['bytes'] >> 10:>6} KiB{row['median_ms']:>12.3f}"
            f"{row['p95_ms']:>10.3f}{row['gb_per_s']:>8.2f}"
        )
    # imported here because harness and page_rates import this module
    from benchmarks.harness import write_result
    from benchmarks.page_rates import measure as measure_pages

    pages = measure_pages(arguments.pages, arguments.times)
    for name, row in pages.items():
        print(name, *(f"{what} {value}" for what, value in row.items()), sep="  ")
    result = {"commit": commit(), "machine": machine(), "command": sys.argv[1:]}
    write_result(arguments.out, {**result, "rows": rows, "pages": pages})


if __name__ == "__main__":
    main()
