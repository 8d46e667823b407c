"""Pages between a store's process and a worker: in place against memcpy, over loopback, by plan against
one by one."""

from __future__ import annotations

import mmap
import resource
import time
from typing import Any

import numpy as np

from longreach.core.page_key import PageKey
from longreach.kvstore.page import Bytes
from longreach.kvstore.page_client import PageClient

from .store_peers import GEOMETRY, acquire, client_of, fill, key_of, median_s, store_process

PAGE = GEOMETRY.page_nbytes


def _aligned(n_pages: int) -> Bytes:
    """uint8 [n_pages, page], at a system page, as arenas, private slots and torch's banks are (to 64
    bytes): a copy between addresses that differ in their low bits took 4 times as long."""
    made = np.frombuffer(mmap.mmap(-1, n_pages * PAGE), np.uint8).reshape(n_pages, PAGE)
    made[:] = 1
    return made


def in_place(client: PageClient, keys: list[PageKey], n_times: int) -> dict[str, float]:
    """Copies of pages from the arena into a bank, against memcpy of as many bytes of the process's own,
    in processor time of the thread: on a busy machine the clock would time the others. The two
    alternate."""
    bank, own = _aligned(len(keys)), _aligned(len(keys))
    handles = acquire(client, keys, "bank")
    pages = [
        client.memories[h.memory][h.first_leaf_row * GEOMETRY.leaf_nbytes :][:PAGE] for h in handles
    ]

    def copy(sources: Any) -> float:
        start_s = time.thread_time()
        for slot, source in zip(bank, sources, strict=True):
            np.copyto(slot, source)
        return time.thread_time() - start_s

    copy(pages), copy(own)
    pairs = [(copy(pages), copy(own)) for _ in range(n_times)]
    client.release("bank")
    shared_s, memcpy_s = (float(np.median(times)) for times in zip(*pairs, strict=True))

    def acquired(i: int) -> None:
        acquire(client, keys, f"row-{i}")
        client.release(f"row-{i}")

    acquire_s = median_s(acquired, n_times)
    n_bytes = len(keys) * PAGE
    return {
        "memcpy_gb_per_s": n_bytes / memcpy_s / 1e9,
        "copy_from_arena_gb_per_s": n_bytes / shared_s / 1e9,
        "copy_from_arena_of_memcpy": float(np.median([m / s for s, m in pairs])),
        "acquire_and_check_gb_per_s": n_bytes / acquire_s / 1e9,
        "acquire_us_per_page": acquire_s / len(keys) * 1e6,
    }


def by_plan(client: PageClient, keys: list[PageKey], n_times: int) -> dict[str, float]:
    """One batch against a call for each page."""

    def batch(i: int) -> None:
        acquire(client, keys, f"batch-{i}")
        client.release(f"batch-{i}")

    def singles(i: int) -> None:
        for key in keys:
            acquire(client, [key], f"single-{i}")
        client.release(f"single-{i}")

    before = resource.getrusage(resource.RUSAGE_SELF)
    batch_s = median_s(batch, n_times)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    n_bytes = len(keys) * PAGE
    single_s = median_s(singles, max(1, n_times // 3))
    return {
        "n_pages": len(keys),
        "batch_gb_per_s": n_bytes / batch_s / 1e9,
        "client_cpu_s_per_gb": cpu_s / (n_times + 1) / n_bytes * 1e9,
        "one_by_one_gb_per_s": n_bytes / single_s / 1e9,
        "batch_speedup": single_s / batch_s,
    }


def measure(n_pages: int, n_times: int) -> dict[str, dict[str, float]]:
    with store_process("store-0") as (one, _), store_process("store-1") as (two, _):
        addresses = {"store-0": one, "store-1": two}
        fill(addresses, range(n_pages), replicas=1)
        keys = [key_of(i) for i in range(n_pages)]
        found = {}
        with_node = client_of({"store-0": one}, "near", node_id="store-0")
        # what this store has of the pages
        near = [key for key, held in zip(keys, with_node.lookup(keys), strict=True) if held]
        found["in place"] = in_place(with_node, near, n_times)
        found["plan, in place"] = by_plan(with_node, near, n_times)
        with_node.close()
        far = client_of(addresses, "far")
        found["plan, over loopback"] = by_plan(far, keys, n_times)
        far.close()
    return {name: {k: round(v, 3) for k, v in row.items()} for name, row in found.items()}
