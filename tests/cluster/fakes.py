"""Stand-ins that obey the seams: a decode worker behind the real transport, a wiring, a tokenizer.

A row's tokens are a function of its prompt alone, so that any disturbance of a run can be seen.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longreach.core.config import Config, load_config
from longreach.core.errors import Cancelled, EmptyContext, InternalError, LongreachError, StaleEpoch
from longreach.core.page_key import PageKey, RecipeFingerprint, page_keys
from longreach.kvstore.membership import Membership
from longreach.kvstore.page import PageGeometry
from longreach.kvstore.transport import Channel, Reply, Service, connect, serve

PAGE_TOKENS = 16
GEOMETRY = PageGeometry(n_layers=2, n_kv_heads=1, page_tokens=PAGE_TOKENS, head_dim=8)
_serial = itertools.count()


def make_config(state_dir: Path, *sets: str) -> Config:
    return load_config(
        sets=[
            f"gateway.state_dir={state_dir}",
            "gateway.port=0",
            "gateway.heartbeat_timeout_s=3",
            "cluster.start_timeout_s=10",
            "cache.page_tokens=16",
            *sets,
        ]
    )


@dataclass(frozen=True)
class FakePrompt:
    token_ids: np.ndarray
    n_context_tokens: int


class FakePrompts:
    """One token per word; nothing between context and question."""

    def __init__(self) -> None:
        self.n_built = 0

    def build(self, context: str, question: str, answer_prefix: str = "") -> FakePrompt:
        self.n_built += 1
        head = _words(context)
        if not len(head):
            raise EmptyContext("the context has no tokens")
        return FakePrompt(np.concatenate([head, _words(question + " " + answer_prefix)]), len(head))

    def build_messages(self, messages: list[dict[str, Any]], answer_prefix: str = "") -> FakePrompt:
        return self.build(" ".join(m["content"] for m in messages), answer_prefix)

    def page_keys(self, prompt: FakePrompt) -> list[PageKey]:
        return page_keys(prompt.token_ids, RecipeFingerprint(bytes(32)), PAGE_TOKENS)


def _words(text: str) -> np.ndarray:
    return np.array([zlib.crc32(word.encode()) for word in text.split()], dtype=np.uint32)


def expected_tokens(context: str, question: str, n: int, answer_prefix: str = "") -> list[int]:
    prompt = FakePrompts().build(context, question, answer_prefix)
    return tokens_of(prompt.token_ids.astype("<u4").tobytes(), n)


def expected_text(context: str, question: str, n: int, answer_prefix: str = "") -> str:
    return text_of(expected_tokens(context, question, n, answer_prefix))


def tokens_of(prompt: bytes, n: int) -> list[int]:
    seed = zlib.crc32(prompt)
    return [zlib.crc32(f"{seed} {i}".encode()) % 50_000 for i in range(n)]


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(f"w{token_id} " for token_id in token_ids)


class FakeDecodeService:
    """Seam 4. What it does is set by its fields, also while rows run."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.epoch = 0
        self.token_s = 0.0
        self.die_after_tokens: int | None = None
        self.poison: bytes | None = None
        """A prompt with these bytes kills the worker in the middle of its prefill."""
        self.errors: list[LongreachError] = []
        """Raised one by one by the next rows."""
        self.hold = threading.Event()
        self.hold.set()
        self.die: Any = None
        self.n_emitted = 0
        self.rows_seen: list[str] = []
        self.resumed_from: dict[str, int] = {}
        self.running: set[str] = set()
        self.most_running = 0
        self.cancelled: Counter[str] = Counter()
        self.held: set[bytes] = set()
        self._cancels: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        if method == "generate":
            if header["epoch"] < self.epoch:
                raise StaleEpoch(f"epoch {header['epoch']}, this worker follows {self.epoch}")
            if self.errors:
                raise self.errors.pop(0)
            return self._generate(header, bytes(buffers[0]), bytes(buffers[1]))
        if method == "cancel":
            self.cancelled[header["row_id"]] += 1
            if header["row_id"] in self._cancels:
                self._cancels[header["row_id"]].set()
            return Reply({})
        if method == "lookup":
            held = list(itertools.takewhile(lambda key: key in self.held, header["keys"]))
            return Reply({"held": len(held)})
        if method == "epoch":
            self.epoch = header["epoch"]
            return Reply({})
        if method in ("health", "stats", "drain"):
            return Reply({"rows": len(self.running)})
        raise InternalError(f"no method {method}")

    def _generate(self, header: dict[str, Any], prompt: bytes, done: bytes) -> Iterator[Reply]:
        row_id = header["row_id"]
        forced = np.frombuffer(done, "<u4").tolist()
        tokens = tokens_of(prompt, header["sampling"]["max_tokens"])
        if forced != tokens[: len(forced)]:
            raise InternalError(f"row {row_id}: resumed with tokens it never made")
        cancel = self._cancels[row_id] = threading.Event()
        n_prompt = len(prompt) // 4
        with self._lock:
            self.rows_seen.append(row_id)
            self.resumed_from[row_id] = len(forced)
            self.running.add(row_id)
            self.most_running = max(self.most_running, len(self.running))
        try:
            yield _progress("queued", 0, n_prompt)
            if self.poison is not None and self.poison in prompt:
                yield _progress("prefill", 1, n_prompt)
                self.die()
                return
            yield _progress("prefill", n_prompt, n_prompt)
            for index in range(len(forced), len(tokens)):
                self._wait(cancel)
                if self.die_after_tokens is not None and self.n_emitted >= self.die_after_tokens:
                    self.die()
                    return
                self.n_emitted += 1
                text = text_of(tokens[index : index + 1])
                yield Reply(
                    {"event": "token", "index": index, "token_id": tokens[index], "text": text}
                )
            stats = {"tokens_prompt": n_prompt, "tokens_reused": 0, "ttft_s": 0.01}
            yield Reply(
                {
                    "event": "done",
                    "finish_reason": "length",
                    "text": text_of(tokens),
                    "n_tokens": len(tokens),
                    "stats": stats,
                }
            )
        finally:
            with self._lock:
                self.running.discard(row_id)

    def _wait(self, cancel: threading.Event) -> None:
        if self.token_s:
            cancel.wait(self.token_s)
        while not self.hold.wait(0.02) and not cancel.is_set():
            pass
        if cancel.is_set():
            raise Cancelled("cancelled at the worker")


