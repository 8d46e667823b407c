"""One attempt of one row: choose a worker, stream its answer, tell a lost worker from a bad row."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.config import Config
from ..core.errors import (
    Aborted,
    Cancelled,
    Draining,
    InternalError,
    LongreachError,
    Unavailable,
    WorkerLost,
)
from ..kvstore.transport import Channel
from .preparer import Prepared
from .results import Outcome, numeric_stats
from .router import Router
from .runtime import Runtime
from .sampling import Sampling

log = logging.getLogger("longreach.dispatch")
LOOKUP_TIMEOUT_S = 2.0
CANCEL_TIMEOUT_S = 5.0
_WAIT_STEP_S = 0.05


@dataclass(frozen=True)
class Assigned:
    """The attempt runs on this worker."""

    worker_id: str


@dataclass(frozen=True)
class Progress:
    """Prompt tokens; phase is queued, prefill or decode."""

    phase: str
    prefilled: int
    reused: int
    total: int


@dataclass(frozen=True)
class NewToken:
    index: int
    token_id: int
    text: str


RowEvent = Assigned | Progress | NewToken | Outcome


def can_retry(error: LongreachError) -> bool:
    """Whether another attempt may succeed where this one failed."""
    return error.retryable or isinstance(error, Aborted)


class CancelSwitch:
    """Ends one row from any thread, once; reaches the worker where the row runs now."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._stop_worker: Any = None
        self.abandoned = False
        """The row is not to end: it stays as it is in the journal, for the next gateway."""

    def cancel(self, *, abandon: bool = False) -> None:
        with self._lock:
            self.abandoned = self.abandoned or abandon
            self._event.set()
            stop, self._stop_worker = self._stop_worker, None
        if stop is not None:
            stop()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        return self._event.wait(timeout_s)

    def check(self) -> None:
        """Raises Cancelled."""
        if self._event.is_set():
            raise Cancelled("the row was cancelled")

    def attach(self, stop_worker: Any) -> None:
        """stop_worker: called (once, without waiting) if the switch is thrown from now on."""
        with self._lock:
            if not self._event.is_set():
                self._stop_worker = stop_worker
                return
        stop_worker()

    def detach(self) -> None:
        with self._lock:
            self._stop_worker = None


