"""Reading one share of a batch: the pages that one store was asked for, in place or over the wire."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..core.errors import LongreachError, StoreUnreachable
from ..core.page_key import PageKey, RecipeFingerprint
from .client_memory import ClientMemory, PageHandle
from .client_rows import PrivatePages, Row, RowTable
from .fetch_plan import Share
from .hedge import Hedging
from .page import has_checksums
from .store_link import Copy, StoreLink
from .store_pool import Counters, StorePool
from .transport import ReplyStream

logger = logging.getLogger(__name__)
_wire_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False, slots=True)
class FetchParts:
    """What every batch of a client shares. The executor must not be the caller's own."""

    pool: StorePool
    memory: ClientMemory
    rows: RowTable
    private: PrivatePages
    counters: Counters
    recipe: RecipeFingerprint
    lease_s: float
    executor: Executor
    hedging: Hedging
    hedging_lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False, slots=True)
class Run:
    """A share that a thread is reading."""

    share: Share
    link: StoreLink
    stream: ReplyStream | None = None
    stopped: bool = False
    """Nobody wants its pages any more."""
    waits_since_s: float | None = None
    """Since when the store has been silent; None while it is not waited for."""
    heard: bool = False
    won: bool = False
    """A hedge whose pages came first."""
    patience_s: float = 0.0
    """Silence after which the store is given up."""
    hedge_after_s: float = 0.0


class Sink(Protocol):
    """What a batch is told by the threads that read its shares."""

    def opened(self, run: Run, stream: ReplyStream) -> None: ...

    def heard(self, run: Run) -> None:
        """The store said something."""
        ...

    def accept(self, run: Run, key: PageKey, hold: Callable[[], PageHandle]) -> bool:
        """A good page is there; if it is wanted, `hold` makes it the row's."""
        ...

    def bad(self, run: Run, key: PageKey, reason: str) -> None: ...

    def owes(self, run: Run) -> bool:
        """Whether anything of the share is still wanted."""
        ...


class ShareReader:
    """Runs in the threads of a batch. Every page is checked, and a bad copy reported."""

    def __init__(self, parts: FetchParts, row: Row, sink: Sink, check: bool) -> None:
        self._parts = parts
        self._row = row
        self._sink = sink
        self._check = check

    def in_place(self, run: Run) -> bool:
        """False: the store has restarted and is now read over the wire."""
        parts, link, row = self._parts, run.link, self._row
        # noted before the answer: a pin whose answer is lost is released with the row
        parts.rows.note_pin(row, link)
        n_checked = 0
        try:
            copies = link.prepare_load(
                run.share.keys, row.owner, parts.lease_s, timeout_s=run.patience_s
            )
            self._sink.heard(run)
            for key, copy in zip(run.share.keys, copies, strict=True):
                if run.stopped:
                    return True
                if copy is None:
                    self._sink.bad(run, key, "missing")
                    continue
                if copy.memory is None:
                    return False
                n_checked += self._check
                if self._check and not self._good(
                    run, key, copy, copy.memory, copy.slot, "corrupt_inplace"
                ):
                    continue
                handle = parts.memory.handle(
                    key, copy.memory, copy.slot, copy.checksums, link.store_id
                )
                self._sink.accept(run, key, functools.partial(self._note, handle, link))
        except StoreUnreachable:
            # what it was asked for may be done after all, even after the row's release
            row.strays.add(link)
            if row.released:
                parts.pool.release_later(link, row.owner)
            raise
        finally:
            parts.counters.add(bytes_read_inplace=n_checked * parts.memory.geometry.page_nbytes)
            if row.released:  # after a cancel: the row's own release may have come too early
                parts.pool.release([link], row.owner)
        return True

    def over_wire(self, run: Run) -> None:
        """Copies pages into private slots; the store's pins end when all have arrived."""
        parts = self._parts
        owner = f"{self._row.owner}/wire/{next(_wire_numbers)}"

        idle_s = max(run.patience_s, run.link.fair_timeout_s)
        run.waits_since_s = time.monotonic()
        try:
            for key, copy, page in run.link.read(
                run.share.keys,
                owner,
                parts.lease_s,
                idle_s,
                functools.partial(self._sink.opened, run),
            ):
                self._sink.heard(run)
                if copy is None:
                    self._sink.bad(run, key, "missing")
                else:
                    self._take(run, key, copy, page)
                if run.stopped or not self._sink.owes(run):
                    return
                run.waits_since_s = time.monotonic()
        finally:
            run.waits_since_s = None
            parts.pool.release([run.link], owner)

    def _take(self, run: Run, key: PageKey, copy: Copy, page: memoryview) -> None:
        parts, row = self._parts, self._row
        parts.counters.add(bytes_read_wire=page.nbytes)
        if page.nbytes != parts.memory.geometry.page_nbytes:
            self._sink.bad(run, key, "short")
            return
        memory, slot = parts.memory.take_private()
        np.copyto(parts.memory.page(memory, slot), np.frombuffer(page, np.uint8))
        good = self._good(run, key, copy, memory, slot, "corrupt_wire")

        def hold() -> PageHandle:
            handle = parts.private.keep(
                key, memory, slot, copy.checksums, run.link.store_id, row.owner
            )
            return self._note(handle, None)

        if not good or not self._sink.accept(run, key, hold):
            parts.memory.give_back_private(memory, slot)
            if good:
                parts.counters.add(hedge_wasted_bytes=page.nbytes)

    def _note(self, handle: PageHandle, link: StoreLink | None) -> PageHandle:
        self._parts.rows.note(self._row, handle, link)
        return handle

    def _good(self, run: Run, key: PageKey, copy: Copy, memory: int, slot: int, fault: str) -> bool:
        """Checks the bytes; a bad copy is counted, and its store told."""
        parts, link = self._parts, run.link
        if copy.recipe != parts.recipe:
            fault = "wrong_recipe"
        else:
            page = parts.memory.page(memory, slot)
            if has_checksums(page, parts.memory.geometry, copy.checksums):
                return True
        parts.counters.add(corrupt_detected=1)
        self._sink.bad(run, key, fault)
        logger.warning("store %s has a corrupt copy of %s", link.store_id, key.hex()[:16])
        try:
            link.report_corrupt(key)
        except LongreachError as exc:
            logger.warning("the corrupt copy could not be reported: %s", exc.message)
        return False
