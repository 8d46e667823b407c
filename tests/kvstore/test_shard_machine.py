"""Random lives of a shard against a simple model: pins hold, bytes stay, no slot is lost; with one tier
and with two, moves under way, a disk that fails, and crashes."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longreach.core.clock import ManualClock
from longreach.core.errors import LeaseExpired, StoreFull
from longreach.kvstore.arena import Arena
from longreach.kvstore.disk import DiskTier
from longreach.kvstore.disk_index import DiskIndex
from longreach.kvstore.page import Bytes, PageGeometry, page_checksums
from longreach.kvstore.page_checks import BadCopy, read_checked
from longreach.kvstore.shard import HeldPage, OpenWrite, StoreShard
from longreach.kvstore.tier_moves import Move

from .kv_helpers import RECIPE, ROOT, key_of

TINY = PageGeometry(1, 2, 2, 2)
N_KEYS = 8
KEYS = st.integers(0, N_KEYS - 1)
OWNERS = st.sampled_from(["a", "b", "c"])
LEASE_S = 10.0


def content_of(i: int, version: int) -> Bytes:
    return np.full(TINY.page_nbytes, i * 16 + version, np.uint8)


class Hook:
    """A disk that fails when it is told to."""

    code: int | None = None

    def before_write(self, slot: int) -> None:
        if self.code is not None:
            raise OSError(self.code, "injected")

    def before_read(self, slot: int) -> None:
        if self.code == errno.EIO:
            raise OSError(self.code, "injected")


class ShardMachine(RuleBasedStateMachine):
    N_ARENA = 5
    N_DISK = 0
    THROUGH = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.hook = Hook()
        self.versions: dict[int, set[int]] = {}  # page -> versions that may be held
        self.n_steps = 0  # since the start or the last crash
        self._open()

    def _open(self) -> None:
        root = Path(self.directory.name)
        self.disk: DiskTier | None = None
        self.index: DiskIndex | None = None
        if self.N_DISK:
            n_bytes = self.N_DISK * TINY.page_nbytes
            self.disk = DiskTier.open(root / "s.pages", TINY, n_bytes, 1.0)
            self.disk.fit()
            self.disk.hook = self.hook
            self.index = DiskIndex(root / "s.index", TINY)
        self.arena = Arena.create(root, TINY, self.N_ARENA * TINY.page_nbytes, "machine")
        self.shard = StoreShard(
            self.arena, self.disk, self.index, high=0.8, low=0.4, write_through=self.THROUGH
        )
        self.deadline: dict[str, float] = {}
        self.pinned: dict[str, dict[int, bytes]] = {}  # owner -> slot -> bytes it relies on
        self.writes: list[tuple[OpenWrite, int]] = []
        self.moves: list[Move] = []
        self.checks: list[HeldPage] = []

    def _close(self) -> None:
        self.hook.code = None
        self.arena.close()
        if self.disk is not None and self.index is not None:
            self.index.close()
            self.disk.close()

    def teardown(self) -> None:
        self._close()
        self.directory.cleanup()

    def _bytes(self, slot: int) -> bytes:
        code, self.hook.code = self.hook.code, None
        try:
            return self.shard.slots.read(slot).tobytes()
        finally:
            self.hook.code = code

    def _is_right(self, i: int, slot: int) -> bool:
        found = self._bytes(slot)
        return any(found == content_of(i, v).tobytes() for v in self.versions.get(i, ()))

    def _pin(self, owner: str, page: HeldPage) -> None:
        self.pinned.setdefault(owner, {})[page.slot] = self._bytes(page.slot)

    def _extend(self, owner: str) -> None:
        now = self.clock.monotonic_s()
        self.deadline[owner] = max(self.deadline.get(owner, 0.0), now + LEASE_S)

    @initialize(n_missing=st.integers(0, 4))
    def fill(self, n_missing: int) -> None:
        self.put(0, N_KEYS - n_missing, 0, "a", False)

    @rule(i=KEYS, version=st.integers(0, 2), owner=OWNERS)
    def prepare_store(self, i: int, version: int, owner: str) -> None:
        page = content_of(i, version)
        sums = page_checksums(page, TINY)
        now = self.clock.monotonic_s()
        parent = key_of(i - 1) if i % 4 else ROOT
        try:
            begun = self.shard.prepare_store(key_of(i), parent, RECIPE, sums, owner, now, LEASE_S)
        except StoreFull:
            pages = self.shard.table.pages.values()
            loose = [p for p in pages if not p.n_pins and not p.n_movers]
            assert self.shard.slots.n_free_arena == 0
            assert not [p for p in loose if p.slot < self.N_ARENA]
            failing = self.hook.code is not None or self.shard.stats()["disk_errors"]
            if not failing:
                assert not loose
                assert self.shard.slots.n_free_disk == 0
                assert not [p for p in pages if p.backup is not None and not p.n_movers]
            return
        self._extend(owner)
        if isinstance(begun, HeldPage):
            self._pin(owner, begun)
            return
        taken = {slot for slots in self.pinned.values() for slot in slots}
        assert begun.page.slot not in taken
        code, self.hook.code = self.hook.code, None
        self.shard.slots.write(begun.page.slot, page)
        self.hook.code = code
        self.writes.append((begun, version))

    @rule(
        first=KEYS,
        n=st.integers(2, N_KEYS),
        version=st.integers(0, 2),
        owner=OWNERS,
        keep=st.booleans(),
    )
    def put(self, first: int, n: int, version: int, owner: str, keep: bool) -> None:
        for i in range(first, min(first + n, N_KEYS)):
            n_before = len(self.writes)
            self.prepare_store(i, version, owner)
            if len(self.writes) > n_before:
                self._complete(len(self.writes) - 1)
        if not keep:
            self.release(owner)

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def complete_store(self, data: st.DataObject) -> None:
        self._complete(data.draw(st.integers(0, len(self.writes) - 1)))

    def _complete(self, which: int) -> None:
        if self.hook.code == errno.EIO:
            return
        write, version = self.writes.pop(which)
        now = self.clock.monotonic_s()
        i = self._bytes(write.page.slot)[0] // 16
        was_held = self.shard.lookup([write.page.key])[0]
        page = self.shard.complete_store(write.write_id, write.owner, now, LEASE_S)
        self._extend(write.owner)
        if not was_held:
            self.versions[i] = {version}
        assert self._is_right(i, page.slot), "the first completed store wins"
        self._pin(write.owner, page)

    @rule(i=KEYS, owner=OWNERS)
    def load(self, i: int, owner: str) -> None:
        if self.hook.code == errno.EIO:
            return
        now = self.clock.monotonic_s()
        (page,) = self.shard.prepare_load([key_of(i)], owner, now, LEASE_S)
        if page is not None:
            assert self._is_right(i, page.slot)
            self._extend(owner)
            self._pin(owner, page)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        self.shard.release(owner)
        self._forget(owner)

    @rule(i=KEYS)
    def drop(self, i: int) -> None:
        self.shard.drop([key_of(i)])

    @rule(i=KEYS)
    def touch(self, i: int) -> None:
        self.shard.touch([key_of(i)])

    @rule(owner=OWNERS)
    def renew(self, owner: str) -> None:
        if self.shard.renew(owner, self.clock.monotonic_s(), LEASE_S):
            self._extend(owner)

    @rule(seconds=st.floats(0.1, 8.0))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.shard.expire(self.clock.monotonic_s())
        late = [o for o, d in self.deadline.items() if d <= self.clock.monotonic_s()]
        for owner in late:
            for write, _ in [w for w in self.writes if w[0].owner == owner]:
                try:
                    self.shard.open_write(write.write_id, owner)
                except LeaseExpired:
                    continue
                raise AssertionError("an expired write is still open")
            self._forget(owner)

    @precondition(lambda self: len(self.checks) < 2)
    @rule(i=KEYS)
    def begin_check(self, i: int) -> None:
        page = self.shard.begin_check(key_of(i))
        if page is not None:
            self.checks.append(page)

    @precondition(lambda self: self.checks)
    @rule(data=st.data())
    def end_check(self, data: st.DataObject) -> None:
        page = self.checks.pop(data.draw(st.integers(0, len(self.checks) - 1)))
        bad = []
        for slot in (page.slot, page.backup):
            read = None if slot is None else read_checked(self.shard.slots, page, slot)
            if isinstance(read, BadCopy):
                # nothing damages bytes here, but what a crash left behind may be another page's
                assert read.reason == "unreadable" or page.unchecked
                bad.append(read)
        self.shard.end_check(page, bad)

    def _forget(self, owner: str) -> None:
        self.pinned.pop(owner, None)
        self.deadline.pop(owner, None)
        self.writes = [w for w in self.writes if w[0].owner != owner]

    @invariant()
    def pinned_bytes_never_change(self) -> None:
        self.n_steps += 1
        for slots in self.pinned.values():
            for slot, expected in slots.items():
                assert self._bytes(slot) == expected

    @invariant()
    def no_slot_is_lost_or_used_twice(self) -> None:
        pages = list(self.shard.table.pages.values())
        held = [slot for p in pages for slot in (p.slot, p.backup) if slot is not None]
        assert len(set(held)) == len(held)
        writing = [write.page.slot for write, _ in self.writes]
        targets = [move.target for move in self.moves]
        pinned = {slot for slots in self.pinned.values() for slot in slots}
        # a page that was dropped while it was moved or checked keeps its slots so long
        busy = [*self.checks, *(move.page for move in self.moves)]
        kept = {s for p in busy for s in (p.slot, p.backup) if s is not None}
        fresh = [*writing, *targets]
        assert len(set(fresh)) == len(fresh)
        assert not set(fresh) & ({*held} | pinned | kept)
        stats = self.shard.stats()
        n_used = len({*held, *fresh} | pinned | kept)
        assert stats["slots_free"] == self.N_ARENA + self.N_DISK - n_used
        assert stats["writes_open"] == len(self.writes)
        assert stats["pages_held"] == len(pages)

    @invariant()
    def every_copy_of_a_seen_page_is_right(self) -> None:
        for i in range(N_KEYS):
            page = self.shard.find(key_of(i))
            if page is not None and not page.unchecked:
                assert self._is_right(i, page.slot)
                assert page.backup is None or self._is_right(i, page.backup)


class TieredMachine(ShardMachine):
    N_ARENA = 3
    N_DISK = 4

    @precondition(lambda self: len(self.moves) < 3)
    @rule()
    def begin_down(self) -> None:
        move = self.shard.moves.next_down(self.clock.monotonic_s())
        if move is not None:
            self.moves.append(move)

    @rule()
    def move_all_down(self) -> None:
        while len(self.moves) < 9:
            n_before = len(self.moves)
            self.begin_down()
            if len(self.moves) == n_before:
                break
            self._finish(n_before)

    @precondition(lambda self: len(self.moves) < 3)
    @rule(i=KEYS)
    def begin_up(self, i: int) -> None:
        move = self.shard.moves.begin_up(key_of(i))
        if move is not None:
            self.moves.append(move)

    @precondition(lambda self: self.moves)
    @rule(data=st.data())
    def finish_move(self, data: st.DataObject) -> None:
        self._finish(data.draw(st.integers(0, len(self.moves) - 1)))

    def _finish(self, which: int) -> None:
        move = self.moves.pop(which)
        bad, copied = read_checked(self.shard.slots, move.page, move.source), False
        if not isinstance(bad, BadCopy):
            try:
                self.shard.slots.write(move.target, bad)
                copied = True
            except OSError as exc:
                self.shard.table.disk_failed(self.clock.monotonic_s(), exc)
        else:
            self.shard.table.bad_copy(move.page, bad.slot, bad.reason)
        self.shard.moves.finish(move, copied)

    @rule(code=st.sampled_from([None, None, None, errno.ENOSPC, errno.EIO]))
    def disk_fails_or_recovers(self, code: int | None) -> None:
        self.hook.code = code

    @rule()
    def write_index(self) -> None:
        assert self.index is not None
        self.index.flush()

    @precondition(lambda self: self.n_steps > 15)
    @rule(write_index=st.booleans())
    def crash(self, write_index: bool) -> None:
        """What was not written to the index is lost; what it says may be outdated."""
        if write_index:
            self.write_index()
            may_be_held = self.versions
        else:  # a page that was dropped or won by another version may come back
            may_be_held = {i: {0, 1, 2} for i in range(N_KEYS)}
        on_disk = {
            p.key for p in self.shard.table.pages.values()
            if max(p.slot, p.backup or 0) >= self.N_ARENA
        }  # fmt: skip
        self.n_steps = 0
        self._close()
        self._open()
        self.versions = dict(may_be_held)
        if write_index:
            assert set(self.shard.table.pages) == on_disk


class ThroughMachine(TieredMachine):
    THROUGH = True


ShardMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TieredMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
ThroughMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestShard = ShardMachine.TestCase
TestTiers = TieredMachine.TestCase
TestThrough = ThroughMachine.TestCase
