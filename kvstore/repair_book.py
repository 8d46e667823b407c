"""What a store's repairer knows: the pages not yet in order, what was done, how long repair took.

No I/O and no clock; whoever calls brings the time. Thread-safe, since the status is asked for by
others.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..core.page_key import PageKey
from .repair_plan import Todo

SAME_LOSS_S = 0.5
"""A loss that is told of again comes out at a slightly different time."""


class RepairBook:
    def __init__(self) -> None:
        self.surveyed_epoch = 0
        """The last epoch under which every page was looked at."""
        self._todos: dict[PageKey, Todo] = {}
        self._given: set[tuple[PageKey, str]] = set()
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._loss_s: float | None = None
        self._first_repair_s: float | None = None
        self._whole_s: float | None = None
        self._lock = threading.Lock()

    def begin_epoch(self) -> None:
        with self._lock:
            self._given.clear()

    def looked_at(self, after: PageKey | None, last: PageKey | None, found: Iterable[Todo]) -> None:
        """All pages above `after` up to and with `last` were looked at; None is either end."""
        with self._lock:
            outside = {
                key: todo
                for key, todo in self._todos.items()
                if (after is not None and key <= after) or (last is not None and key > last)
            }
            self._todos = outside | {todo.page.key: todo for todo in found}

    def todos(self) -> list[Todo]:
        """The most urgent first: pages with too few copies, then pages in use."""
        with self._lock:
            return sorted(self._todos.values(), key=lambda t: (not t.n_short, not t.page.pinned))

    def was_given(self, key: PageKey, target: str) -> bool:
        """Whether this page was forced upon that store in this epoch."""
        return (key, target) in self._given

    def pushed(self, key: PageKey, target: str, n_bytes: int, forced: bool, now_s: float) -> None:
        with self._lock:
            self._counts.update(pages_pushed=1, bytes_pushed=n_bytes)
            if forced:
                self._given.add((key, target))
            if self._loss_s is not None and self._first_repair_s is None:
                self._first_repair_s = now_s - self._loss_s
            todo = self._todos.pop(key, None)
            if todo is None:
                return
            todo = replace(
                todo,
                lacking=tuple(i for i in todo.lacking if i != target),
                pushes=tuple(i for i in todo.pushes if i != target),
                n_short=max(0, todo.n_short - 1),
            )
            if todo.lacking or todo.surplus:
                self._todos[key] = todo

    def dropped(self, keys: Iterable[PageKey], n_dropped: int) -> None:
        with self._lock:
            self._counts["dropped_surplus"] += n_dropped
        self.gone(keys)

    def gone(self, keys: Iterable[PageKey]) -> None:
        """Nothing is to be done for these pages any more."""
        with self._lock:
            for key in keys:
                self._todos.pop(key, None)

    def failed(self, reason: str) -> None:
        with self._lock:
            self._failures[reason] += 1

    def lost(self, loss_s: float) -> None:
        """A store was lost at this time: from now on its repair is timed."""
        with self._lock:
            if self._loss_s is None or loss_s > self._loss_s + SAME_LOSS_S:
                self._loss_s, self._first_repair_s, self._whole_s = loss_s, None, None

    def note_whole(self, epoch: int, now_s: float) -> None:
        """Every page was looked at in this epoch; the time is noted if none has too few copies."""
        with self._lock:
            short = any(todo.n_short for todo in self._todos.values())
            if self.surveyed_epoch == epoch and not short and self._loss_s is not None:
                self._whole_s = now_s - self._loss_s if self._whole_s is None else self._whole_s

    def status(self, epoch: int, draining: bool) -> dict[str, Any]:
        """Pages and their numbers are those of the last look at each. `surveyed_epoch` is the epoch
        under which all were looked at: before it is `epoch`, nothing to do means little. Times are
        None until there is something to tell. A page that a full store took from a draining one and
        gave up again does not keep the drain from its end."""
        with self._lock:
            todos = list(self._todos.values())
            kept = any((t.page.key, i) not in self._given for t in todos for i in t.lacking)
            return {
                "epoch": epoch,
                "surveyed_epoch": self.surveyed_epoch,
                "under_replicated": sum(t.n_short > 0 for t in todos),
                "to_move": sum(not t.n_short and (t.surplus or bool(t.pushes)) for t in todos),
                "pages_pushed": self._counts["pages_pushed"],
                "bytes_pushed": self._counts["bytes_pushed"],
                "dropped_surplus": self._counts["dropped_surplus"],
                "failures": dict(self._failures),
                "time_to_first_repair_s": self._first_repair_s,
                "time_to_whole_s": self._whole_s,
                "drained": draining and self.surveyed_epoch == epoch and not kept,
            }

    def stats(self, epoch: int, draining: bool) -> dict[str, int | float]:
        """The status in numbers alone, under names that begin with repair_. Times that there are not
        yet are left out."""
        status = self.status(epoch, draining)
        failures = status.pop("failures")
        numbers = {f"repair_{k}": +v for k, v in status.items() if v is not None}
        numbers["repair_failures"] = sum(failures.values())
        return numbers | {f"repair_failures_{k.lower()}": n for k, n in failures.items()}
