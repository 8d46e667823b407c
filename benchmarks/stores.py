"""Throughput of 1, 2 and 4 stores, each behind a limited link of its own.

    python -m benchmarks.stores [--mbit 200] [--pages 120] [--times 5]

Every store runs in a network namespace, joined to one bridge by a pair of virtual interfaces whose
store side sends at most so many bits per second (tc tbf). One client fetches pages of 256 KiB by plan,
with two copies of each where there are two stores. Links are the bottleneck, so n stores should give
n times the bytes of one. Needs root, ip and tc.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .harness import ROOT, write_result
from .store_peers import GEOMETRY, acquire, client_of, fill, key_of, store_process
from .transport import commit, machine

COUNTS = (1, 2, 4)
NETWORK = "10.231.77"
PORT = 7000


class Refused(Exception):
    """This machine does not let us make networks."""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def bridge() -> Iterator[str]:
    """Name of a bridge that the client's side of the machine can reach."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        raise Refused("network namespaces need root, ip and tc")
    name = f"lrbr{os.getpid() % 100000}"
    _run("ip", "link", "add", name, "type", "bridge")
    try:
        _run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", name)
        _run("ip", "link", "set", name, "up")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def namespace(i: int, bridge_name: str, mbit: float) -> Iterator[tuple[str, str]]:
    """(name, address) of a namespace whose link sends mbit megabits per second at most."""
    name, outside, inside = f"lrns{os.getpid()}-{i}", f"lro{os.getpid() % 100000}-{i}", "link0"
    inside_ip = f"{NETWORK}.{i + 1}"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        _run("ip", "link", "set", outside, "master", bridge_name)
        _run("ip", "link", "set", outside, "up")
        within = ("ip", "netns", "exec", name)
        _run(*within, "ip", "addr", "add", f"{inside_ip}/24", "dev", inside)
        _run(*within, "ip", "link", "set", inside, "up")
        _run(*within, "ip", "link", "set", "lo", "up")
        limit = ("rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
        _run(*within, "tc", "qdisc", "add", "dev", inside, "root", "tbf", *limit)
        yield name, inside_ip
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def measure(n_stores: int, mbit: float, n_pages: int, n_times: int) -> dict[str, Any]:
    """Megabytes per second of batches of n_pages pages per store."""
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(bridge())
        addresses = {}
        for i in range(n_stores):
            name, ip = stack.enter_context(namespace(i, link, mbit))
            arguments = ("--address", f"tcp://{ip}:{PORT}", "--pages", str(3 * n_pages))
            before = ("ip", "netns", "exec", name)
            started = store_process(f"store-{i}", *arguments, before=before)
            addresses[f"store-{i}"] = stack.enter_context(started)[0]
        replicas = min(2, n_stores)
        numbers = range(n_stores * n_pages)
        fill(addresses, numbers, replicas)
        client = client_of(addresses, "reader", replicas=replicas)
        stack.callback(client.close)
        keys = [key_of(i) for i in numbers]
        rates = []
        for i in range(n_times + 1):
            start_s = time.perf_counter()
            acquire(client, keys, f"row-{i}")
            rates.append(len(keys) * GEOMETRY.page_nbytes / (time.perf_counter() - start_s) / 1e6)
            client.release(f"row-{i}")
        stats = client.stats()
    return {
        "n_stores": n_stores,
        "mb_per_s": round(statistics.median(rates[1:]), 2),
        "least": round(min(rates[1:]), 2),
        "most": round(max(rates[1:]), 2),
        "hedges_sent": stats["hedges_sent"],
        "hedge_wasted_bytes": stats["hedge_wasted_bytes"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=200.0, help="of each store's link")
    parser.add_argument("--pages", type=int, default=120, help="in a batch, per store")
    parser.add_argument("--times", type=int, default=5, help="batches of which the median counts")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "stores.json")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {
        "commit": commit(("kvstore", "core", "benchmarks/stores.py")),
        "machine": machine(),
        "command": sys.argv[1:] if argv is None else list(argv),
        "mbit": arguments.mbit,
    }
    try:
        rows = [
            measure(n, arguments.mbit, arguments.pages, arguments.times) for n in arguments.counts
        ]
    except Refused as exc:
        print(f"not measured: {exc}")
        return 0
    for row in rows:
        row["of_linear"] = round(row["mb_per_s"] * rows[0]["n_stores"] / rows[0]["mb_per_s"], 3)
        row["of_linear"] = round(row["of_linear"] / row["n_stores"], 3)
        print(*(f"{what} {value}" for what, value in row.items()), sep="  ")
    result["load_1min_at_end"] = round(os.getloadavg()[0], 2)
    write_result(arguments.out, {**result, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
