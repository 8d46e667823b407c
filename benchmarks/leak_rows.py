"""Clients that treat a gateway badly: they cancel, vanish, ask what is refused, or are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.cluster.local_runtime import LocalRuntime
from longreach.core.config import Config
from longreach.core.errors import LongreachError
from tests.e2e.serving import jsonl, rows_of

from .harness import ROOT

N_CLIENTS = 6
N_TOKENS = 24
WORDS = (150, 300, 450, 600, 900, 1200)
KINDS = {
    "answered": 50,
    "cancelled": 18,
    "connection_lost": 12,
    "refused": 10,
    "batch_cancelled": 9,
    "client_killed": 3,
}
"""How the rows end, by weight."""

_CHILD = """
import sys
from longreach.cluster.client import Client
with Client(sys.argv[1]) as client:
    for event in client.generate("What is said?", context=sys.argv[2], sampling={"max_tokens": 4000}):
        print("going", flush=True)
"""


class Soak:
    """A gateway in this process, and clients that treat it badly."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.ends: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.runtime = LocalRuntime(config)
        self.gateway = Gateway(config, self.runtime)
        self.address = self.gateway.start()
        self._rng = random.Random(seed)
        self._texts = [row["context"] for row in rows_of(700 + seed, len(WORDS), 1, WORDS)]
        self._n_rows = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        self.gateway.stop()

    def run(self, go_on: Callable[[int], bool]) -> None:
        """Rows from several clients for as long as go_on(rows begun) is true."""

        def ask() -> None:
            client = Client(self.address, retry_s=10.0)
            while True:
                with self._lock:
                    if not go_on(self._n_rows):
                        break
                    self._n_rows += 1
                    kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
                    drawn = random.Random(self._rng.random())
                try:
                    client = getattr(self, f"_{kind}")(client, drawn)
                except LongreachError as exc:
                    with self._lock:
                        self.errors[exc.reason] += 1
                with self._lock:
                    self.ends[kind] += 1
            client.close()

        self._n_rows = 0
        with ThreadPoolExecutor(N_CLIENTS) as clients:
            for future in [clients.submit(ask) for _ in range(N_CLIENTS)]:
                future.result()

    # --- how a row ends: each gives the client that the next row uses -----------------------------

    def _begin(self, client: Client, drawn: random.Random) -> Iterator[Any]:
        question = f"What does entry {drawn.randint(0, 99)} say?"
        sampling = {"max_tokens": N_TOKENS}
        return client.generate(question, context=drawn.choice(self._texts), sampling=sampling)

    def _answered(self, client: Client, drawn: random.Random) -> Client:
        for _ in self._begin(client, drawn):
            pass
        return client

    def _cancelled(self, client: Client, drawn: random.Random) -> Client:
        events: Any = self._begin(client, drawn)
        for _ in range(drawn.randint(0, N_TOKENS)):
            next(events, None)
        events.close()
        return client

    def _connection_lost(self, client: Client, drawn: random.Random) -> Client:
        events = self._begin(client, drawn)
        for _ in range(drawn.randint(1, N_TOKENS)):
            next(events, None)
        client.close()
        return Client(self.address, retry_s=10.0)

    def _refused(self, client: Client, drawn: random.Random) -> Client:
        bad: list[dict[str, Any]] = [
            {"context": self._texts[0] * 80, "sampling": {"max_tokens": 4}},
            {"context": "", "sampling": {"max_tokens": 4}},
            {"context": "short", "sampling": {"max_tokens": 10**6}},
            {"context": "short", "sampling": {"temperature": -3.0}},
        ]
        for _ in client.generate("Why?", **drawn.choice(bad)):
            pass
        return client

    def _batch_cancelled(self, client: Client, drawn: random.Random) -> Client:
        rows = rows_of(700, 3, N_TOKENS, WORDS[:2])
        job_id = client.submit(jsonl(rows)).job_id
        time.sleep(drawn.random() * 0.5)
        client.cancel(job_id)
        while not client.get(job_id).ended_s:
            time.sleep(0.05)
        return client

    def _client_killed(self, client: Client, drawn: random.Random) -> Client:
        command = [sys.executable, "-c", _CHILD, self.address, drawn.choice(self._texts)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
        child.wait(10.0)
        child.stdout.close()
        return client