class WorkerPool:
    """Thread-safe."""

    def __init__(self, config: Config, runtime: Runtime, epoch: int) -> None:
        self._config = config
        self._runtime = runtime
        self._epoch = epoch
        self._router = Router(config.worker.max_rows)
        self._router_lock = threading.Lock()
        self._helpers = ThreadPoolExecutor(4, thread_name_prefix="cancel")

    def n_live(self) -> int:
        return len(self._runtime.workers())

    def close(self) -> None:
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def run(
        self,
        row_id: str,
        prepared: Prepared,
        sampling: Sampling,
        tokens: Sequence[int],
        cancel: CancelSwitch,
        n_prefilled: int = 0,
    ) -> Iterator[RowEvent]:
        """Events of one attempt; the last is an Outcome. tokens: what earlier attempts made;
        n_prefilled: prompt tokens they had in place, so that what was lost can be counted.

        Raises WorkerLost if the worker died, Cancelled, or the worker's own error.
        """
        worker_id, channel = self._assign(row_id, prepared, cancel)
        try:
            yield Assigned(worker_id)
            yield from self._stream(
                row_id, channel, prepared, sampling, tokens, cancel, n_prefilled
            )
        except Unavailable as exc:
            cancel.check()
            if type(exc) not in (Unavailable, WorkerLost, Draining):
                raise  # a part behind the worker: the worker itself lives
            if self._runtime.workers().get(worker_id) is channel:
                # the same channel: not yet replaced by a new incarnation
                self._runtime.worker_failed(worker_id)
            raise WorkerLost(f"worker {worker_id}: {exc.message}", worker_id=worker_id) from exc
        finally:
            with self._router_lock:
                self._router.leave(row_id)

    def _stream(
        self,
        row_id: str,
        channel: Channel,
        prepared: Prepared,
        sampling: Sampling,
        tokens: Sequence[int],
        cancel: CancelSwitch,
        n_prefilled: int,
    ) -> Iterator[RowEvent]:
        header = {
            "row_id": row_id,
            "epoch": self._epoch,
            "n_context_tokens": prepared.n_context_tokens,
            "n_prefilled": n_prefilled,
            "sampling": sampling.to_wire(),
            "tenant": "",
        }
        buffers = (prepared.token_ids, np.asarray(tokens, dtype="<u4").tobytes())
        expected = len(tokens)
        with channel.stream(
            "generate",
            header,
            buffers,
            idle_timeout_s=self._config.gateway.heartbeat_timeout_s,
        ) as stream:
            cancel.attach(lambda: self._helpers.submit(self._cancel, channel, row_id, stream))
            try:
                for reply in stream:
                    cancel.check()
                    event = _event(reply.header)
                    if isinstance(event, NewToken):
                        if event.index != expected:
                            raise InternalError(
                                f"row {row_id}: worker sent token {event.index}, expected "
                                f"{expected}"
                            )
                        expected += 1
                    yield event
                    if isinstance(event, Outcome):
                        return
            except Cancelled as exc:
                if cancel.is_set():
                    raise
                # nobody here asked: the worker dropped the row, for instance for a newer epoch
                raise WorkerLost(f"the worker cancelled the row: {exc.message}") from exc
            finally:
                cancel.detach()
        raise WorkerLost(f"row {row_id}: the worker ended the stream without an answer")

    def _assign(self, row_id: str, prepared: Prepared, cancel: CancelSwitch) -> tuple[str, Channel]:
        deadline_s = time.monotonic() + self._config.cluster.start_timeout_s
        while not (live := self._runtime.workers()):
            cancel.check()
            if time.monotonic() > deadline_s:
                raise Unavailable(
                    "no decode worker is live since "
                    f"{self._config.cluster.start_timeout_s:g} s (cluster.start_timeout_s)"
                )
            cancel.wait(_WAIT_STEP_S)
        cancel.check()
        # with a single worker there is nothing to choose, so nothing to ask
        held = self._held(live, prepared) if len(live) > 1 else {}
        with self._router_lock:
            worker_id = self._router.choose(row_id, prepared.keys, held, sorted(live))
        return worker_id, live[worker_id]

    def _held(self, live: dict[str, Channel], prepared: Prepared) -> dict[str, int]:
        header = {"keys": list(prepared.keys), "epoch": self._epoch}
        held = {}
        for worker_id, channel in live.items():
            try:
                reply = channel.call("lookup", header, timeout_s=LOOKUP_TIMEOUT_S)
                held[worker_id] = int(reply.header["held"])
            except (LongreachError, KeyError, TypeError, ValueError) as exc:
                log.warning("worker %s did not tell which pages it holds: %s", worker_id, exc)
        return held

    def _cancel(self, channel: Channel, row_id: str, stream: Any) -> None:
        """Ask the worker to end the row: its stream then ends and wakes the reader."""
        try:
            header = {"row_id": row_id, "epoch": self._epoch}
            channel.call("cancel", header, timeout_s=CANCEL_TIMEOUT_S)
        except LongreachError as exc:
            log.info("row %s: cancel at the worker: %s", row_id, exc)
            stream.close()


def _event(header: dict[str, Any]) -> RowEvent:
    try:
        match header["event"]:
            case "progress":
                return Progress(
                    str(header["phase"]),
                    int(header["prefilled"]),
                    int(header["reused"]),
                    int(header["total"]),
                )
            case "token":
                return NewToken(int(header["index"]), int(header["token_id"]), str(header["text"]))
            case "done":
                return Outcome(
                    str(header["text"]),
                    str(header["finish_reason"]),
                    int(header["n_tokens"]),
                    numeric_stats(header.get("stats") or {}),
                )
            case other:
                raise InternalError(f"worker sent an unknown event {other!r:.40}")
    except (KeyError, TypeError, ValueError) as exc:
        raise InternalError(f"worker sent a malformed event: {exc!r}") from exc
