"""One batch of pages under way: shares run side by side in threads, the plan decides, the caller waits
for all of them until one deadline."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import Cancelled, DeadlineExceeded, LongreachError, StoreUnreachable
from ..core.page_key import PageKey, RecipeFingerprint
from .client_memory import ClientMemory, PageHandle
from .client_rows import PrivatePages, Row, RowTable
from .fetch_plan import FetchPlan, Share
from .hedge import Hedging
from .page import page_checksums
from .store_link import Copy, StoreLink
from .store_pool import Counters, StorePool
from .transport import ReplyStream

logger = logging.getLogger(__name__)

CANCEL_GRACE_S = 1.0
"""How long a cancelled batch waits for its streams to end, so that all is free when it returns."""
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
class _Run:
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


class Fetch:
    """One use: `run` once; `cancel` from any thread."""

    def __init__(
        self,
        parts: FetchParts,
        keys: Sequence[PageKey],
        ranks: Mapping[PageKey, Sequence[str]],
        links: Mapping[str, StoreLink],
        row: Row,
        deadline_s: float,
        *,
        n_replicas: int = 1,
        check: bool = True,
    ) -> None:
        """keys: in order of need, each once. deadline_s: monotonic. check False: pages found in place
        are not verified (a hint that nobody reads)."""
        self._parts = parts
        self._links = links
        self._row = row
        self._deadline_s = deadline_s
        self._check = check
        near = [store_id for store_id, link in links.items() if link.near]
        with parts.hedging_lock:
            slow = parts.hedging.slow(time.monotonic())
        self._plan = FetchPlan(keys, ranks, near, n_replicas, slow)
        self._found: dict[PageKey, PageHandle] = {}
        self._runs: dict[int, _Run] = {}
        self._changed = threading.Condition()
        self._over = False
        self._cancelled = False

    def run(self) -> dict[PageKey, PageHandle]:
        """Handles of the pages that came in time, checked and held by the row. Raises Cancelled."""
        with self._changed:
            self._start(self._plan.begin())
            while not self._cancelled and (not self._plan.done or self._unstopped()):
                now = time.monotonic()
                if now >= self._deadline_s:
                    break
                next_s = min(self._watch(now), self._deadline_s - now)
                self._changed.wait(next_s)
            self._over = True
            for run in self._unstopped():
                self._count(run, "deadline")
                self._stop(run)
            if self._cancelled:
                self._changed.wait_for(lambda: not self._runs, CANCEL_GRACE_S)
                raise Cancelled(f"row {self._row.name} was released while its pages were fetched")
            self._parts.counters.add(pages_unavailable=len(self._plan.missing))
            return self._found

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = self._over = True
            for run in self._unstopped():
                self._stop(run)
            self._changed.notify_all()

    # --- with the lock held -----------------------------------------------------------------------

    def _unstopped(self) -> list[_Run]:
        return [run for run in self._runs.values() if not run.stopped]

    def _start(self, shares: Iterable[Share]) -> None:
        for share in shares:
            if self._over:
                return
            run = _Run(share, self._links[share.store_id])
            self._runs[share.number] = run
            if share.hedges is None:
                with self._parts.hedging_lock:
                    self._parts.hedging.request()
            try:
                self._parts.executor.submit(self._run_share, run)
            except RuntimeError:  # the client is being closed
                del self._runs[share.number]
                self._cancelled = self._over = True

    def _stop(self, run: _Run) -> None:
        """Ends a share from outside; what it owes is asked elsewhere."""
        run.stopped = True
        if run.stream is not None:
            run.stream.cancel()
        self._start(self._plan.ended(run.share.number))

    def _count(self, run: _Run, reason: str) -> None:
        n_waiting = self._plan.n_waiting(run.share.number)
        if n_waiting:
            self._parts.counters.add(**{f"failed_load_{reason}": n_waiting})

    def _watch(self, now: float) -> float:
        """Hedges shares of stores that are silent for too long, gives up those that stay so. Returns
        seconds until the next look."""
        next_s = self._deadline_s - now
        for run in self._unstopped():
            if run.waits_since_s is None:
                next_s = min(next_s, 0.05)
                continue
            quiet_s = now - run.waits_since_s
            if quiet_s >= run.patience_s and self._plan.has_others(run.share.number):
                logger.warning("store %s is given up: %.1f s silent", run.link.store_id, quiet_s)
                self._count(run, "deadline")
                self._lost(run, now)
                self._stop(run)
                continue
            next_s = min(next_s, max(run.patience_s - quiet_s, 0.01), self._hedge(run, quiet_s))
        return next_s

    def _hedge(self, run: _Run, quiet_s: float) -> float:
        hedging, number = self._parts.hedging, run.share.number
        if run.share.hedges is not None or self._plan.hedged(number):
            return float("inf")
        with self._parts.hedging_lock:
            patience_s = hedging.patience_s(run.link.store_id, not run.heard)
            patience_s = max(patience_s, run.hedge_after_s)
            if quiet_s < patience_s:
                return patience_s - quiet_s
            shares = self._plan.hedge(number, hedging.may_hedge)
        # without a hedge (no other store, no budget) the next look is not at once
        run.hedge_after_s = quiet_s + patience_s
        if shares:
            self._parts.counters.add(hedges_sent=len(shares))
            self._start(shares)
        return patience_s

    def _lost(self, run: _Run, now: float) -> None:
        if not run.heard:
            with self._parts.hedging_lock:
                self._parts.hedging.lost(run.link.store_id, now)

    # --- a share, in a thread of its own ------------------------------------------------------------

    def _run_share(self, run: _Run) -> None:
        reason, failed = "missing", False
        try:
            if not run.stopped:
                self._ask(run)
        except StoreUnreachable as exc:
            late = isinstance(exc.__cause__, DeadlineExceeded)
            reason, failed = "deadline" if late else "unreachable", True
            if not run.stopped:
                logger.warning("pages are taken from elsewhere: %s", exc.message)
        except Cancelled:
            pass
        except LongreachError as exc:
            reason, failed = "unreachable", True
            logger.warning("pages are taken from elsewhere: %s", exc.message)
        except Exception:
            reason, failed = "unreachable", True
            logger.exception("a share of pages failed")
        finally:
            with self._changed:
                self._runs.pop(run.share.number, None)
                self._count(run, reason)
                self._start(self._plan.ended(run.share.number, failed=failed))
                self._changed.notify_all()

    def _ask(self, run: _Run) -> None:
        mapped = run.link.mapped
        with self._changed:
            left_s = max(self._deadline_s - time.monotonic(), 0.0)
            # half of what is left, so that the next replica has its chance within the deadline
            others = self._plan.has_others(run.share.number)
            run.patience_s = left_s / 2 if others else left_s
            run.waits_since_s = time.monotonic()
            self._changed.notify_all()
        if not mapped or not self._ask_mapped(run):
            self._ask_wire(run)

    def _heard(self, run: _Run) -> None:
        """The store said something: note how long it was silent."""
        now = time.monotonic()
        since_s, run.waits_since_s = run.waits_since_s, None
        first, run.heard = not run.heard, True
        if since_s is not None:
            with self._parts.hedging_lock:
                self._parts.hedging.gap(run.link.store_id, now - since_s, first)

    def _ask_mapped(self, run: _Run) -> bool:
        """False: the store has restarted and is now read over the wire."""
        parts, link, row = self._parts, run.link, self._row
        # noted before the answer: a pin whose answer is lost is released with the row
        parts.rows.note_pin(row, link)
        n_checked = 0
        try:
            copies = link.prepare_load(
                run.share.keys, row.owner, parts.lease_s, timeout_s=run.patience_s
            )
            self._heard(run)
            for key, copy in zip(run.share.keys, copies, strict=True):
                if run.stopped:
                    return True
                if copy is None:
                    self._bad(run, key, "missing")
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
                with self._changed:
                    if self._arrived(run, key):
                        parts.rows.note(row, handle, link)
                        self._found[key] = handle
        finally:
            parts.counters.add(bytes_read_inplace=n_checked * parts.memory.geometry.page_nbytes)
            if row.released:  # after a cancel: the row's own release may have come too early
                parts.pool.release([link], row.owner)
        return True

    def _ask_wire(self, run: _Run) -> None:
        """Copies pages into private slots; the store's pins end when all have arrived."""
        parts = self._parts
        owner = f"{self._row.owner}/wire/{next(_wire_numbers)}"

        def opened(stream: ReplyStream) -> None:
            with self._changed:
                run.stream = stream
                if run.stopped:
                    stream.cancel()

        idle_s = max(run.patience_s, run.link.fair_timeout_s)
        run.waits_since_s = time.monotonic()
        try:
            for key, copy, page in run.link.read(
                run.share.keys, owner, parts.lease_s, idle_s, opened
            ):
                self._heard(run)
                if copy is None:
                    self._bad(run, key, "missing")
                else:
                    self._take(run, key, copy, page)
                if run.stopped or not self._owes(run):
                    return
                run.waits_since_s = time.monotonic()
        finally:
            run.waits_since_s = None
            parts.pool.release([run.link], owner)

    def _take(self, run: _Run, key: PageKey, copy: Copy, page: memoryview) -> None:
        parts, row = self._parts, self._row
        parts.counters.add(bytes_read_wire=page.nbytes)
        if page.nbytes != parts.memory.geometry.page_nbytes:
            self._bad(run, key, "short")
            return
        memory, slot = parts.memory.take_private()
        np.copyto(parts.memory.page(memory, slot), np.frombuffer(page, np.uint8))
        good = self._good(run, key, copy, memory, slot, "corrupt_wire")
        with self._changed:
            wanted = good and self._arrived(run, key)
            if wanted:
                handle = parts.private.keep(
                    key, memory, slot, copy.checksums, run.link.store_id, row.owner
                )
                parts.rows.note(row, handle, None)
                self._found[key] = handle
        if not wanted:
            parts.memory.give_back_private(memory, slot)
            if good:
                parts.counters.add(hedge_wasted_bytes=page.nbytes)

    def _arrived(self, run: _Run, key: PageKey) -> bool:
        """With the lock held. Whether the page is wanted; then shares that lost by it are stopped."""
        if self._over or run.stopped:
            return False
        failed_before = self._plan.failed_before(key)
        if not self._plan.arrived(run.share.number, key):
            return False
        if failed_before:
            self._parts.counters.add(replica_reads=1)
        if run.share.hedges is not None and not run.won:
            run.won = True
            self._parts.counters.add(hedges_won=1)
            original = self._runs.get(run.share.hedges)
            if original is not None:
                self._lost(original, time.monotonic())
        for number in self._plan.needless():
            other = self._runs.get(number)
            if other is not None and other is not run and not other.stopped:
                self._stop(other)
        return True

    def _owes(self, run: _Run) -> bool:
        with self._changed:
            return self._plan.n_waiting(run.share.number) > 0

    def _bad(self, run: _Run, key: PageKey, reason: str) -> None:
        with self._changed:
            if run.stopped or self._over:
                return
            self._plan.bad(run.share.number, key, lacking=reason == "missing")
        self._parts.counters.add(**{f"failed_load_{reason}": 1})

    def _good(
        self, run: _Run, key: PageKey, copy: Copy, memory: int, slot: int, fault: str
    ) -> bool:
        """Checks the bytes; a bad copy is counted, and its store told."""
        parts, link = self._parts, run.link
        if copy.recipe != parts.recipe:
            fault = "wrong_recipe"
        else:
            actual = page_checksums(parts.memory.page(memory, slot), parts.memory.geometry)
            if np.array_equal(actual, copy.checksums):
                return True
        parts.counters.add(corrupt_detected=1)
        self._bad(run, key, fault)
        logger.warning("store %s has a corrupt copy of %s", link.store_id, key.hex()[:16])
        try:
            link.report_corrupt(key)
        except LongreachError as exc:
            logger.warning("the corrupt copy could not be reported: %s", exc.message)
        return False
