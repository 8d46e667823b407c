"""The client against a real gateway whose worker is a stand-in."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longreach.cluster.client import CHUNK_BYTES, Client, has_ended
from longreach.cluster.gateway import Gateway
from longreach.cluster.proto import jobs_pb2
from longreach.core.errors import (
    AlreadyEnded,
    AlreadyExists,
    Draining,
    EmptyContext,
    InvalidInput,
    NotFound,
    SamplingError,
    Unavailable,
    UnreadableUri,
    UnsupportedModel,
)

from .fakes import GEOMETRY, FakePrompts, FakeRuntime, expected_text, make_config

DOCUMENT = "the keeper of the lighthouse was called Ebba"


def line(custom_id: str, **fields: Any) -> bytes:
    row = {"custom_id": custom_id, "context": DOCUMENT, "question": "who", "max_tokens": 3}
    return json.dumps(row | fields).encode() + b"\n"


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def gateway(tmp_path: Path, runtime: FakeRuntime) -> Iterator[Gateway]:
    made = Gateway(make_config(tmp_path), runtime, prompts=FakePrompts(), geometry=GEOMETRY)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.address) as made:
        yield made


def test_generate_streams_progress_then_tokens_then_the_answer(client: Client) -> None:
    events = list(client.generate("who", context=DOCUMENT, sampling={"max_tokens": 4}))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "progress"
    assert kinds[-1] == "answer"
    assert kinds.count("token") == 4
    text = "".join(event.token.text for event in events)
    assert text == events[-1].answer.text == expected_text(DOCUMENT, "who", 4)
    assert client.ask("who", context=DOCUMENT, sampling={"max_tokens": 4}).text == text


def test_closing_generate_cancels_the_row(client: Client, runtime: FakeRuntime) -> None:
    service = runtime.services["worker-0"]
    service.token_s = 0.05
    events = client.generate("who", context=DOCUMENT, sampling={"max_tokens": 500})
    assert next(event for event in events if event.HasField("token"))
    events.close()
    deadline = time.monotonic() + 10
    while service.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not service.running
    assert service.n_emitted < 100


def test_batch_from_submit_to_results(client: Client, tmp_path: Path) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_bytes(line("a") + b"{nonsense\n" + line("b", question="why"))
    job = client.submit(batch)
    assert job.name == "batch.jsonl"
    updates = list(client.watch(job.job_id, interval_s=0.1))
    assert updates[-1].job.state == jobs_pb2.JOB_STATE_COMPLETED
    assert has_ended(client.get(job.job_id))
    rows = {r.custom_id: json.loads(r.line) for r in client.results(job.job_id, follow=True)}
    texts = {
        name: rows[name]["response"]["body"]["choices"][0]["message"]["content"]
        for name in ("a", "b")
    }
    assert texts == {
        "a": expected_text(DOCUMENT, "who", 3),
        "b": expected_text(DOCUMENT, "why", 3),
    }
    assert sum(row["error"] is not None for row in rows.values()) == 1
    assert [j.job_id for j in client.jobs()] == [job.job_id]
    assert client.jobs(active_only=True) == []
    assert len(list(client.results(job.job_id, offset=2))) == 1


def test_batch_as_bytes_larger_than_a_message_and_by_uri(client: Client, tmp_path: Path) -> None:
    batch = b"".join(line(f"r{i}", context="word " * 200_000) for i in range(3))
    assert len(batch) > 2 * CHUNK_BYTES
    job = client.submit(batch, name="large", idempotency_key="k")
    assert (job.rows.total, job.name) == (3, "large")
    assert client.submit(batch, idempotency_key="k").job_id == job.job_id
    with pytest.raises(AlreadyExists):
        client.submit(line("other"), idempotency_key="k")
    path = tmp_path / "by-uri.jsonl"
    path.write_bytes(line("a"))
    assert client.submit(uri=path.as_uri()).rows.total == 1


def test_uploaded_context_is_named_by_its_content(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    context = client.upload_context(path)
    assert client.upload_context(DOCUMENT.encode()).context_id == context.context_id
    assert client.import_context(path.as_uri()).context_id == context.context_id
    answer = client.ask("who", context_id=context.context_id, sampling={"max_tokens": 2})
    assert answer.text == expected_text(DOCUMENT, "who", 2)
    client.delete_context(context.context_id)
    with pytest.raises(NotFound):
        client.ask("who", context_id=context.context_id)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (SamplingError, {"context": DOCUMENT, "sampling": {"temperature": -1.0}}),
        (SamplingError, {"context": DOCUMENT, "sampling": {"max_tokens": 10**6}}),
        (EmptyContext, {"context": "  "}),
        (UnsupportedModel, {"context": DOCUMENT, "model": "gpt-17"}),
        (UnreadableUri, {"context_uri": "file:///no/such/file"}),
        (InvalidInput, {"context": DOCUMENT, "sampling": {"temprature": 1.0}}),
        (InvalidInput, {"context": DOCUMENT, "context_id": "ctx-0"}),
    ],
)
def test_errors_arrive_as_what_they_are(
    client: Client, error: type[Exception], arguments: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        client.ask("who", **arguments)
    assert type(caught.value) is error
    assert str(caught.value)


def test_details_of_errors_arrive(client: Client) -> None:
    with pytest.raises(SamplingError) as caught:
        client.ask("who", context=DOCUMENT, sampling={"top_p": 7.0})
    assert caught.value.details["field"] == "top_p"


def test_cancel(client: Client, runtime: FakeRuntime) -> None:
    runtime.services["worker-0"].token_s = 0.05
    job = client.submit(line("a", max_tokens=1000))
    client.cancel(job.job_id)
    states = [update.job.state for update in client.watch(job.job_id, interval_s=0.1)]
    assert states[-1] == jobs_pb2.JOB_STATE_CANCELLED
    with pytest.raises(AlreadyEnded):
        client.cancel(job.job_id)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.get("job-x"),
        lambda client: client.cancel("job-x"),
        lambda client: next(client.watch("job-x")),
        lambda client: next(client.results("job-x")),
    ],
)
def test_unknown_job(client: Client, ask: Callable[[Client], Any]) -> None:
    with pytest.raises(NotFound, match="job-x"):
        ask(client)


def test_local_mistakes_are_told_without_a_call(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UnreadableUri, match="absent"):
        client.submit(tmp_path / "absent.jsonl")
    with pytest.raises(UnreadableUri, match="absent"):
        client.upload_context(tmp_path / "absent.txt")
    with pytest.raises(InvalidInput):
        client.submit(b"", uri="")


def test_stats_and_drain(client: Client) -> None:
    stats = client.stats()
    assert stats.parts[0].part == "worker-0"
    assert client.drain(5.0) == 0
    with pytest.raises(Draining):
        client.submit(line("a"))


def test_nobody_there(tmp_path: Path) -> None:
    with Client("127.0.0.1:1", timeout_s=5.0) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1.*longreach serve"):
            client.stats()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            next(client.watch("job-x"))
        assert time.monotonic() - started < 10  # what never began is not waited for


def test_watch_and_results_outlive_the_gateway(tmp_path: Path) -> None:
    first = FakeRuntime()
    first.configure = lambda service: setattr(service, "token_s", 0.1)
    config = make_config(tmp_path)
    gateway = Gateway(config, first, prompts=FakePrompts(), geometry=GEOMETRY)
    port = gateway.start().rpartition(":")[2]
    seen: list[jobs_pb2.JobUpdate] = []
    lines: list[str] = []
    with Client(gateway.address) as client:
        job_id = client.submit(line("a") + line("b", max_tokens=60)).job_id
        reader = threading.Thread(
            target=lambda: lines.extend(r.custom_id for r in client.results(job_id, follow=True))
        )
        watcher = threading.Thread(target=lambda: seen.extend(client.watch(job_id)))
        reader.start()
        watcher.start()
        deadline = time.monotonic() + 20
        while not lines:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gateway.stop()
        config = make_config(tmp_path, f"gateway.port={port}")
        second = Gateway(config, FakeRuntime(), prompts=FakePrompts(), geometry=GEOMETRY)
        second.start()
        reader.join(30)
        watcher.join(30)
        second.stop()
    assert lines == ["a", "b"]  # none lost, none twice
    assert seen[-1].job.state == jobs_pb2.JOB_STATE_COMPLETED
