"""A thousand random rows with cancels, failures and killed clients; then nothing may be left of them.

    python -m benchmarks.soak_leaks [--rows 1000] [--minutes 0] [--seed 7]

A tiny random model behind a gateway in this process (the in-process wiring: gateway, worker, stores and
retriever are all here), with damaged pages and lost answers from a fault plan. Several clients ask at
once: most wait for their answer, others cancel in the middle, lose their connection, ask what is refused,
cancel whole batches, or are processes that get SIGKILL. With --minutes the rows go on for so long.

After a warm-up, and again at the end when all is quiet: pages pinned, leases, open writes, rows, streams,
bank slots, private page slots, file descriptors, threads, shared-memory files and mappings. What is more
than before is a leak, and the exit code is 1. The slope of resident memory over the run is fitted by
least squares (MB/min); in the first minutes caches and arenas fill.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from longreach.cluster.client import Client
from longreach.core.config import Config, load_config

from .harness import ROOT, console, no_log, record, resident_bytes, write_result
from .leak_rows import N_CLIENTS, Soak
from .tiny_serve import write_config

N_ROWS = 1000
WARM_UP_ROWS = 48
QUIET_S = 60.0
SAMPLE_S = 1.0
FAULTS = ("faults.corrupt=0.003", "faults.lose_answer=0.0005", "faults.delay=0.01:5ms")
GAUGES = ("longreach_rows_queued", "longreach_rows_running", "longreach_streams_open")
POOLS = {"row": 3 * N_CLIENTS, "grpc": 4 * N_CLIENTS, "page-call": 8, "page-store": 4, "cancel": 4}
POOLS["page-prefetch"] = 1
"""Pools whose threads are made as they are needed and kept, with the most that these clients need."""

Row = dict[str, Any]


# --- what is held now -----------------------------------------------------------------------------


def held(soak: Soak) -> dict[str, int]:
    """Everything that rows may leave behind, by name."""
    gc.collect()
    parts = soak.runtime.stats()
    stores = [numbers for numbers in parts.values() if numbers["kind"] == "store"]
    workers = [numbers for numbers in parts.values() if numbers["kind"] == "worker"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    arenas = soak.config.store.arena_dir
    with Client(soak.address) as client:
        gateway = dict(client.stats().gateway)
    threads = Counter(
        thread.name.rpartition("_")[0] or thread.name for thread in threading.enumerate()
    )
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "pages pinned": _sum(stores, "pages_pinned"),
        "leases": _sum(stores, "leases"),
        "writes open": _sum(stores, "writes_open"),
        "rows at workers": _sum(workers, "rows"),
        "bank slots": _sum(workers, "bank_slots_used"),
        "pages known to workers": _sum(workers, "pages_known"),
        "rows at page clients": _sum(workers, "store_rows"),
        "private pages": _sum(workers, "store_private_pages"),
        "bytes written behind": _sum(workers, "store_write_behind_bytes"),
        "rows and streams at the gateway": int(sum(gateway.get(name, 0) for name in GAUGES)),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sum(pool not in POOLS for pool in threads.elements()),
        **{f"threads of {pool} above {n}": max(0, threads[pool] - n) for pool, n in POOLS.items()},
        "shared-memory files": len(os.listdir(arenas)),
        "shared-memory mappings": sum(arenas in line for line in maps),
        "child processes": len(children),
    }


def _sum(parts: Sequence[dict[str, Any]], name: str) -> int:
    return int(sum(numbers.get(name, 0) for numbers in parts))


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def left_over(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {name: now[name] - before[name] for name in now if now[name] > before[name]}


def quiet(soak: Soak, before: dict[str, int] | None = None) -> dict[str, int]:
    """What is held when nothing runs any more: as soon as it is no more than before, or at last."""
    end_s = time.monotonic() + QUIET_S
    last: dict[str, int] = {}
    while time.monotonic() < end_s:
        now = held(soak)
        done = not left_over(before, now) if before is not None else now == last
        if done and not now["rows at workers"]:
            return now
        last = now
        time.sleep(2.0)
    return last


class Memory(threading.Thread):
    """Resident memory, sampled until stopped."""

    def __init__(self) -> None:
        super().__init__(name="memory", daemon=True)
        self.samples: list[tuple[float, int, int]] = []
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            now = resident_bytes()
            self.samples.append((time.monotonic(), now["all"], now["own"]))

    def stop(self) -> None:
        self._stopping.set()
        self.join(10.0)

    def thinned(self, n: int = 200) -> list[float]:
        """Own memory in MB, some n of the samples."""
        step = max(1, len(self.samples) // n)
        return [round(own / 1e6, 1) for _, _, own in self.samples[::step]]

    def slopes(self) -> dict[str, float]:
        """MB/min by least squares: whole resident memory, and what is no arena, over the whole run and
        over its second half."""
        found = {}
        for name, first in (("", 0), (" in the second half", len(self.samples) // 2)):
            part = np.array(self.samples[first:])
            if len(part) < 3:
                continue
            minutes = (part[:, 0] - part[0, 0]) / 60
            for what, column in (("all", 1), ("own", 2)):
                slope = np.polyfit(minutes, part[:, column] / 1e6, 1)[0]
                found[what + name] = round(float(slope), 3)
        return found


def run(config: Config, n_rows: int, minutes: float, seed: int, say: Callable[[str], None]) -> Row:
    soak = Soak(config, seed)
    try:
        say(f"warm-up: {WARM_UP_ROWS} rows")
        soak.run(lambda n: n < WARM_UP_ROWS)
        before = quiet(soak)
        names_before = thread_names()
        soak.ends.clear()
        soak.errors.clear()
        memory = Memory()
        memory.start()
        started_s = spoken_s = time.monotonic()

        def go_on(n: int) -> bool:
            nonlocal spoken_s
            now_s = time.monotonic()
            if now_s - spoken_s > 30:
                spoken_s = now_s
                say(f"{n} rows, {resident_bytes()['own'] / 1e6:.0f} MB of own memory")
            return n < n_rows or now_s - started_s < 60 * minutes

        soak.run(go_on)
        memory.stop()
        seconds = time.monotonic() - started_s
        after = quiet(soak, before)
        new_threads = sorted(thread_names() - names_before)
        parts = soak.runtime.stats()
        faults = {
            name: int(sum(p.get(name, 0) for p in parts.values()))
            for name in sorted({n for p in parts.values() for n in p if n.startswith("faults_")})
        }
    finally:
        soak.close()
    return {
        "rows": sum(soak.ends.values()),
        "ends": dict(soak.ends),
        "errors": dict(soak.errors),
        "faults": faults,
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
        "left_over": left_over(before, after),
        "new_threads": new_threads,
        "mb_per_minute": memory.slopes(),
        "own_mb": memory.thinned(),
    }


@no_log()
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    say = console().print
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longreach-")))
        arenas = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="longreach-leaks-", dir="/dev/shm")
        )
        path = write_config(directory, Path(arenas))
        sets = ["gateway.port=0", f"gateway.state_dir={directory / 'state'}", "worker.count=1"]
        config = load_config([path], [*sets, *FAULTS])
        result = record("benchmarks.soak_leaks", config, sys.argv[1:] if argv is None else argv)
        found = run(config, arguments.rows, arguments.minutes, arguments.seed, say)
    table = Table("what", "before", "after", "left over", title=f"After {found['rows']} rows")
    for name, before in found["before"].items():
        table.add_row(
            name, str(before), str(found["after"][name]), str(found["left_over"].get(name, ""))
        )
    out = console()
    out.print(table)
    out.print(f"rows by end: {found['ends']}; errors seen by clients: {found['errors']}")
    out.print(f"resident memory, MB/min: {found['mb_per_minute']}")
    write_result(arguments.out, result | found)
    out.print(f"written to {arguments.out}")
    if found["left_over"]:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=N_ROWS, help="rows at least")
    parser.add_argument("--minutes", type=float, default=0.0, help="time at least")
    parser.add_argument("--seed", type=int, default=7)
    path = ROOT / "benchmarks" / "results" / "soak-leaks.json"
    parser.add_argument("--out", type=Path, default=path)
    return parser


if __name__ == "__main__":
    main()
