"""An iterator that works in a thread of its own, so that its reader can be gone and can have a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Full, Queue
from typing import TypeVar

from ..core.errors import DeadlineExceeded

T = TypeVar("T")
_LOOK_S = 0.2
_AHEAD = 8


def in_background(
    work: Generator[T, None, None], name: str, is_active: Callable[[], bool], silence_s: float
) -> Iterator[T]:
    """What `work` yields, made ahead by a thread. Ends when is_active() is False; then, and when it is
    closed, work is closed before its next item.

    Raises what work raises, DeadlineExceeded if it yields nothing for silence_s.
    """
    items: Queue[T | Exception | None] = Queue(maxsize=_AHEAD)
    gone = threading.Event()

    def put(item: T | Exception | None) -> None:
        while not gone.is_set():
            try:
                items.put(item, timeout=_LOOK_S)
                return
            except Full:
                continue

    def run() -> None:
        try:
            for item in work:
                put(item)
                if gone.is_set():
                    break
            put(None)
        except Exception as exc:
            put(exc)
        finally:
            work.close()

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        heard_s = time.monotonic()
        while is_active():
            try:
                item = items.get(timeout=_LOOK_S)
            except Empty:
                if time.monotonic() - heard_s > silence_s:
                    raise DeadlineExceeded(f"{name} made no progress for {silence_s:g} s") from None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
            heard_s = time.monotonic()
    finally:
        gone.set()
