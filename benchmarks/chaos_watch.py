"""What is seen of a serve process from outside while it is struck: its parts' numbers, its records."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.cluster.chaos import RECORD_NAME
from longreach.cluster.client import Client
from longreach.core.errors import LongreachError
from tests.e2e.serving import Serve

from .tiny_serve import N_STORES

SAMPLE_S = 1.0


@dataclass(frozen=True)
class Sample:
    """Numbers of the parts at a time (seconds since the epoch)."""

    time_s: float
    parts: dict[str, dict[str, float]]
    live: frozenset[str]


class Watch(threading.Thread):
    """Asks the gateway for its parts' numbers once a second."""

    def __init__(self, serve: Serve) -> None:
        super().__init__(name="watch", daemon=True)
        self.samples: list[Sample] = []
        self._serve = serve
        self._stopping = threading.Event()

    def run(self) -> None:
        with Client(self._serve.address, retry_s=5.0) as client:
            while not self._stopping.wait(SAMPLE_S):
                with contextlib.suppress(LongreachError):
                    parts = client.stats().parts
                    numbers = {p.part: dict(p.numbers) for p in parts}
                    live = frozenset(p.part for p in parts if p.labels["state"] == "live")
                    self.samples.append(Sample(time.time(), numbers, live))

    def stop(self) -> None:
        self._stopping.set()
        self.join(30.0)

    def total(self, name: str) -> float:
        """A counter summed over parts, with what parts that were killed had counted."""
        total, last = 0.0, {}
        for sample in self.samples:
            for part, numbers in sample.parts.items():
                value = numbers.get(name)
                if value is not None:
                    before = last.get(part, 0.0)
                    total += value - before if value >= before else value
                    last[part] = value
        return total

    def names(self, prefix: str) -> set[str]:
        return {
            n for s in self.samples for p in s.parts.values() for n in p if n.startswith(prefix)
        }

    def repair_after(self, killed_s: float, until_s: float) -> dict[str, float | None]:
        """Seconds from a kill until a store had copied a page, and until all stores were live, had looked
        at every page and none had too few copies; to the second, None if it was not seen in time."""
        before = [s for s in self.samples if s.time_s <= killed_s]
        first = whole = None
        last = before[-1].parts if before else {}
        for sample in self.samples:
            if not killed_s + SAMPLE_S / 2 < sample.time_s < until_s:
                continue
            since_s = round(sample.time_s - killed_s, 1)
            stores = {p: n for p, n in sample.parts.items() if p.startswith("store-")}
            for part, numbers in stores.items():
                pushed = numbers.get("repair_pages_pushed")
                grew = pushed is not None and pushed > last.get(part, {}).get(
                    "repair_pages_pushed", 0.0
                )
                if first is None and grew:
                    first = since_s
            last = sample.parts
            settled = len(sample.live.intersection(stores)) == N_STORES and all(
                n.get("repair_under_replicated") == 0
                and n.get("repair_epoch") == n.get("repair_surveyed_epoch")
                for n in stores.values()
            )
            if whole is None and first is not None and settled:
                whole = since_s
        return {"first_repair_s": first, "whole_s": whole}


def strikes_of(state_dir: Path) -> list[dict[str, Any]]:
    path = state_dir / RECORD_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of_journal(state_dir: Path) -> list[tuple[int, float]]:
    """(attempts, seconds from the job's submission to the row's end) of every row that ended."""
    with contextlib.closing(sqlite3.connect(state_dir / "journal.sqlite3")) as db:
        return list(
            db.execute(
                "SELECT attempts, rows.ended_s - jobs.created_s FROM rows JOIN jobs USING (job_id)"
                " WHERE rows.ended_s > 0"
            )
        )


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": values[0], "p90": values[0], "p99": values[0]} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {name: round(cuts[i], 2) for name, i in (("p50", 49), ("p90", 89), ("p99", 98))}
