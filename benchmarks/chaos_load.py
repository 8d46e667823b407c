"""Batches of questions without a pause, each answer compared with that of an undisturbed run."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from longreach.core.errors import LongreachError
from tests.e2e.serving import Serve

ROWS_PER_JOB = 6
OPEN_JOBS = 2
END_S = 600.0
"""Longest wait for the open jobs when time is up."""

Row = dict[str, Any]
Answer = tuple[str, int]


def answers_of(lines: Sequence[str]) -> Iterator[tuple[str, Answer | None, dict[str, float]]]:
    """(custom id, text and number of tokens or None if the row failed, statistics) of result lines."""
    for line in lines:
        value = json.loads(line)
        if value["error"] is not None:
            yield value["custom_id"], None, {"failed": 1.0, "error": value["error"]["message"]}
            continue
        body = value["response"]["body"]
        text = body["choices"][0]["message"]["content"]
        answer = (text, int(body["usage"]["completion_tokens"]))
        yield value["custom_id"], answer, body["longreach"]["stats"]


def undisturbed(serve: Serve, rows: Sequence[Row], timeout_s: float) -> dict[str, Answer]:
    batch = serve.finish(serve.submit(rows), timeout_s)
    found = {custom_id: answer for custom_id, answer, _ in answers_of(map(json.dumps, batch.lines))}
    if len(found) != len(rows) or None in found.values():
        raise SystemExit("the undisturbed run did not answer every row")
    return {custom_id: answer for custom_id, answer in found.items() if answer is not None}


@dataclass
class Load:
    """Batches of random rows, a few open at a time; what came of them."""

    serve: Serve
    rows: Sequence[Row]
    truth: dict[str, Answer]
    rng: random.Random
    n_submitted: int = 0
    n_done: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)
    _open: dict[str, dict[str, str]] = field(default_factory=dict)

    def run(self, seconds: float, say: Callable[[str], None]) -> None:
        end_s, spoken_s = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < end_s or self._open:
            if time.monotonic() > end_s + END_S:
                for names in self._open.values():
                    self.lost += names
                return
            while time.monotonic() < end_s and len(self._open) < OPEN_JOBS:
                self._submit()
            self._collect()
            if time.monotonic() - spoken_s > 20:
                spoken_s = time.monotonic()
                say(f"{self.n_done} of {self.n_submitted} rows answered, {self.bad} bad")
            time.sleep(0.2)

    @property
    def bad(self) -> int:
        return len(self.different) + len(self.failed) + len(self.lost) + len(self.doubled)

    def _submit(self) -> None:
        names, batch = {}, []
        for row in self.rng.sample(list(self.rows), min(ROWS_PER_JOB, len(self.rows))):
            custom_id = f"{row['custom_id']}/{self.n_submitted}"
            self.n_submitted += 1
            names[custom_id] = row["custom_id"]
            batch.append(row | {"custom_id": custom_id})
        self._open[self.serve.submit(batch)] = names

    def _collect(self) -> None:
        for job_id, names in list(self._open.items()):
            try:
                job = self.serve.client.get(job_id)
                if not job.ended_s:
                    continue
                lines = [str(result.line) for result in self.serve.client.results(job_id)]
            except LongreachError:
                continue  # asked again
            del self._open[job_id]
            self._compare(names, lines)

    def _compare(self, names: dict[str, str], lines: Sequence[str]) -> None:
        seen: Counter[str] = Counter()
        for custom_id, answer, stats in answers_of(lines):
            seen[custom_id] += 1
            if answer is None:
                self.failed.append(f"{custom_id}: {stats['error']}")
                continue
            self.n_done += 1
            wanted = self.truth[names[custom_id]]
            if answer != wanted:
                self.different.append({"row": custom_id, "got": answer, "wanted": wanted})
            self.totals.update({k: v for k, v in stats.items() if isinstance(v, int | float)})
        self.lost += [name for name in names if not seen[name]]
        self.doubled += [name for name in seen if seen[name] > 1 or name not in names]
