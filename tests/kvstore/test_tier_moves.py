"""Moves between the tiers, step by step: what a page that is read, checked or dropped meanwhile keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.kvstore.arena import Arena
from longreach.kvstore.disk import DiskTier
from longreach.kvstore.page import page_checksums
from longreach.kvstore.shard import HeldPage, OpenWrite, StoreShard
from longreach.kvstore.tier_moves import Move

from .kv_helpers import GEOMETRY, RECIPE, ROOT, key_of, page_of

N = GEOMETRY.page_nbytes


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[StoreShard]:
    """Four slots in memory, of which one may be used for long, and three on disk."""
    disk = DiskTier.open(tmp_path / "s.pages", GEOMETRY, 3 * N, 1.0)
    disk.fit()
    arena = Arena.create(tmp_path, GEOMETRY, 4 * N, "s")
    yield StoreShard(arena, disk, high=0.5, low=0.25)
    arena.close()
    disk.close()


def put(shard: StoreShard, i: int, owner: str = "w") -> HeldPage:
    sums = page_checksums(page_of(i), GEOMETRY)
    begun = shard.prepare_store(key_of(i), ROOT, RECIPE, sums, owner, 0.0, 10.0)
    assert isinstance(begun, OpenWrite)
    shard.slots.write(begun.page.slot, page_of(i))
    return shard.complete_store(begun.write_id, owner, 0.0, 10.0)


def copy(shard: StoreShard, move: Move | None) -> None:
    assert move is not None
    shard.slots.copy(move.source, move.target)
    shard.moves.finish(move, copied=True)


def test_a_page_that_is_pinned_on_its_way_stays_and_leaves_later_for_nothing(
    shard: StoreShard,
) -> None:
    pages = [put(shard, i) for i in range(3)]
    shard.release("w")
    move = shard.moves.next_down(0.0)
    assert move is not None
    page, slot = move.page, move.page.slot
    assert page in pages
    shard.prepare_load([page.key], "w", 0.0, 10.0)
    copy(shard, move)
    assert page.slot == slot
    assert page.backup is not None
    n_written = shard.stats()["disk_bytes_written"]
    shard.release("w")
    shard.touch([p.key for p in pages if p is not page])
    while (move := shard.moves.next_down(0.0)) is not None:
        copy(shard, move)
    assert shard.stats()["arena_pages"] == 1
    assert shard.stats()["demotions"] == 2
    assert page.slot >= 4
    assert shard.stats()["disk_bytes_written"] == n_written + N, "its own copy was there"


def test_a_page_that_is_dropped_on_its_way_frees_both_slots_at_the_end(shard: StoreShard) -> None:
    for i in range(3):
        put(shard, i)
    shard.release("w")
    move = shard.moves.next_down(0.0)
    assert move is not None
    shard.drop([move.page.key])
    assert shard.stats()["slots_free"] == 7 - 4, "source and target are still in use"
    copy(shard, move)
    assert shard.stats()["slots_free"] == 7 - 2
    assert shard.stats()["disk_pages"] == 0


def test_a_failed_move_changes_nothing(shard: StoreShard) -> None:
    for i in range(3):
        put(shard, i)
    shard.release("w")
    move = shard.moves.next_down(0.0)
    assert move is not None
    shard.moves.finish(move, copied=False)
    assert move.page.slot == move.source
    assert shard.stats()["slots_free"] == 7 - 3
    again = shard.moves.next_down(0.0)
    assert again is not None
    assert again.page is move.page


def test_a_backup_that_is_being_checked_is_not_reclaimed(shard: StoreShard) -> None:
    for i in range(3):
        put(shard, i)
    shard.release("w")
    for _ in range(2):
        copy(shard, shard.moves.next_down(0.0))
    on_disk = [p for p in shard.table.pages.values() if p.slot >= 4]
    copy(shard, shard.moves.begin_up(on_disk[0].key))  # it has a backup now
    page = on_disk[0]
    assert page.backup is not None
    assert shard.begin_check(page.key) is page
    backup = page.backup
    taken = [shard.table.take_disk(0.0) for _ in range(4)]
    assert backup not in taken
    assert taken.count(None) == 2, "one was free, one belonged to the page that could go"
    shard.end_check(page, [])
    assert shard.table.take_disk(0.0) == backup
    assert page.backup is None


def test_promotion_ends_at_the_high_watermark(shard: StoreShard) -> None:
    for i in range(5):
        put(shard, i)  # the fifth spills
    shard.release("w")
    keys = [p.key for p in shard.table.pages.values() if p.slot >= 4]
    assert len(keys) == 1
    assert shard.moves.begin_up(keys[0]) is None, "four of four are in use"
    assert shard.moves.rising(keys, 9) == []
    while (move := shard.moves.next_down(0.0)) is not None:
        copy(shard, move)
    rising = shard.moves.rising(list(shard.table.pages), 9)
    assert len(rising) == 1, "one is in use, two may be"
    copy(shard, shard.moves.begin_up(rising[0]))
    page = shard.find(rising[0])
    assert page is not None
    assert page.slot < 4
    assert (
        shard.slots.read(page.slot) == page_of([key_of(i) for i in range(5)].index(page.key))
    ).all()
