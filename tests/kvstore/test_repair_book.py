"""The numbers that a repairer tells, on times of the test's own."""

from __future__ import annotations

from typing import Any

from longreach.kvstore.repair_book import RepairBook
from longreach.kvstore.repair_plan import OwnPage, Todo

from .kv_helpers import ROOT, key_of

KEYS = sorted(key_of(i) for i in range(5))


def todo(
    i: int, *targets: str, n_short: int = 0, surplus: bool = False, pinned: bool = False
) -> Todo:
    return Todo(OwnPage(KEYS[i], ROOT, pinned), targets, targets, n_short, surplus)


def told(book: RepairBook, draining: bool = False) -> dict[str, Any]:
    return book.status(7, draining)


def test_a_part_that_was_looked_at_replaces_what_was_known_of_it() -> None:
    book = RepairBook()
    book.looked_at(None, None, [todo(i, "a") for i in range(5)])
    book.looked_at(KEYS[0], KEYS[2], [])
    assert [t.page.key for t in book.todos()] == [KEYS[0], KEYS[3], KEYS[4]]
    book.looked_at(KEYS[2], None, [todo(4, "b", n_short=1)])
    assert [t.page.key for t in book.todos()] == [KEYS[4], KEYS[0]]
    book.looked_at(None, KEYS[0], [])
    assert [t.pushes for t in book.todos()] == [("b",)]


def test_too_few_copies_come_first_then_pages_in_use() -> None:
    book = RepairBook()
    found = [todo(0, "a"), todo(1, "a", pinned=True), todo(2, "a", n_short=1)]
    book.looked_at(None, None, found)
    assert book.todos() == [found[2], found[1], found[0]]
    assert (told(book)["under_replicated"], told(book)["to_move"]) == (1, 2)


def test_pushes_settle_pages_and_are_timed_from_the_loss() -> None:
    book = RepairBook()
    book.looked_at(None, None, [todo(0, "a", "b", n_short=2), todo(1, "a", surplus=True)])
    book.lost(100.0)
    book.note_whole(7, 104.0)
    book.pushed(KEYS[0], "a", 10, False, 105.0)
    assert told(book)["under_replicated"] == 1
    book.surveyed_epoch = 7
    book.note_whole(7, 105.5)
    assert told(book)["time_to_whole_s"] is None
    book.pushed(KEYS[0], "b", 10, False, 106.0)
    book.note_whole(6, 106.0)
    assert told(book)["time_to_whole_s"] is None, "not all pages were looked at in this epoch"
    book.note_whole(7, 107.0)
    book.note_whole(7, 109.0)
    status = told(book)
    assert (status["time_to_first_repair_s"], status["time_to_whole_s"]) == (5.0, 7.0)
    assert (status["pages_pushed"], status["bytes_pushed"]) == (2, 20)
    assert (status["under_replicated"], status["to_move"]) == (0, 1)
    book.lost(100.2)  # the same loss, told again
    assert told(book)["time_to_whole_s"] == 7.0
    book.lost(110.0)
    assert told(book)["time_to_first_repair_s"] is told(book)["time_to_whole_s"] is None


def test_drained_when_every_target_has_or_had_each_page() -> None:
    book = RepairBook()
    book.looked_at(None, None, [todo(0, "a", surplus=True), todo(1, surplus=True)])
    assert not told(book, draining=True)["drained"]
    book.surveyed_epoch = 7
    assert not told(book, draining=True)["drained"]
    book.pushed(KEYS[0], "a", 10, True, 1.0)
    assert told(book, draining=True)["drained"]
    assert not told(book)["drained"]
    # the target was full and gave it up again
    book.looked_at(None, None, [todo(0, "a", surplus=True)])
    assert told(book, draining=True)["drained"]
    book.begin_epoch()
    assert not told(book, draining=True)["drained"]


def test_stats_are_numbers_alone() -> None:
    book = RepairBook()
    book.failed("STORE_FULL")
    book.failed("STORE_FULL")
    book.dropped([KEYS[0]], 1)
    stats = book.stats(7, False)
    assert stats["repair_failures"] == stats["repair_failures_store_full"] == 2
    assert stats["repair_dropped_surplus"] == 1
    assert stats["repair_epoch"] == 7
    assert "repair_time_to_whole_s" not in stats
    assert all(type(value) in (int, float) for value in stats.values())
