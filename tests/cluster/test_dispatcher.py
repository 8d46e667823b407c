"""Rows run, move to other workers, stop and survive; each token once, each row ended once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longreach.cluster.contexts import ContextStore
from longreach.cluster.dispatcher import Dispatcher
from longreach.cluster.journal import Journal
from longreach.cluster.metrics import Metrics
from longreach.cluster.preparer import Preparer
from longreach.cluster.row import JobState, RowState, max_context_bytes
from longreach.cluster.submission import Intake
from longreach.cluster.worker_pool import WorkerPool
from longreach.core.config import Config
from longreach.core.errors import (
    AlreadyEnded,
    BankTooSmall,
    Draining,
    NotFound,
    QueueFull,
    StoreFull,
)

from .fakes import GEOMETRY, FakePrompts, FakeRuntime, expected_text, make_config

WAIT_S = 20.0


class Rig:
    """A dispatcher with everything around it but gRPC."""

    def __init__(self, config: Config, runtime: FakeRuntime) -> None:
        self.config, self.runtime = config, runtime
        self.journal = Journal(config.gateway.state_dir)
        epoch = self.journal.take_epoch(time.time())
        if runtime.started:
            runtime.epoch = epoch
            for service in runtime.services.values():
                service.epoch = epoch
        else:
            runtime.start(epoch)
        self.contexts = ContextStore(self.journal, max_context_bytes(config))
        self.prompts = FakePrompts()
        preparer = Preparer(config, self.journal, self.contexts, self.prompts, GEOMETRY)
        self.pool = WorkerPool(config, runtime, epoch)
        self.dispatcher = Dispatcher(
            config, self.journal, self.contexts, preparer, self.pool, Metrics()
        )
        self.intake = Intake(config, self.journal, self.contexts)
        self.dispatcher.start()

    def submit(self, *lines: Any) -> str:
        data = b"\n".join(json.dumps(line).encode() for line in lines)
        job_id = self.intake.submit(
            [data], name="", idempotency_key="", n_open_rows=self.dispatcher.n_open_rows
        ).job_id
        self.dispatcher.accepted(job_id)
        return job_id

    def finish(self, job_id: str) -> dict[str, Any]:
        """Result lines by custom_id."""
        wait_for(lambda: self.journal.job_state(job_id).ended)
        lines = [json.loads(line) for _, _, line in self.journal.results(job_id, 0, 10_000)]
        found = {line["custom_id"]: line for line in lines}
        assert len(found) == len(lines)
        return found

    def close(self) -> None:
        self.dispatcher.stop()
        self.pool.close()
        self.journal.close()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def line(name: str, context: str = "a b c", **more: Any) -> dict[str, Any]:
    return {"custom_id": name, "context": context, "question": f"what is {name}", **more}


def content(result: dict[str, Any]) -> str:
    assert result["error"] is None, result["error"]
    return str(result["response"]["body"]["choices"][0]["message"]["content"])


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []
    runtimes: list[FakeRuntime] = []

    def make(*sets: str, runtime: FakeRuntime | None = None) -> Rig:
        runtimes.append(runtime or FakeRuntime())
        rigs.append(Rig(make_config(tmp_path, *sets), runtimes[-1]))
        return rigs[-1]

    yield make
    for rig in rigs:
        if not rig.journal.closed:
            rig.close()
    for runtime in runtimes:
        runtime.stop()


def test_a_batch_is_answered(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    job_id = rig.submit(*(line(f"r{i}", max_tokens=5) for i in range(30)))
    results = rig.finish(job_id)
    assert len(results) == 30
    for name, result in results.items():
        assert content(result) == expected_text("a b c", f"what is {name}", 5)
        body = result["response"]["body"]
        assert body["usage"] == {
            "prompt_tokens": 6,
            "completion_tokens": 5,
            "total_tokens": 11,
        }
        assert body["longreach"]["stats"]["tokens_prompt"] == 6
    record = rig.journal.job(job_id)
    assert record.state == JobState.COMPLETED
    assert (record.prompt_tokens, record.decoded_tokens) == (30 * 6, 30 * 5)


def test_two_batches_per_worker_are_in_flight(make_rig: Callable[..., Rig]) -> None:
    """Enough that rows of one context are at the worker together, few enough to route well."""
    rig = make_rig("worker.max_rows=3", runtime=FakeRuntime(n_workers=2))
    services = rig.runtime.services.values()
    for service in services:
        service.hold.clear()
    job_id = rig.submit(*(line(f"r{i}", f"document {i}", max_tokens=1) for i in range(20)))
    wait_for(lambda: sum(len(service.running) for service in services) == 12)
    time.sleep(0.5)
    assert [len(service.running) for service in services] == [6, 6]
    for service in services:
        service.hold.set()
    assert len(rig.finish(job_id)) == 20


def test_bad_rows_fail_alone(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make_rig("model.max_context_tokens=50")
    (tmp_path / "there.txt").write_text("from a file")
    (tmp_path / "bad.bin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "blank.txt").write_text(" \n ")
    question = {"question": "what", "max_tokens": 3}
    uri = tmp_path.as_uri()
    results = rig.finish(
        rig.submit(
            line("good", max_tokens=3),
            line("too long", "word " * 51),
            {"custom_id": "file", "context_uri": f"{uri}/there.txt", **question},
            {"custom_id": "no file", "context_uri": f"{uri}/missing.txt", **question},
            {"custom_id": "folder", "context_uri": uri, **question},
            {"custom_id": "bytes", "context_uri": f"{uri}/bad.bin", **question},
            {"custom_id": "blank", "context_uri": f"{uri}/blank.txt", **question},
            {"custom_id": "protocol", "context_uri": "ftp://host/x", **question},
            {"custom_id": "unknown id", "context_id": "ctx-0", **question},
            line("model", model="other"),
        )
    )
    codes = {name: result["error"] and result["error"]["code"] for name, result in results.items()}
    assert codes == {
        "good": None,
        "file": None,
        "too long": "CONTEXT_TOO_LONG",
        "no file": "UNREADABLE_URI",
        "folder": "UNREADABLE_URI",
        "bytes": "INVALID_INPUT",
        "blank": "EMPTY_CONTEXT",
        "protocol": "UNREADABLE_URI",
        "unknown id": "NOT_FOUND",
        "model": "UNSUPPORTED_MODEL",
    }
    assert content(results["file"]) == expected_text("from a file", "what", 3)
    assert results["no file"]["response"]["status_code"] == 400


def test_worker_lost_in_the_middle(make_rig: Callable[..., Rig]) -> None:
    runtime = FakeRuntime()
    first: list[Any] = []

    def configure(service: Any) -> None:
        service.token_s = 0.005
        if not first:
            first.append(service)
            service.die_after_tokens = 40

    runtime.configure = configure
    rig = make_rig(runtime=runtime)
    results = rig.finish(rig.submit(*(line(f"r{i}", max_tokens=12) for i in range(6))))
    for name, result in results.items():
        assert content(result) == expected_text("a b c", f"what is {name}", 12)
    assert runtime.n_failed == 1
    # the second incarnation went on where the first had stopped
    assert sum(runtime.services["worker-0"].resumed_from.values()) > 0
    assert sum(service.n_emitted for service in runtime.incarnations) <= 6 * 12 + 6


def test_a_poisoned_row_fails_alone(make_rig: Callable[..., Rig]) -> None:
    runtime = FakeRuntime()
    poison = FakePrompts().build("poison", "").token_ids.tobytes()

    def configure(service: Any) -> None:
        service.poison = poison
        service.token_s = 0.05

    runtime.configure = configure
    rig = make_rig("gateway.max_attempts=3", runtime=runtime)
    rows = [line(f"r{i}", max_tokens=8) for i in range(5)]
    rows.insert(2, line("bad", "poison", max_tokens=8))
    results = rig.finish(rig.submit(*rows))
    assert results["bad"]["error"]["code"] == "WORKER_LOST"
    assert "3 attempts" in results["bad"]["error"]["message"]
    for i in range(5):
        assert content(results[f"r{i}"]) == expected_text("a b c", f"what is r{i}", 8)


def test_no_worker_lives_for_a_while(make_rig: Callable[..., Rig]) -> None:
    runtime = FakeRuntime(respawn=False)
    rig = make_rig(runtime=runtime)
    runtime.worker_failed("worker-0")
    job_id = rig.submit(line("r", max_tokens=2))
    time.sleep(0.5)
    assert not rig.journal.job_state(job_id).ended
    runtime._spawn("worker-0")
    assert content(rig.finish(job_id)["r"]) == expected_text("a b c", "what is r", 2)


def test_errors_of_a_live_worker(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("worker.max_rows=1")
    service = rig.runtime.services["worker-0"]
    service.errors = [StoreFull("no slot"), BankTooSmall("bank of 1 page, a pass needs 8")]
    results = rig.finish(rig.submit(line("a", max_tokens=2), line("b", max_tokens=2)))
    codes = sorted(str(r["error"] and r["error"]["code"]) for r in results.values())
    assert codes == ["BANK_TOO_SMALL", "None"]
    assert rig.runtime.n_failed == 0


def test_cancel_stops_running_rows_and_keeps_answers(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("worker.max_rows=1")
    service = rig.runtime.services["worker-0"]
    job_id = rig.submit(line("first", max_tokens=2))
    rig.finish(job_id)
    with pytest.raises(AlreadyEnded):
        rig.dispatcher.cancel(job_id)
    with pytest.raises(NotFound):
        rig.dispatcher.cancel("job-none")
    service.hold.clear()
    job_id = rig.submit(*(line(f"r{i}", max_tokens=2) for i in range(5)))
    wait_for(lambda: len(service.running) == 2)
    began_s = time.monotonic()
    rig.dispatcher.cancel(job_id)
    results = rig.finish(job_id)
    assert time.monotonic() - began_s < 2.0
    assert len(results) == 5
    assert {result["error"]["code"] for result in results.values()} == {"CANCELLED"}
    assert rig.journal.job(job_id).state == JobState.CANCELLED
    wait_for(lambda: not service.running)
    assert rig.runtime.n_failed == 0


def test_restart_continues_with_the_tokens_made(make_rig: Callable[..., Rig]) -> None:
    runtime = FakeRuntime()
    runtime.configure = lambda service: setattr(service, "token_s", 0.02)
    rig = make_rig(runtime=runtime)
    service = runtime.services["worker-0"]
    job_id = rig.submit(
        line("short", max_tokens=2), *(line(f"r{i}", max_tokens=40) for i in range(3))
    )
    wait_for(lambda: service.n_emitted > 30)
    rig.close()
    assert not service.running or wait_for(lambda: not service.running) is None
    emitted = service.n_emitted
    rig = make_rig(runtime=runtime)
    results = rig.finish(job_id)
    assert sorted(results) == ["r0", "r1", "r2", "short"]
    for i in range(3):
        assert content(results[f"r{i}"]) == expected_text("a b c", f"what is r{i}", 40)
    assert sum(service.resumed_from.values()) > 20
    # a token or two per row were on their way when the first dispatcher stopped
    assert service.n_emitted <= 2 + 3 * 40 + 6
    assert service.n_emitted > emitted


def test_a_uri_is_read_once_per_job(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make_rig("worker.max_rows=1")
    service = rig.runtime.services["worker-0"]
    document = tmp_path / "document.txt"
    document.write_text("the first edition")
    service.hold.clear()
    rows = [
        {"custom_id": f"r{i}", "context_uri": str(document), "question": "q", "max_tokens": 2}
        for i in range(6)
    ]
    job_id = rig.submit(*rows)
    wait_for(lambda: service.running)
    document.write_text("the second edition, quite another text")
    service.hold.set()
    results = rig.finish(job_id)
    answers = {content(result) for result in results.values()}
    assert answers == {expected_text("the first edition", "q", 2)}


def test_contexts_inside_lines_are_kept_once_and_dropped(
    make_rig: Callable[..., Rig], tmp_path: Path
) -> None:
    rig = make_rig()
    service = rig.runtime.services["worker-0"]
    service.hold.clear()
    kept = rig.contexts.add([b"uploaded text"], "upload").context_id
    job_id = rig.submit(
        *(line(f"r{i}", "one shared text", max_tokens=1) for i in range(4)),
        {"custom_id": "u", "context_id": kept, "question": "q", "max_tokens": 1},
    )
    files = list((tmp_path / "contexts").iterdir())
    assert len(files) == 2
    service.hold.set()
    rig.finish(job_id)
    wait_for(lambda: len(list((tmp_path / "contexts").iterdir())) == 1)
    assert rig.contexts.text(kept) == "uploaded text"


def test_the_queue_is_bounded(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("gateway.max_queued_rows=5")
    rig.runtime.services["worker-0"].hold.clear()
    rig.submit(*(line(f"r{i}") for i in range(4)))
    with pytest.raises(QueueFull, match="max_queued_rows is 5"):
        rig.submit(line("x"), line("y"))
    rig.submit(line("x"))
    assert len(rig.journal.jobs(10)) == 2


def test_drain_waits_for_running_rows_and_starts_none(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("worker.max_rows=1")
    service = rig.runtime.services["worker-0"]
    service.hold.clear()
    job_id = rig.submit(*(line(f"r{i}", max_tokens=1) for i in range(5)))
    wait_for(lambda: len(service.running) == 2)
    assert rig.dispatcher.drain(0.3) == 2
    with pytest.raises(Draining):
        rig.dispatcher.check_accepting()
    service.hold.set()
    assert rig.dispatcher.drain(10.0) == 0
    counts = rig.journal.job(job_id).counts
    assert (counts[RowState.DONE], counts[RowState.QUEUED]) == (2, 3)


def test_a_silent_worker_counts_as_lost(make_rig: Callable[..., Rig]) -> None:
    """Its server is stopped without a word to the runtime: calls and streams end, the row moves."""
    runtime = FakeRuntime(n_workers=2)
    rig = make_rig(runtime=runtime)
    for service in runtime.services.values():
        service.hold.clear()
    job_id = rig.submit(*(line(f"r{i}", f"document {i}", max_tokens=3) for i in range(4)))
    wait_for(lambda: sum(len(s.running) for s in runtime.services.values()) == 4)
    assert all(s.running for s in runtime.services.values())
    runtime.kill("worker-0")
    for service in runtime.services.values():
        service.hold.set()
    wait_for(lambda: runtime.n_failed == 1)
    results = rig.finish(job_id)
    for i in range(4):
        assert content(results[f"r{i}"]) == expected_text(f"document {i}", f"what is r{i}", 3)
