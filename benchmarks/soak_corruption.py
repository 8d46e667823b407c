"""A million page reads from stores that damage one page in a hundred: no wrong page may be accepted.

    python -m benchmarks.soak_corruption [--reads 1000000] [--share 0.01] [--seed 7]

The real client reads random batches from three real stores, two copies of each page, in four ways: in
place (mapped arenas) and over the wire, each on the in-memory transport and on TCP. The fault plan flips
a bit of a page on its way, or in the store's own memory just before it is read or handed out. Every page
that the client accepts is compared with the truth. A page of which no good copy is left is made again
and stored, as a worker does. Every injected fault must have been counted as found: by the client on
the way and in place, by the store in its own memory.

Reads are not hedged, so that every damaged answer is one that somebody reads. Ends with exit code 1 if
a wrong page was accepted or a fault went uncounted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from longreach.cluster.parts import build_store
from longreach.core.config import Config
from longreach.core.page_key import ROOT_KEY, PageKey, RecipeFingerprint
from longreach.kvstore.page import Bytes, PageGeometry
from longreach.kvstore.page_client import PageClient, PageHandle
from longreach.kvstore.transport import connect, serve

from .harness import ROOT, console, no_log, record, write_result

N_READS = 1_000_000
N_PAGES = 4096
N_STORES = 3
BATCH = 1024
SAY_EVERY_S = 20.0
# 2 KiB a page, so that the run is one of decisions and not of bytes
GEOMETRY = PageGeometry(n_layers=2, n_kv_heads=2, page_tokens=8, head_dim=16, kv_dtype="float16")
RECIPE = RecipeFingerprint(b"soak".ljust(32, b"."))
WAYS = tuple(itertools.product(("mem", "tcp"), ("in place", "from disk", "wire")))
KINDS = ("corrupt_sent", "corrupt_mapped", "corrupt_held", "corrupt_write")

_serial = itertools.count()
Row = dict[str, Any]


def soak_config(seed: int, share: float, n_pages: int, arena_dir: Path, way: str = "") -> Config:
    """Stores with room for everything; nothing but corruption goes wrong. From disk: one page in eight
    is in the arena."""
    n_bytes = 2 * n_pages * GEOMETRY.page_nbytes
    store: dict[str, Any] = {"count": N_STORES, "arena_dir": str(arena_dir)}
    if way == "from disk":
        store |= {"capacity_bytes": n_bytes // 16, "disk_bytes": n_bytes}
        store |= {"disk_dir": str(arena_dir / f"disk-{next(_serial)}"), "scrub_bytes_per_s": 0}
    else:
        store["capacity_bytes"] = n_bytes
    return Config.model_validate({"store": store, "faults": {"seed": seed, "corrupt": share}})


class Truth:
    """What every page must be."""

    def __init__(self, seed: int, n_pages: int) -> None:
        rng = np.random.default_rng(seed)
        self.pages = rng.integers(0, 256, (n_pages, GEOMETRY.page_nbytes), np.uint8)
        self.keys = [PageKey(rng.bytes(32)) for _ in range(n_pages)]

    def store(self, client: PageClient, numbers: Sequence[int], row: str) -> None:
        futures = [client.store(self.keys[i], ROOT_KEY, self.pages[i], row) for i in numbers]
        for future in futures:
            future.result(timeout=60.0)


def bytes_of(client: PageClient, handle: PageHandle) -> Bytes:
    leaves = client.memories[handle.memory].reshape(-1, GEOMETRY.leaf_nbytes)
    return leaves[handle.first_leaf_row : handle.first_leaf_row + GEOMETRY.n_leaves].reshape(-1)


def soak(config: Config, scheme: str, way: str, n_reads: int, n_pages: int) -> Row:
    """One way of reading; the numbers of it."""
    truth = Truth(config.faults.seed, n_pages)
    rng = np.random.default_rng(config.faults.seed + 1)
    with contextlib.ExitStack() as stack:
        addresses = {}
        for i in range(N_STORES):
            service: Any = build_store(config, f"store-{i}", "soak", GEOMETRY.to_dict())
            stack.callback(service.close)
            address = f"mem://soak-{next(_serial)}" if scheme == "mem" else "tcp://127.0.0.1:0"
            server = serve(service, address)
            stack.callback(server.stop)
            addresses[f"store-{i}"] = server.address
        client = PageClient(
            addresses,
            GEOMETRY,
            RECIPE,
            replicas=2,
            lease_s=600.0,
            timeout_s=20.0,
            node_id="soak",
            owner="soak",
            force_wire=way == "wire",
            hedge=False,
        )
        stack.callback(client.close)
        truth.store(client, range(n_pages), "first")
        client.release("first")
        n_accepted = n_wrong = n_recomputed = n_asked = 0
        started_s = spoken_s = time.monotonic()
        while n_asked < n_reads:
            numbers = rng.choice(n_pages, min(BATCH, n_pages, n_reads - n_asked), replace=False)
            n_asked += len(numbers)
            row = f"row-{n_asked}"
            missing = []
            handles = client.acquire([truth.keys[i] for i in numbers], row)
            for i, handle in zip(numbers, handles, strict=True):
                if handle is None:
                    missing.append(int(i))
                    continue
                n_accepted += 1
                n_wrong += not np.array_equal(bytes_of(client, handle), truth.pages[i])
            truth.store(client, missing, row)
            n_recomputed += len(missing)
            client.release(row)
            if time.monotonic() - spoken_s > SAY_EVERY_S:
                spoken_s = time.monotonic()
                print(f"{scheme}, {way}: {n_asked} of {n_reads} read, {n_wrong} wrong", flush=True)
        seconds = time.monotonic() - started_s
        counts = client.stats()
        stores = [stats_of(address) for address in addresses.values()]
    injected = {kind: int(sum(s.get(f"faults_{kind}", 0) for s in stores)) for kind in KINDS}
    return {
        "transport": scheme,
        "way": way,
        "reads": n_asked,
        "accepted": n_accepted,
        "wrong": n_wrong,
        "recomputed": n_recomputed,
        "injected": injected,
        "found_by_client": int(counts["corrupt_detected"]),
        "found_by_stores": int(sum(s["corrupt_detected"] for s in stores)),
        "replica_reads": int(counts["replica_reads"]),
        "seconds": round(seconds, 1),
    }


def stats_of(address: str) -> dict[str, Any]:
    channel = connect(address)
    try:
        return dict(channel.call("stats", timeout_s=10.0).header)
    finally:
        channel.close()


def uncounted(row: Row) -> int:
    """Injected faults minus found ones, client and stores apart: 0 if each was counted once by each
    that had to see it. Of pages on disk a store finds some itself, when it brings them to its arena."""
    injected = row["injected"]
    on_the_way = injected["corrupt_sent"] + injected["corrupt_write"]
    in_memory = injected["corrupt_held"] + injected["corrupt_write"]
    by_client = on_the_way + injected["corrupt_mapped"] - row["found_by_client"]
    by_stores = in_memory + injected["corrupt_mapped"] - row["found_by_stores"]
    if row["way"] == "from disk" and by_client > 0:
        by_client = 0
    return abs(by_client) + abs(by_stores)


def totals(rows: Sequence[Row]) -> dict[str, int]:
    names = ("reads", "accepted", "wrong", "recomputed", "uncounted")
    injected = sum(sum(row["injected"].values()) for row in rows)
    return {**{name: sum(row[name] for row in rows) for name in names}, "injected": injected}


@no_log()
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="longreach-soak-", dir=arguments.arena_dir) as arenas:
        n_pages = arguments.pages
        settings = (arguments.seed, arguments.share, n_pages, Path(arenas))
        config = soak_config(*settings)
        result = record(
            "benchmarks.soak_corruption", config, sys.argv[1:] if argv is None else argv
        )
        n_reads = -(-arguments.reads // len(WAYS))
        rows: list[Row] = []
        for way in WAYS:
            rows.append(soak(soak_config(*settings, way[1]), *way, n_reads, n_pages))
            rows[-1]["uncounted"] = uncounted(rows[-1])
            # a run that is cut short leaves the ways that it came to
            total = totals(rows)
            write_result(arguments.out, result | {"total": total, "rows": rows})
    table = Table(
        "transport", "read", "reads", "accepted", "wrong", "injected", "found", "uncounted",
        "from a replica", "made again", "reads/s",
        title=f"{arguments.share:.1%} of page reads damaged, seed {arguments.seed}",
    )  # fmt: skip
    for row in rows:
        # most are counted twice: by the client, and by the store that it tells
        n_found = row["found_by_stores"] + row["injected"]["corrupt_sent"]
        cells = (
            row["transport"], row["way"], row["reads"], row["accepted"], row["wrong"],
            sum(row["injected"].values()), n_found, row["uncounted"], row["replica_reads"],
            row["recomputed"], round(row["reads"] / row["seconds"]) if row["seconds"] else 0,
        )  # fmt: skip
        table.add_row(*(f"{c:,}" if isinstance(c, int) else c for c in cells))
    out = console()
    out.print(table)
    out.print(", ".join(f"{name} {value:,}" for name, value in total.items()))
    out.print(f"written to {arguments.out}")
    if total["wrong"] or total["uncounted"]:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reads", type=int, default=N_READS, help="page reads, all ways together")
    parser.add_argument("--pages", type=int, default=N_PAGES, help="pages that the stores hold")
    parser.add_argument("--share", type=float, default=0.01, help="share of pages damaged")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--arena-dir", default="/dev/shm")
    path = ROOT / "benchmarks" / "results" / "soak-corruption.json"
    parser.add_argument("--out", type=Path, default=path)
    return parser


if __name__ == "__main__":
    main()
