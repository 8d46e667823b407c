"""One batch of pages under way: shares run side by side in threads, the plan decides, the caller waits
for all of them until one deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..core.errors import Cancelled, DeadlineExceeded, LongreachError, StoreUnreachable
from ..core.page_key import PageKey
from .client_memory import PageHandle
from .client_rows import Row
from .fetch_plan import FetchPlan, Share
from .page_share import FetchParts, Run, ShareReader
from .store_link import StoreLink
from .transport import ReplyStream

logger = logging.getLogger(__name__)

CANCEL_GRACE_S = 1.0
"""How long a cancelled batch waits for its streams to end, so that all is free when it returns."""


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
        self._reader = ShareReader(parts, row, self, check)
        near = [store_id for store_id, link in links.items() if link.near]
        with parts.hedging_lock:
            slow = parts.hedging.slow(time.monotonic())
        self._plan = FetchPlan(keys, ranks, near, n_replicas, slow)
        self._found: dict[PageKey, PageHandle] = {}
        self._runs: dict[int, Run] = {}
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

    def _unstopped(self) -> list[Run]:
        return [run for run in self._runs.values() if not run.stopped]

    def _start(self, shares: Iterable[Share]) -> None:
        for share in shares:
            if self._over:
                return
            run = Run(share, self._links[share.store_id])
            self._runs[share.number] = run
            if share.hedges is None:
                with self._parts.hedging_lock:
                    self._parts.hedging.request()
            try:
                self._parts.executor.submit(self._run_share, run)
            except RuntimeError:  # the client is being closed
                del self._runs[share.number]
                self._cancelled = self._over = True

    def _stop(self, run: Run) -> None:
        """Ends a share from outside; what it owes is asked elsewhere."""
        run.stopped = True
        if run.stream is not None:
            run.stream.cancel()
        self._start(self._plan.ended(run.share.number))

    def _count(self, run: Run, reason: str) -> None:
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

    def _hedge(self, run: Run, quiet_s: float) -> float:
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

    def _lost(self, run: Run, now: float) -> None:
        if not run.heard:
            with self._parts.hedging_lock:
                self._parts.hedging.lost(run.link.store_id, now)

    # --- a share, in a thread of its own ------------------------------------------------------------

    def _run_share(self, run: Run) -> None:
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

    def _ask(self, run: Run) -> None:
        mapped = run.link.mapped
        with self._changed:
            left_s = max(self._deadline_s - time.monotonic(), 0.0)
            # half of what is left, so that the next replica has its chance within the deadline
            others = self._plan.has_others(run.share.number)
            run.patience_s = left_s / 2 if others else left_s
            run.waits_since_s = time.monotonic()
            self._changed.notify_all()
        if not mapped or not self._reader.in_place(run):
            self._reader.over_wire(run)

    # --- what the share's reader tells (Sink) --------------------------------------------------------

    def opened(self, run: Run, stream: ReplyStream) -> None:
        with self._changed:
            run.stream = stream
            if run.stopped:
                stream.cancel()

    def accept(self, run: Run, key: PageKey, hold: Callable[[], PageHandle]) -> bool:
        with self._changed:
            wanted = self._arrived(run, key)
            if wanted:
                self._found[key] = hold()
            return wanted

    def heard(self, run: Run) -> None:
        """The store said something: note how long it was silent."""
        now = time.monotonic()
        since_s, run.waits_since_s = run.waits_since_s, None
        first, run.heard = not run.heard, True
        if since_s is not None:
            with self._parts.hedging_lock:
                self._parts.hedging.gap(run.link.store_id, now - since_s, first)

    def _arrived(self, run: Run, key: PageKey) -> bool:
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

    def owes(self, run: Run) -> bool:
        with self._changed:
            return self._plan.n_waiting(run.share.number) > 0

    def bad(self, run: Run, key: PageKey, reason: str) -> None:
        with self._changed:
            if run.stopped or self._over:
                return
            self._plan.bad(run.share.number, key, lacking=reason == "missing")
        self._parts.counters.add(**{f"failed_load_{reason}": 1})