def _progress(phase: str, prefilled: int, total: int) -> Reply:
    return Reply(
        {"event": "progress", "phase": phase, "prefilled": prefilled, "reused": 0, "total": total}
    )


class FakeRuntime:
    """Seam 5 over mem://. A worker that failed comes back at once as a new incarnation."""

    def __init__(
        self,
        n_workers: int = 1,
        *,
        respawn: bool = True,
        stores: Mapping[str, Service] | None = None,
    ) -> None:
        self.respawn = respawn
        self.store_services = dict(stores or {})
        self._store_addresses: dict[str, str] = {}
        self._membership = Membership(0)
        self.services: dict[str, FakeDecodeService] = {}
        self.past: list[FakeDecodeService] = []
        self.epoch = 0
        self.started = self.stopped = False
        self.n_failed = 0
        self.configure: Any = lambda service: None
        """Applied to every new incarnation."""
        self._servers: dict[str, Any] = {}
        self._channels: dict[str, Channel] = {}
        self._ids = [f"worker-{i}" for i in range(n_workers)]
        self._lock = threading.RLock()

    def start(self, epoch: int) -> None:
        self.epoch, self.started = epoch, True
        for worker_id in self._ids:
            self._spawn(worker_id)
        for store_id, service in self.store_services.items():
            address = f"mem://fake-{next(_serial)}"
            self._servers[store_id] = serve(service, address)
            self._store_addresses[store_id] = address
        self._membership = Membership.of(self._store_addresses, epoch=1)

    def stores(self) -> dict[str, Channel]:
        with self._lock:
            for store_id, address in self._store_addresses.items():
                self._channels.setdefault(store_id, connect(address))
            return {store_id: self._channels[store_id] for store_id in self._store_addresses}

    def membership(self) -> Membership:
        return self._membership

    def pid(self, part_id: str) -> int | None:
        return None

    def restart(self, part_id: str) -> None:
        """A worker comes back by `worker_failed`."""

    def drain_store(self, store_id: str) -> Membership:
        self._membership = self._membership.drained(store_id)
        return self._membership

    def lose_store(self, store_id: str) -> None:
        """Its process is gone, and the runtime knows."""
        self.kill(store_id)
        with self._lock:
            del self._store_addresses[store_id]

    def workers(self) -> dict[str, Channel]:
        with self._lock:
            return {i: c for i, c in self._channels.items() if i in self._ids}

    def worker_failed(self, worker_id: str) -> None:
        with self._lock:
            self.n_failed += 1
            self._channels.pop(worker_id, None)
            self._servers[worker_id].stop(0.0)
            if self.respawn and not self.stopped:
                self._spawn(worker_id)

    def stats(self) -> dict[str, dict[str, Any]]:
        return {
            worker_id: {"kind": "worker", "state": "live", "restarts": self.n_failed}
            for worker_id in self._ids
        }

    def stop(self, *, keep_parts: bool = False) -> None:
        with self._lock:
            self.stopped = True
            for server in self._servers.values():
                server.stop(0.0)
            self._channels.clear()

    def kill(self, worker_id: str) -> None:
        """The worker's process is gone; nobody has told the runtime."""
        self._servers[worker_id].stop(0.0)

    def _spawn(self, worker_id: str) -> None:
        with self._lock:
            if worker_id in self.services:
                self.past.append(self.services[worker_id])
            service = FakeDecodeService(worker_id)
            service.epoch = self.epoch
            self.configure(service)
            address = f"mem://fake-{next(_serial)}"
            server = serve(service, address)
            # from another thread: a server cannot wait for the stream that asks for its end
            service.die = lambda: threading.Thread(target=server.stop, args=(0.0,)).start()
            self.services[worker_id] = service
            self._servers[worker_id] = server
            self._channels[worker_id] = connect(address)

    @property
    def incarnations(self) -> list[FakeDecodeService]:
        return [*self.past, *self.services.values()]
