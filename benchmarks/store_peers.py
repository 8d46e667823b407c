"""Stores in processes of their own, and a client that reads 256 KiB pages of them."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from longreach.core.page_key import ROOT_KEY, PageKey, RecipeFingerprint
from longreach.kvstore.page import Bytes, PageGeometry
from longreach.kvstore.page_client import PageClient, PageHandle

GEOMETRY = PageGeometry(n_layers=4, n_kv_heads=4, page_tokens=64, head_dim=64, kv_dtype="float16")
"""Pages of 256 KiB."""
RECIPE = RecipeFingerprint(b"r" * 32)


def key_of(i: int) -> PageKey:
    return PageKey(np.random.default_rng(i).bytes(32))


def page_of(i: int) -> Bytes:
    return np.random.default_rng(i).integers(0, 256, GEOMETRY.page_nbytes, np.uint8)


def serve_store(argv: Sequence[str]) -> None:
    """Prints its address, then answers until it is killed."""
    from longreach.kvstore.store_service import StoreService
    from longreach.kvstore.transport import serve

    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--address", default="tcp://127.0.0.1:0")
    parser.add_argument("--pages", type=int, default=1024)
    arguments = parser.parse_args(argv)
    n_bytes = arguments.pages * GEOMETRY.page_nbytes
    service = StoreService(arguments.name, arguments.name, "/dev/shm", GEOMETRY, n_bytes)
    server = serve(service, arguments.address)
    print(server.address, flush=True)
    sys.stdin.read()  # until its starter is gone
    server.stop(0.5)
    service.close()


@contextlib.contextmanager
def store_process(
    name: str, *arguments: str, before: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of a store. before: a command that runs the rest of its arguments."""
    command = [*before, sys.executable, "-m", "benchmarks.store_peers", name, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the store {name} did not start")
        yield address, process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def client_of(addresses: Mapping[str, str], owner: str, **options: Any) -> PageClient:
    settings: dict[str, Any] = {"replicas": 1, "node_id": "client", **options}
    return PageClient(
        addresses, GEOMETRY, RECIPE, lease_s=600.0, timeout_s=120.0, owner=owner, **settings
    )


def fill(addresses: Mapping[str, str], numbers: range, replicas: int) -> None:
    client = client_of(addresses, "filler", replicas=replicas)
    for future in [client.store(key_of(i), ROOT_KEY, page_of(i), "fill") for i in numbers]:
        future.result(120)
    client.close()


def acquire(client: PageClient, keys: Sequence[PageKey], row: str) -> list[PageHandle]:
    handles = [handle for handle in client.acquire(keys, row) if handle is not None]
    if len(handles) != len(keys):
        raise RuntimeError(f"{len(keys) - len(handles)} of {len(keys)} pages did not come")
    return handles


def median_s(act: Callable[[int], Any], n: int) -> float:
    """Median time of n calls after one that is not counted; each is told its number."""
    times_s = []
    for i in range(n + 1):
        start_s = time.perf_counter()
        act(i)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:])


if __name__ == "__main__":
    serve_store(sys.argv[1:])
