"""The thread of a store that brings its pages to where they should be (repair_plan.py decides).

A new membership is acted on at once: all pages are looked at, then copies go out. Else a part of the
pages, in key order, is looked at every few seconds, and all of them again while something is left
to do. Pages go out checked, never faster than the budget, and each call has a deadline.

A copy may push an unused page out of a full store only where it matters: for a page that is in use
here or for a store that is draining, and once in an epoch. All others take free room only, or stores
that are full would copy and evict for ever.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.clock import Clock, SystemClock
from ..core.errors import (
    InvalidInput,
    LongreachError,
    NotFound,
    PageCorrupt,
    StoreFull,
    as_longreach_error,
)
from ..core.page_key import PageKey
from .membership import Member, Membership
from .pacing import Backoff, TokenBucket
from .placement import rank
from .repair_book import RepairBook
from .repair_plan import Answer, OwnPage, Todo, plan, questions
from .transport import Channel, Reply, connect

logger = logging.getLogger(__name__)

Handle = Callable[[str, dict[str, Any], Sequence[memoryview]], Reply | Iterator[Reply]]

SWEEP_S = 3.0
"""Pause between two looks at a part of the pages."""
BUSY_S = 1.0
"""The same while something is left to do."""
PART_PAGES = 2000
"""Pages looked at together."""
ALL_PAGES = 10_000
"""The same when all are looked at."""
LOOKUP_TIMEOUT_S = 2.0
WRITE_TIMEOUT_S = 10.0
LEASE_S = 30.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class _View:
    """What was told last. Replaced by a new one, so that work in progress sees that it is old."""

    membership: Membership
    replicas: int


class Repairer:
    """`told`, and `epoch` where it decides something, belong under the store's lock."""

    def __init__(
        self, store_id: str, handle: Handle, bytes_per_s: int, clock: Clock | None = None
    ) -> None:
        """handle: the store's own; asked to list, read, complete_load and drop. The thread begins
        with the first membership."""
        self.store_id = store_id
        self._handle = handle
        self._clock = clock or SystemClock()
        self._owner = f"repair/{store_id}"
        self._view = _View(Membership(0), 1)
        self._book = RepairBook()
        self._bucket = TokenBucket(bytes_per_s)
        self._backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._channels: dict[str, Channel] = {}  # by address
        self._cursor: PageKey | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        return self._view.membership.epoch

    @property
    def draining(self) -> bool:
        member = self._view.membership.find(self.store_id)
        return member is not None and member.draining

    def told(
        self, membership: Membership, replicas: int, loss_age_s: float | None
    ) -> dict[str, Any]:
        """The stores are these. Returns the newest membership known here: an older one is ignored.
        loss_age_s: how long ago a store was lost, for the times that repair took. Raises InvalidInput
        if replicas is below 1 or the age no number."""
        if replicas < 1:
            raise InvalidInput(f"replicas must be at least 1, got {replicas}")
        if loss_age_s is not None and not isinstance(loss_age_s, int | float):
            raise InvalidInput(f"`loss_age_s` must be seconds, got {loss_age_s!r:.80}")
        if membership.epoch >= self.epoch and not self._closing.is_set():
            # what happened before this store came up does not concern it
            if loss_age_s is not None and self.epoch:
                self._book.lost(self._now() - loss_age_s)
            if (view := _View(membership, replicas)) != self._view:
                self._view = view
                self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="repairer", daemon=True)
                self._thread.start()
        return {"epoch": self.epoch, "membership": self._view.membership.to_wire()}

    def status(self) -> dict[str, Any]:
        return self._book.status(self.epoch, self.draining)

    def stats(self) -> dict[str, int | float]:
        return self._book.stats(self.epoch, self.draining)

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        for channel in list(self._channels.values()):
            channel.close()  # ends the call that is waiting
        if self._thread is not None:
            self._thread.join(timeout=2 * WRITE_TIMEOUT_S)
        for channel in list(self._channels.values()):
            channel.close()

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        again = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while not self._closing.is_set():
            view = self._view
            new = view.membership.epoch != self._book.surveyed_epoch
            if new:
                again.clear()
                self._backoff.clear()
                self._book.begin_epoch()
            everything = new or (bool(self._book.todos()) and again.ready("all", self._now()))
            try:
                if self._round(view, everything):
                    again.worked("all")
                elif everything:
                    again.failed("all", self._now())
            except Exception as exc:  # a store that stops repairing would be noticed too late
                self._failed(exc, "")
                logger.exception("repair failed; it goes on")
            busy = view is not self._view or bool(self._book.todos())
            self._wake.wait(BUSY_S if busy else SWEEP_S)
            self._wake.clear()

    def _round(self, view: _View, everything: bool) -> int:
        """Looks at a part of the pages, or at all; then does what is to do. Returns how much was
        done."""
        self._close_former_channels(view)
        after = None if everything else self._cursor
        while True:
            limit = ALL_PAGES if everything else PART_PAGES
            listed = self._own("list", {"after": after, "limit": limit})
            pages = [OwnPage(p["key"], p["parent"], p["n_pins"] > 0) for p in listed["pages"]]
            self._book.looked_at(after, listed["next"], self._survey(view, pages))
            after = self._cursor = listed["next"]
            if self._closing.is_set() or view is not self._view:
                return 0
            if not everything or after is None:
                break
        if everything:
            self._book.surveyed_epoch = view.membership.epoch
        n_done = self._push_all(view) + self._drop_surplus(view)
        self._book.note_whole(self.epoch, self._now())
        return n_done

    def _survey(self, view: _View, pages: list[OwnPage]) -> list[Todo]:
        me, membership, replicas = self.store_id, view.membership, view.replicas
        ranks = {page.key: rank(page.key, membership) for page in pages}
        answers = self._ask(view, questions(me, replicas, ranks))
        todos = plan(me, replicas, membership.epoch, ranks, pages, answers)
        keys = [todo.page.key for todo in todos if todo.pushes]
        if not keys:
            return todos
        # who else has a copy: a page with enough of them only moves
        everyone = {m.store_id: keys for m in membership if m.store_id != me}
        for store_id, answer in self._ask(view, everyone).items():
            before = answers.get(store_id, answer)
            epoch = min(before.epoch, answer.epoch)
            answers[store_id] = Answer(epoch, before.held | answer.held)
        return plan(me, replicas, membership.epoch, ranks, pages, answers)

    def _ask(self, view: _View, asked: dict[str, list[PageKey]]) -> dict[str, Answer]:
        """What the stores hold, of those that answer."""
        answers = {}
        for store_id, keys in asked.items():
            member = view.membership.find(store_id)
            if member is None or not self._backoff.ready(store_id, self._now()):
                continue
            try:
                reply = self._channel(member).call(
                    "lookup", {"keys": keys}, timeout_s=LOOKUP_TIMEOUT_S
                )
            except LongreachError as exc:
                self._failed(exc, store_id)
                continue
            held = zip(keys, reply.header["held"], strict=True)
            epoch = int(reply.header.get("epoch", 0))
            answers[store_id] = Answer(epoch, frozenset(key for key, is_held in held if is_held))
        return answers

    def _push_all(self, view: _View) -> int:
        """Gives away the copies that are lacking. Returns how many."""
        n_done = 0
        for todo in self._book.todos():
            for target in todo.pushes:
                if self._closing.is_set() or view is not self._view:
                    return n_done
                n_done += self._push(view, todo.page, target)
        return n_done

    def _push(self, view: _View, page: OwnPage, target: str) -> bool:
        member, now_s = view.membership.find(target), self._now()
        matters = page.pinned or self.draining
        forced = matters and not self._book.was_given(page.key, target)
        room = f"{target} ({'forced' if forced else 'free room'})"
        if member is None or not all(self._backoff.ready(n, now_s) for n in (target, room)):
            return False
        try:
            n_bytes = self._send(member, page, forced)
        except NotFound as exc:  # evicted here, or corrupt and dropped
            self._failed(exc, "")
            self._book.gone([page.key])
            return False
        except StoreFull as exc:
            self._failed(exc, room)
            return False
        except LongreachError as exc:
            self._failed(exc, "" if isinstance(exc, PageCorrupt) else target)
            return False
        self._backoff.worked(target)
        self._book.pushed(page.key, target, n_bytes, forced, self._now())
        return True

    def _send(self, member: Member, page: OwnPage, forced: bool) -> int:
        """Checks the page and writes it there, where it stays unpinned. Returns its bytes."""
        lease = {"owner": self._owner, "lease_s": LEASE_S}
        try:
            replies = self._handle("read", {"keys": [page.key], "passing": True, **lease}, [])
            assert isinstance(replies, Iterator)
            (reply,) = replies
            if not reply.header["found"]:
                raise NotFound(f"page {page.key.hex()[:16]} has no good copy here any more")
            (data,) = reply.buffers
            self._closing.wait(self._bucket.take(len(data), self._now()))
            header = {"key": page.key, "parent": page.parent, "recipe": reply.header["recipe"]}
            header |= {"checksums": reply.header["checksums"], "pin": False, "evict": forced}
            done = self._channel(member).call(
                "write", {**header, **lease}, [data], timeout_s=WRITE_TIMEOUT_S
            )
            if done.header["held"]["checksums"] != header["checksums"]:
                self._book.failed("MISMATCHED_DUPLICATE")  # another writer was first there
            return len(data)
        finally:
            self._own("complete_load", {"keys": [page.key], "owner": self._owner})

    def _drop_surplus(self, view: _View) -> int:
        """Drops what every target holds, after asking them once more. Returns how many pages."""
        pages = [todo.page for todo in self._book.todos() if todo.droppable]
        n_done = 0
        for first in range(0, len(pages), PART_PAGES):
            todos = self._survey(view, pages[first : first + PART_PAGES])
            keys = [todo.page.key for todo in todos if todo.droppable]
            header = {"keys": keys, "unpinned": True, "epoch": view.membership.epoch}
            n_dropped = int(self._own("drop", header)["n_dropped"])
            self._book.dropped(keys, n_dropped)
            n_done += n_dropped
        return n_done

    def _own(self, method: str, header: dict[str, Any]) -> dict[str, Any]:
        reply = self._handle(method, header, [])
        assert isinstance(reply, Reply)
        return reply.header

    def _now(self) -> float:
        return self._clock.monotonic_s()

    def _channel(self, member: Member) -> Channel:
        channel = self._channels.get(member.address)
        if channel is None:
            channel = self._channels[member.address] = connect(member.address)
        return channel

    def _close_former_channels(self, view: _View) -> None:
        for address in set(self._channels) - set(view.membership.addresses().values()):
            self._channels.pop(address).close()

    def _failed(self, exc: BaseException, name: str) -> None:
        """Counts; with a name, nothing more is tried there for a while."""
        error = as_longreach_error(exc)
        self._book.failed(error.reason)
        if name:
            pause_s = self._backoff.failed(name, self._now())
            logger.warning("no copies to %s for %.0f s: %s", name, pause_s, error.message)
