"""Random lives of a shard against a simple model: pins hold, bytes stay, no slot is lost."""

from __future__ import annotations

import tempfile

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from longreach.core.clock import ManualClock
from longreach.core.errors import LeaseExpired, StoreFull
from longreach.kvstore.arena import Arena
from longreach.kvstore.page import Bytes, PageGeometry, page_checksums
from longreach.kvstore.shard import HeldPage, OpenWrite, StoreShard

from .kv_helpers import RECIPE, ROOT, key_of

TINY = PageGeometry(1, 2, 2, 2)
N_SLOTS = 5
KEYS = st.integers(0, 7)
OWNERS = st.sampled_from(["a", "b", "c"])
LEASE_S = 10.0


def content_of(i: int, version: int) -> Bytes:
    return np.full(TINY.page_nbytes, i * 16 + version, np.uint8)


class ShardMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.arena = Arena.create(self.directory.name, TINY, N_SLOTS * TINY.page_nbytes, "machine")
        self.shard = StoreShard(self.arena)
        self.clock = ManualClock()
        self.deadline: dict[str, float] = {}
        self.pinned: dict[str, dict[int, bytes]] = {}  # owner -> slot -> bytes it relies on
        self.writes: list[tuple[OpenWrite, int]] = []
        self.first: dict[int, int] = {}  # page -> version that was completed first

    def teardown(self) -> None:
        self.arena.close()
        self.directory.cleanup()

    def _pin(self, owner: str, page: HeldPage) -> None:
        expected = self.pinned.setdefault(owner, {})
        expected[page.slot] = bytes(self.arena.slots[page.slot])

    def _extend(self, owner: str) -> None:
        now = self.clock.monotonic_s()
        self.deadline[owner] = max(self.deadline.get(owner, 0.0), now + LEASE_S)

    @rule(i=KEYS, version=st.integers(0, 2), owner=OWNERS)
    def prepare_store(self, i: int, version: int, owner: str) -> None:
        page = content_of(i, version)
        sums = page_checksums(page, TINY)
        now = self.clock.monotonic_s()
        n_free = self.shard.stats()["slots_free"]
        n_loose = self.shard.stats()["pages_held"] - self.shard.stats()["pages_pinned"]
        try:
            begun = self.shard.prepare_store(key_of(i), ROOT, RECIPE, sums, owner, now, LEASE_S)
        except StoreFull:
            assert n_free == 0
            assert n_loose == 0
            return
        self._extend(owner)
        if isinstance(begun, HeldPage):
            self._pin(owner, begun)
        else:
            taken = {slot for slots in self.pinned.values() for slot in slots}
            assert begun.page.slot not in taken
            self.arena.slots[begun.page.slot] = page
            self.writes.append((begun, version))

    @rule(data=st.data())
    def complete_store(self, data: st.DataObject) -> None:
        if not self.writes:
            return
        write, version = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        now = self.clock.monotonic_s()
        i = int(self.arena.slots[write.page.slot][0]) // 16
        was_held = self.shard.lookup([write.page.key])[0]
        page = self.shard.complete_store(write.write_id, write.owner, now, LEASE_S)
        self._extend(write.owner)
        if not was_held:
            self.first[i] = version
        held = content_of(i, self.first[i])
        assert (self.arena.slots[page.slot] == held).all(), "the first completed store wins"
        self._pin(write.owner, page)

    @rule(i=KEYS, owner=OWNERS)
    def load(self, i: int, owner: str) -> None:
        now = self.clock.monotonic_s()
        (page,) = self.shard.prepare_load([key_of(i)], owner, now, LEASE_S)
        if page is not None:
            assert (self.arena.slots[page.slot] == content_of(i, self.first[i])).all()
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

    def _forget(self, owner: str) -> None:
        self.pinned.pop(owner, None)
        self.deadline.pop(owner, None)
        self.writes = [w for w in self.writes if w[0].owner != owner]

    @invariant()
    def pinned_bytes_never_change(self) -> None:
        for slots in self.pinned.values():
            for slot, expected in slots.items():
                assert bytes(self.arena.slots[slot]) == expected

    @invariant()
    def no_slot_is_lost_or_used_twice(self) -> None:
        held = [p.slot for i in range(8) if (p := self.shard.find(key_of(i))) is not None]
        writing = [write.page.slot for write, _ in self.writes]
        pinned = {slot for slots in self.pinned.values() for slot in slots}
        used = {*held, *writing, *pinned}
        assert len(set(held)) == len(held)
        assert not set(writing) & ({*held} | pinned)
        assert self.shard.stats()["slots_free"] == N_SLOTS - len(used)
        assert self.shard.stats()["writes_open"] == len(self.writes)


ShardMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestShard = ShardMachine.TestCase
