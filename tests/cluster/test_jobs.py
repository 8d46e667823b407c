"""The job book decides alone: actions follow from events, in any order they may come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.cluster.job_events import (
    Action,
    Drained,
    EndRow,
    JobAccepted,
    JobCancelled,
    JobRow,
    RequeueRow,
    RowEnded,
    RowLost,
    SetJobState,
    SlotsChanged,
    StartRow,
    StopRow,
    Tick,
)
from longreach.cluster.jobs import PARKED_S, SUSPECT_PATIENCE_S, JobBook, pause_s
from longreach.cluster.progress import JobProgress, RateMeter
from longreach.cluster.row import JobState, RowState
from longreach.core.errors import AlreadyEnded, NotFound


def accepted(job_id: str, n_rows: int, **given: object) -> JobAccepted:
    rows = tuple(JobRow(f"{job_id}.{i}") for i in range(n_rows))
    return JobAccepted(job_id, rows, **given)  # type: ignore[arg-type]


def started(actions: list[Action]) -> list[str]:
    return [action.row_id for action in actions if isinstance(action, StartRow)]


def book_with(n_slots: int, max_attempts: int = 5) -> JobBook:
    book = JobBook(max_attempts)
    book.handle(SlotsChanged(n_slots), 0.0)
    return book


def test_rows_start_in_file_order_within_the_slots() -> None:
    book = book_with(2)
    assert book.handle(accepted("j", 3), 0.0) == [
        SetJobState("j", JobState.RUNNING),
        StartRow("j.0", 1),
        StartRow("j.1", 1),
    ]
    assert book.handle(RowEnded("j.0", RowState.DONE), 1.0) == [StartRow("j.2", 1)]
    book.handle(RowEnded("j.1", RowState.FAILED), 1.0)
    assert book.handle(RowEnded("j.2", RowState.DONE), 1.0) == [
        SetJobState("j", JobState.COMPLETED)
    ]
    assert book.n_open == 0


def test_a_job_without_any_answer_has_failed() -> None:
    book = book_with(1)
    book.handle(accepted("j", 1), 0.0)
    assert book.handle(RowEnded("j.0", RowState.FAILED), 0.0) == [SetJobState("j", JobState.FAILED)]
    assert book.handle(accepted("empty", 0), 0.0) == [SetJobState("empty", JobState.FAILED)]
    assert book.handle(accepted("was done", 0, n_done=3), 0.0) == [
        SetJobState("was done", JobState.COMPLETED)
    ]


def test_a_small_job_does_not_wait_for_a_large_one() -> None:
    book = book_with(4)
    book.handle(accepted("large", 100), 0.0)
    book.handle(accepted("small", 1), 0.0)
    actions = book.handle(RowEnded("large.0", RowState.DONE), 0.0)
    assert started(actions) == ["small.0"]


def test_a_lost_row_comes_back_after_a_pause() -> None:
    book = book_with(1)
    book.handle(accepted("j", 2), 0.0)
    # the slot is free meanwhile
    assert book.handle(RowLost("j.0"), 10.0) == [RequeueRow("j.0"), StartRow("j.1", 1)]
    assert book.handle(RowEnded("j.1", RowState.DONE), 10.1) == []
    assert book.handle(Tick(), 10.0 + pause_s(1)) == [StartRow("j.0", 2)]


def test_a_row_that_gets_nowhere_fails_after_max_attempts() -> None:
    book = book_with(1, max_attempts=3)
    book.handle(accepted("j", 1), 0.0)
    now_s = 0.0
    for attempt in (1, 2):
        assert book.handle(RowLost("j.0"), now_s)[0] == RequeueRow("j.0")
        now_s += 100.0
        assert book.handle(Tick(), now_s) == [StartRow("j.0", attempt + 1)]
    assert book.handle(RowLost("j.0"), now_s) == [
        EndRow("j.0", RowState.FAILED, 3),
        SetJobState("j", JobState.FAILED),
    ]


def test_progress_forgives_losses() -> None:
    book = book_with(1, max_attempts=2)
    book.handle(accepted("j", 1), 0.0)
    for round_number in range(1, 20):
        book.note_progress("j.0", round_number)
        assert book.handle(RowLost("j.0"), 100.0 * round_number)[0] == RequeueRow("j.0")
        assert started(book.handle(Tick(), 100.0 * round_number + 50))
    assert EndRow("j.0", RowState.FAILED, 2) in book.handle(RowLost("j.0"), 9000.0)


def test_a_row_that_kills_workers_does_not_take_others_with_it() -> None:
    """Row 0 kills whatever worker it runs on; the three others only need to be left alone."""
    book = book_with(4, max_attempts=3)
    now_s = 0.0
    actions = book.handle(accepted("j", 4), now_s)
    ends: dict[str, RowState] = {}
    for _ in range(100):
        running = started(actions) or sorted(book.running)
        now_s += 20.0
        actions = []
        if "j.0" in running or "j.0" in book.running:
            for row_id in sorted(book.running):
                actions += book.handle(RowLost(row_id), now_s)
        else:
            for row_id in sorted(book.running):
                ends[row_id] = RowState.DONE
                actions += book.handle(RowEnded(row_id, RowState.DONE), now_s)
        now_s += 20.0
        actions += book.handle(Tick(), now_s)
        for action in actions:
            if isinstance(action, EndRow):
                ends[action.row_id] = action.state
        if not book.n_open:
            break
    done = RowState.DONE
    assert ends == {"j.0": RowState.FAILED, "j.1": done, "j.2": done, "j.3": done}


def test_suspects_get_their_turn_although_others_keep_coming() -> None:
    book = book_with(1)
    book.handle(accepted("j", 1), 0.0)
    book.handle(RowLost("j.0"), 0.0)
    book.handle(Tick(), 1.0)
    book.handle(RowLost("j.0"), 1.0)  # a suspect now
    actions = book.handle(accepted("other", 500), 1.0)
    now_s, seen = 1.0, started(actions)
    n_others = 0
    while "j.0" not in seen:
        now_s += 1.0
        seen += started(book.handle(RowEnded(seen[-1], RowState.DONE), now_s))
        n_others += 1
    assert SUSPECT_PATIENCE_S <= n_others <= SUSPECT_PATIENCE_S + 2


def test_no_room_is_no_fault_of_the_row_while_others_run() -> None:
    book = book_with(2, max_attempts=2)
    book.handle(accepted("j", 2), 0.0)
    now_s = 0.0
    for _ in range(10):
        assert book.handle(RowLost("j.1", full=True), now_s)[0] == RequeueRow("j.1")
        now_s += PARKED_S
        assert started(book.handle(Tick(), now_s)) == ["j.1"]
    book.handle(RowEnded("j.0", RowState.DONE), now_s)
    book.handle(RowLost("j.1", full=True), now_s)
    book.handle(Tick(), now_s + 50)
    assert EndRow("j.1", RowState.FAILED, 2) in book.handle(RowLost("j.1", full=True), now_s + 50)


def test_cancel_ends_waiting_rows_now_and_running_ones_when_they_stop() -> None:
    book = book_with(1)
    book.handle(accepted("j", 3), 0.0)
    assert book.handle(JobCancelled("j"), 0.0) == [
        SetJobState("j", JobState.CANCELLING),
        EndRow("j.1", RowState.CANCELLED),
        EndRow("j.2", RowState.CANCELLED),
        StopRow("j.0"),
    ]
    with pytest.raises(AlreadyEnded):
        book.handle(JobCancelled("j"), 0.0)
    assert book.handle(RowEnded("j.0", RowState.CANCELLED), 0.0) == [
        SetJobState("j", JobState.CANCELLED)
    ]
    with pytest.raises(NotFound):
        book.handle(JobCancelled("j"), 0.0)


def test_a_cancelled_row_that_loses_its_worker_is_not_tried_again() -> None:
    book = book_with(1)
    book.handle(accepted("j", 1), 0.0)
    book.handle(JobCancelled("j"), 0.0)
    assert book.handle(RowLost("j.0"), 0.0) == [
        EndRow("j.0", RowState.CANCELLED, 1),
        SetJobState("j", JobState.CANCELLED),
    ]


def test_a_cancelling_job_taken_up_after_a_restart_ends() -> None:
    book = book_with(2)
    assert book.handle(accepted("j", 1, cancelling=True, started=True), 0.0) == [
        EndRow("j.0", RowState.CANCELLED),
        SetJobState("j", JobState.CANCELLED),
    ]


def test_draining_starts_nothing() -> None:
    book = book_with(1)
    book.handle(accepted("j", 2), 0.0)
    book.handle(Drained(), 0.0)
    assert book.handle(RowEnded("j.0", RowState.DONE), 0.0) == []
    assert book.n_open == 1


def test_no_worker_no_start() -> None:
    book = JobBook(5)
    assert book.handle(accepted("j", 1), 0.0) == []
    assert started(book.handle(SlotsChanged(1), 0.0)) == ["j.0"]


OPERATIONS = st.tuples(
    st.sampled_from(
        ["accept", "cancel", "end", "fail", "lose", "full", "slots", "progress", "tick"]
    ),
    st.integers(0, 30),
)


@settings(max_examples=300)
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_any_history_ends_every_row_once(operations: list[tuple[str, int]]) -> None:
    book = JobBook(max_attempts=3)
    open_rows: set[str] = set()
    running: set[str] = set()
    stopping: set[str] = set()
    ends: dict[str, RowState] = {}
    job_ends: dict[str, JobState] = {}
    rows_of: dict[str, int] = {}
    n_slots, now_s = 0, 0.0

    def carry_out(actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartRow(row_id):
                    assert row_id in open_rows
                    assert row_id not in running
                    assert row_id.split(".")[0] not in cancelled
                    running.add(row_id)
                    assert len(running) <= max(n_slots, n_running_before)
                case StopRow(row_id):
                    assert row_id in running
                    stopping.add(row_id)
                case EndRow(row_id, state):
                    assert row_id not in running
                    finish(row_id, state)
                case SetJobState(job_id, state) if state.ended:
                    assert job_id not in job_ends
                    assert not any(row.startswith(f"{job_id}.") for row in open_rows)
                    job_ends[job_id] = state

    def finish(row_id: str, state: RowState) -> None:
        assert row_id not in ends
        ends[row_id] = state
        open_rows.discard(row_id)

    def end(row_id: str, state: RowState) -> None:
        running.discard(row_id)
        finish(row_id, state)
        carry_out(book.handle(RowEnded(row_id, state), now_s))

    cancelled: set[str] = set()
    for name, number in operations:
        now_s += number
        n_running_before = len(running)
        pick = sorted(running)[number % len(running)] if running else None
        if name == "accept":
            job_id = f"job{len(rows_of)}"
            rows_of[job_id] = number % 6
            open_rows |= {f"{job_id}.{i}" for i in range(number % 6)}
            carry_out(book.handle(accepted(job_id, number % 6), now_s))
        elif name == "cancel" and rows_of:
            job_id = f"job{number % len(rows_of)}"
            if job_id in job_ends or job_id in cancelled:
                with pytest.raises((AlreadyEnded, NotFound)):
                    book.handle(JobCancelled(job_id), now_s)
            else:
                cancelled.add(job_id)
                carry_out(book.handle(JobCancelled(job_id), now_s))
        elif name in ("end", "fail") and pick:
            state = RowState.CANCELLED if pick in stopping else RowState.DONE
            end(pick, state if name == "end" else RowState.FAILED)
        elif name in ("lose", "full") and pick:
            running.discard(pick)
            carry_out(book.handle(RowLost(pick, full=name == "full"), now_s))
        elif name == "slots":
            n_slots = number % 5
            carry_out(book.handle(SlotsChanged(n_slots), now_s))
        elif name == "progress" and pick:
            book.note_progress(pick, number)
        else:
            carry_out(book.handle(Tick(), now_s))
        assert book.running == running
        assert book.n_open == len(open_rows)
    # and whatever happened, work comes to its end once workers stay
    n_slots = 4
    n_running_before = len(running)
    carry_out(book.handle(SlotsChanged(4), now_s))
    for _ in range(1000):
        if not open_rows:
            break
        now_s += 30.0
        for row_id in sorted(running):
            end(row_id, RowState.DONE)
        n_running_before = len(running)
        carry_out(book.handle(Tick(), now_s))
    assert not open_rows
    assert set(job_ends) == set(rows_of)
    for job_id, state in job_ends.items():
        if job_id in cancelled:
            assert state == JobState.CANCELLED


def test_rates_look_at_the_last_seconds() -> None:
    meter = RateMeter(10.0)
    for second in range(30):
        meter.add(float(second), 100.0 * min(second, 15))
    assert meter.rate(29.0) == pytest.approx(0.0)
    for second in range(30, 50):
        meter.add(float(second), 1500.0 + 7.0 * (second - 29))
    assert meter.rate(49.0) == pytest.approx(7.0, rel=0.15)


def test_eta_comes_near_and_ends_at_zero() -> None:
    rows = [JobRow(f"j.{i}", f"c{i}", 10, 4000, "same" if i else "") for i in range(3)]
    progress = JobProgress(rows)
    assert progress.snapshot(0.0).eta_s < 0
    now_s = 0.0
    for row in rows:
        shown = progress.start(row.row_id, 1)
        shown.total = 1000
        for step in range(1, 11):
            now_s += 1.0
            shown.prefilled = 100 * step
            snapshot = progress.snapshot(now_s)
            assert snapshot.eta_s > 0
        for _ in range(10):
            now_s += 1.0
            shown.decoded += 1
            snapshot = progress.snapshot(now_s)
        progress.end(row.row_id)
    snapshot = progress.snapshot(now_s)
    assert snapshot.eta_s == 0
    assert (snapshot.prefilled_tokens, snapshot.decoded_tokens) == (3000, 30)
    assert snapshot.active == ()


@pytest.mark.parametrize("computing", [0, 1, 2])
def test_eta_is_right_whichever_row_reads_the_shared_context(computing: int) -> None:
    rows = [JobRow(f"j.{i}", f"c{i}", 2, 40_000, "same") for i in range(3)]
    progress = JobProgress(rows)
    shown = [progress.start(row.row_id, 1) for row in rows]
    progress.snapshot(0.0)
    for second in range(1, 101):
        shown[computing].total = 10_000
        shown[computing].prefilled = 100 * second
        snapshot = progress.snapshot(float(second))
        if second in (20, 50, 80):
            # 100 tokens a second; the questions and answers are little beside the context
            assert snapshot.eta_s == pytest.approx(100 - second, abs=5)
    for row in shown:
        row.total = row.prefilled = 10_000
        row.reused = 9_900
        assert progress.snapshot(101.0).eta_s < 10
