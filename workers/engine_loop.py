"""The thread that drives an engine, and the queues that rows' events leave by."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..core.errors import Cancelled, DeadlineExceeded, Draining, LongreachError, Unavailable
from ..kvstore.transport import Reply
from .engine import Engine, RowEvent
from .row import RowRequest

_log = logging.getLogger(__name__)


class RowStream(Iterator[Reply]):
    """Replies of one row. Closing or cancelling it cancels the row; it ends after `done`."""

    def __init__(self, row_id: str, on_close: Callable[[str], None]) -> None:
        self.row_id = row_id
        self._events: queue.SimpleQueue[RowEvent | None] = queue.SimpleQueue()
        self._on_close = on_close
        self._ended = False

    def put(self, event: RowEvent | None) -> None:
        self._events.put(event)

    def __next__(self) -> Reply:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        if event is None:
            self._ended = True
            raise Cancelled(f"row {self.row_id} was cancelled")
        if event.kind in ("done", "error"):
            self._ended = True
        if event.error is not None:
            raise event.error
        return Reply(event.payload)

    def cancel(self) -> None:
        """Called from another thread when the reader is gone: wakes the reader, cancels the row."""
        self._on_close(self.row_id)
        self.put(None)

    def close(self) -> None:
        if not self._ended:
            self.cancel()


@dataclass(frozen=True)
class _Command:
    act: Callable[[], Any]
    done: threading.Event
    result: list[Any]


class EngineLoop:
    """Owns the engine's thread. Methods may be called from any thread."""

    def __init__(self, engine: Engine, on_fatal: Callable[[BaseException], None]) -> None:
        self._engine = engine
        self._on_fatal = on_fatal
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, RowStream] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._draining = False
        self._n_submitted = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def n_rows(self) -> int:
        return len(self._streams)

    def generate(self, request: RowRequest, timeout_s: float = 60.0) -> RowStream:
        """Hand a row to the engine; its events come out of the stream."""
        if self._draining or self._stopping:
            raise Draining("this worker is draining and takes no new rows")
        stream = RowStream(request.row_id, self._cancel)

        def act() -> None:
            self._engine.submit(request)
            self._streams[request.row_id] = stream

        self.run(act, timeout_s)
        return stream

    def run(self, act: Callable[[], Any], timeout_s: float) -> Any:
        """Run something on the engine's thread, between two steps."""
        command = _Command(act, threading.Event(), [])
        self._commands.put(command)
        self._wake.set()
        if not command.done.wait(timeout_s):
            raise DeadlineExceeded(f"the engine did not answer within {timeout_s} s")
        (result,) = command.result
        if isinstance(result, BaseException):
            raise result
        return result

    def cancel_all(self) -> None:
        for row_id in list(self._streams):
            self._cancel(row_id)

    def drain(self) -> None:
        self._draining = True

    def stop(self, timeout_s: float = 10.0) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        for stream in list(self._streams.values()):
            error = Unavailable("the worker stopped")
            stream.put(RowEvent(stream.row_id, "error", {}, error))

    def _cancel(self, row_id: str) -> None:
        command = _Command(lambda: self._engine.cancel(row_id), threading.Event(), [])
        self._commands.put(command)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._serve_commands()
                if self._engine.n_rows:
                    for event in self._engine.step():
                        self._deliver(event)
                    if not self._engine.can_progress:
                        # every row waits for the store: give its threads the processor
                        self._wake.wait(0.005)
                        self._wake.clear()
                else:
                    self._engine.flow.poll()
                    self._wake.wait(0.2)
                    self._wake.clear()
        except BaseException as exc:
            _log.exception("the engine's thread died")
            self._stopping = True
            self._on_fatal(exc)

    def _serve_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            try:
                command.result.append(command.act())
            except LongreachError as exc:
                command.result.append(exc)
            finally:
                command.done.set()

    def _deliver(self, event: RowEvent) -> None:
        stream = self._streams.get(event.row_id)
        if stream is not None:
            stream.put(event)
        if event.kind in ("done", "error"):
            self._streams.pop(event.row_id, None)
