"""`longreach serve` as the processes a user starts, and the batches that are sent to them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longreach.cluster.client import Client
from longreach.cluster.proto import inference_pb2, jobs_pb2
from longreach.core.errors import DeadlineExceeded, NotFound, Unavailable
from longreach.core.page_key import PageKey
from longreach.kvstore.transport import connect

ROOT = Path(__file__).resolve().parents[2]
MARK = "LONGREACH_E2E"
"""Environment variable that every process started here hands down, so that leaks are seen."""
START_S = 120.0
BATCH_S = 100.0

WORDS = (  # noqa: SIM905
    "harbour lantern keeper storm ledger salt granite signal winter barrel compass orchard "
    "ferry bishop copper meadow thunder violin candle parliament river glacier engine falcon "
    "letter marble needle ocean pepper quarry ribbon silver timber umbrella valley window "
    "yellow zephyr anchor bridge castle desert evening forest garden hollow island journey"
).split()


def text_of(seed: int, n_words: int) -> str:
    """A document that no other seed shares a page with; one to two tokens a word."""
    rng = random.Random(seed)
    sentences = []
    while n_words > 0:
        words = rng.choices(WORDS, k=min(n_words, rng.randint(6, 14)))
        n_words -= len(words)
        sentences.append(" ".join(words).capitalize() + f" {rng.randint(0, 9999)}.")
    return " ".join(sentences)


def rows_of(seed: int, n_rows: int, max_tokens: int, words: Sequence[int]) -> list[dict[str, Any]]:
    """Batch lines: questions dealt out over one context per entry of `words` (its length)."""
    contexts = [text_of(100 * seed + i, n) for i, n in enumerate(words)]
    return [
        {
            "custom_id": f"row-{seed}-{i}",
            "context": contexts[i % len(contexts)],
            "question": f"What does entry {i} say about the {WORDS[(7 * i + seed) % 48]}?",
            "max_tokens": max_tokens,
        }
        for i in range(n_rows)
    ]


def jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass
class Batch:
    """What came back for a job."""

    job: jobs_pb2.Job
    lines: list[dict[str, Any]]

    @property
    def answers(self) -> dict[str, str]:
        return {
            line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
            for line in self.lines
            if line["error"] is None
        }

    @property
    def stats(self) -> dict[str, dict[str, float]]:
        return {
            line["custom_id"]: line["response"]["body"]["longreach"]["stats"]
            for line in self.lines
            if line["error"] is None
        }

    def total(self, name: str) -> float:
        return sum(stats[name] for stats in self.stats.values())


@dataclass
class Serve:
    """One state directory and the serve process on it, which may be ended and started again."""

    command: list[str]
    state_dir: Path
    mark: str
    process: subprocess.Popen[str] | None = None
    address: str = ""
    _clients: list[Client] = field(default_factory=list)

    def start(self, *more: str, timeout_s: float = START_S) -> Serve:
        assert self.process is None
        log = (self.state_dir.parent / f"{self.state_dir.name}.log").open("a")
        with log:
            self.process = self.popen(*more, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"serve ended: {self.log()}"
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((self.state_dir / "gateway.json").read_text())
                if found["pid"] == self.process.pid:
                    self.address = str(found["address"])
                    return self
            time.sleep(0.05)
        raise AssertionError(f"serve did not come up in {timeout_s} s: {self.log()}")

    def popen(self, *more: str, **files: Any) -> subprocess.Popen[str]:
        """A serve process on this state directory, not waited for."""
        env = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [*self.command, "--state-dir", str(self.state_dir), *more]
        return subprocess.Popen(command, env=env, cwd=ROOT, text=True, **files)

    def log(self) -> str:
        return (self.state_dir.parent / f"{self.state_dir.name}.log").read_text()[-4000:]

    @property
    def client(self) -> Client:
        if not self._clients:
            self._clients.append(Client(self.address, retry_s=90.0))
        return self._clients[0]

    def kill(self) -> None:
        """kill -9 of the gateway's process and nothing else."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=10)
        self.process = None

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        for client in self._clients:
            client.close()
        self._clients.clear()
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)
            raise

    # --- asking ---------------------------------------------------------------------------------

    def part(self, name: str) -> Any:
        """Numbers of one part, as `Admin.Stats` tells them."""
        (found,) = [p for p in self.client.stats().parts if p.part == name]
        return found.numbers

    def part_address(self, name: str) -> str:
        (found,) = [p for p in self.client.stats().parts if p.part == name]
        return str(found.labels["address"])

    def submit(self, rows: Sequence[dict[str, Any]], **header: str) -> str:
        return str(self.client.submit(jsonl(rows), **header).job_id)

    def finish(self, job_id: str, timeout_s: float = BATCH_S) -> Batch:
        """Wait for the end of a job, also over a restart of the gateway; its result lines."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                job = self.client.get(job_id)
                if job.ended_s:
                    lines = [json.loads(r.line) for r in self.client.results(job_id)]
                    return Batch(job, lines)
            assert time.monotonic() < deadline, f"job did not end: {self.log()}"
            time.sleep(0.1)

    def run(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.finish(self.submit(rows))

    def updates_until(
        self, job_id: str, reached: Callable[[jobs_pb2.JobUpdate], bool]
    ) -> jobs_pb2.JobUpdate:
        """Watch a job until something is seen; the job must not end before."""
        for update in self.client.watch(job_id, interval_s=0.1):
            assert not update.job.ended_s, "the job ended before the fault could strike"
            if reached(update):
                return update
        raise AssertionError("the watch ended")


def flip(address: str, keys: Sequence[PageKey], n_leaves: int, byte: int) -> int:
    """Flip one byte of every leaf of the pages that a store holds; how many pages."""
    channel, n_pages = connect(address), 0
    for key in keys:
        try:
            for leaf in range(n_leaves):
                channel.call("corrupt", {"key": key, "leaf": leaf, "byte": byte}, timeout_s=5)
            n_pages += 1
        except NotFound:
            continue
    channel.close()
    return n_pages


def token_ids(events: Iterator[inference_pb2.GenerateResponse]) -> list[int]:
    return [e.token.token_id for e in events if e.WhichOneof("event") == "token"]


def longreach_command() -> list[str]:
    script = Path(sys.executable).with_name("longreach")
    return [str(script)] if script.exists() else [sys.executable, "-m", "longreach"]


def run_cli(*arguments: str | Path, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A command as a user types it."""
    command = [*longreach_command(), *(str(a) for a in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
