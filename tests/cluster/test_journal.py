"""A job accepted is never lost, a row ends once, tokens so far survive; also by kill -9."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.cluster.journal import Journal
from longreach.cluster.records import NewRow, RowEnd
from longreach.cluster.row import JobState, RowSpec, RowState
from longreach.core.errors import (
    AlreadyExists,
    AlreadyServing,
    FailedPrecondition,
    NotFound,
    QueueFull,
)

CHILD = Path(__file__).with_name("journal_child.py")


def spec(custom_id: str = "a") -> RowSpec:
    return RowSpec(custom_id=custom_id, context="x", question="y")


def accept(journal: Journal, job_id: str = "job-1", n_rows: int = 3, key: str = "") -> None:
    rows = [NewRow(line, f"c{line}", spec(f"c{line}")) for line in range(1, n_rows + 1)]
    journal.accept_job(job_id, "a name", key, "sha", rows)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def test_epochs_grow_over_restarts(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        journal = Journal(tmp_path)
        epochs.append(journal.take_epoch(0.0))
        journal.close()
    assert epochs == [1, 2, 3]


def test_a_second_journal_names_the_holder(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(AlreadyServing, match=str(os.getpid())):
        Journal(tmp_path)
    assert journal.jobs(10) == []


def test_another_schema_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    db = sqlite3.connect(tmp_path / "journal.sqlite3")
    db.execute("PRAGMA user_version=99")
    db.close()
    for _ in range(2):  # a refusal must not keep the lock
        with pytest.raises(FailedPrecondition, match="schema 99"):
            Journal(tmp_path)


def test_a_row_ends_once(journal: Journal) -> None:
    accept(journal)
    journal.start_row("job-1.2")
    assert journal.end_row(RowEnd("job-1.2", RowState.DONE, "first"))
    assert not journal.end_row(RowEnd("job-1.2", RowState.FAILED, "second"))
    journal.start_row("job-1.2")
    assert journal.results("job-1", 0, 10) == [(0, "c2", "first")]
    counts = journal.job("job-1").counts
    assert (counts[RowState.DONE], counts[RowState.QUEUED]) == (1, 2)


def test_results_keep_the_order_rows_ended(journal: Journal) -> None:
    accept(journal, n_rows=5)
    for line in (4, 1, 5):
        journal.end_row(RowEnd(f"job-1.{line}", RowState.DONE, f"r{line}"))
    assert [line for _, _, line in journal.results("job-1", 0, 10)] == ["r4", "r1", "r5"]
    assert journal.results("job-1", 1, 1) == [(1, "c1", "r1")]
    assert journal.results("job-1", 3, 10) == []


def test_many_threads_end_the_same_rows(journal: Journal) -> None:
    accept(journal, n_rows=20)
    won: list[int] = []

    def end_all(number: int) -> None:
        for line in range(1, 21):
            end = RowEnd(f"job-1.{line}", RowState.DONE, f"by {number}")
            if journal.end_row(end):
                won.append(line)

    threads = [threading.Thread(target=end_all, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(1, 21))
    assert [position for position, _, _ in journal.results("job-1", 0, 99)] == list(range(20))


def test_tokens_survive_and_are_never_doubled(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    accept(journal)
    journal.start_row("job-1.1")
    for index in range(5):
        journal.tokens.append("job-1.1", index, 100 + index)
    with pytest.raises(FailedPrecondition, match="in order"):
        journal.tokens.append("job-1.1", 9, 1)
    journal.close()
    journal = Journal(tmp_path)
    assert journal.recover() == ["job-1"]
    assert journal.tokens.read("job-1.1") == [100, 101, 102, 103, 104]
    journal.tokens.append("job-1.1", 3, 77)  # an attempt that starts too early is without effect
    assert journal.tokens.read("job-1.1") == [100, 101, 102, 103, 104]
    journal.tokens.append("job-1.1", 5, 105)
    assert journal.tokens.read("job-1.1")[5:] == [105]
    journal.end_row(RowEnd("job-1.1", RowState.DONE, "r"))
    journal.tokens.append("job-1.1", 6, 106)  # too late
    assert journal.tokens.read("job-1.1") == []
    journal.close()


def test_tokens_are_written_within_half_a_second(journal: Journal, tmp_path: Path) -> None:
    accept(journal)
    journal.tokens.append("job-1.1", 0, 7)
    time.sleep(0.5)
    other = sqlite3.connect(f"file:{tmp_path / 'journal.sqlite3'}?mode=ro", uri=True)
    assert other.execute("SELECT n_tokens FROM rows WHERE row_id = 'job-1.1'").fetchone() == (1,)
    other.close()


def test_rows_that_ran_are_queued_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    accept(journal)
    journal.set_job_state("job-1", JobState.RUNNING)
    journal.start_row("job-1.1")
    journal.end_row(RowEnd("job-1.2", RowState.DONE, "r"))
    journal.close()
    journal = Journal(tmp_path)
    assert journal.recover() == ["job-1"]
    assert [row.line for row in journal.open_rows("job-1")] == [1, 3]
    assert journal.job("job-1").counts[RowState.RUNNING] == 0
    journal.close()


def test_a_job_cut_off_while_it_came_in_is_gone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def rows() -> Iterator[NewRow]:
        for line in range(1, 1200):
            yield NewRow(line, f"c{line}", spec())
        raise QueueFull("no room")

    with pytest.raises(QueueFull):
        journal.accept_job("job-1", "", "key", "sha", rows())
    assert journal.read("SELECT COUNT(*) FROM rows")[0][0] == 0
    assert journal.find_job("key", "sha") is None

    # and by a crash: the job was written in part, its last transaction never came
    with journal.transaction() as db:
        db.execute(
            "INSERT INTO jobs (job_id, name, state, content_sha256, created_s)"
            " VALUES ('job-2', '', 'submitting', '', 0)"
        )
    with pytest.raises(NotFound):
        journal.job("job-2")
    journal.close()
    journal = Journal(tmp_path)
    assert journal.read("SELECT COUNT(*) FROM jobs")[0][0] == 0
    journal.close()


def test_idempotency_keys(journal: Journal) -> None:
    accept(journal, "job-1", key="k")
    assert journal.find_job("k", "sha") == "job-1"
    assert journal.find_job("", "sha") is None
    with pytest.raises(AlreadyExists, match="job-1"):
        journal.find_job("k", "other bytes")
    with pytest.raises(AlreadyExists):
        accept(journal, "job-2", key="k")
    with pytest.raises(NotFound):
        journal.job("job-2")


def test_a_job_ends_only_when_its_rows_have(journal: Journal) -> None:
    accept(journal, n_rows=1)
    journal.set_job_state("job-1", JobState.COMPLETED)
    assert journal.job("job-1").state == JobState.QUEUED
    journal.end_row(RowEnd("job-1.1", RowState.DONE, "r"))
    journal.set_job_state("job-1", JobState.COMPLETED)
    journal.set_job_state("job-1", JobState.RUNNING)
    assert journal.job("job-1").state == JobState.COMPLETED
    assert journal.recover() == []


@pytest.mark.slow
def test_kill_9_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    promised: list[list[str]] = []
    for delay_s in (0.15, 0.4, 0.05):
        with subprocess.Popen(
            [sys.executable, str(CHILD), str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            # at least one promise, then death in the middle of whatever comes next
            promised.append(child.stdout.readline().split())
            time.sleep(delay_s)
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read()
        promised += [line.split() for line in rest.splitlines(keepends=True) if line[-1] == "\n"]
    journal = Journal(tmp_path)
    journal.recover()
    kinds = {kind for kind, *_ in promised}
    assert kinds == {"accepted", "tokens", "ended"}
    ended = {words[1] for words in promised if words[0] == "ended"}
    for kind, name, *count in promised:
        if kind == "accepted":
            assert sum(journal.job(name).counts.values()) == 10
        elif kind == "tokens" and name not in ended:
            line = name.rpartition(".")[2]
            tokens = journal.tokens.read(name)
            state = journal.read("SELECT state FROM rows WHERE row_id = ?", (name,))[0]["state"]
            if state == "queued":
                assert len(tokens) >= int(count[0])
                assert tokens == [1000 * int(line) + index for index in range(len(tokens))]
    for record in journal.jobs(1000):
        lines = journal.results(record.job_id, 0, 100)
        assert [position for position, _, _ in lines] == list(range(len(lines)))
        assert len({text for _, _, text in lines}) == len(lines) == record.counts[RowState.DONE]
        told = {f"result of {name}" for name in ended if name.startswith(f"{record.job_id}.")}
        assert told <= {text for _, _, text in lines}
    journal.close()
