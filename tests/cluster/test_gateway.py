"""The service as a client meets it: real gRPC, fake workers, statuses with details."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from longreach.cluster.gateway import SERVICE_NAMES, Gateway
from longreach.cluster.proto import (
    admin_pb2,
    admin_pb2_grpc,
    contexts_pb2,
    contexts_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from longreach.cluster.rpc_errors import error_from_rpc
from longreach.cluster.uploads import upload_parts
from longreach.core.errors import AlreadyServing, ContextTooLong, FailedPrecondition

from .fakes import GEOMETRY, FakePrompts, FakeRuntime, expected_text, make_config

WAIT_S = 20.0
QUESTION = "what is it"


class Rig:
    """A gateway on a free port and stubs for its services."""

    def __init__(self, state_dir: Path, runtime: FakeRuntime, *sets: str) -> None:
        self.runtime = runtime
        self.gateway = Gateway(
            make_config(state_dir, *sets), runtime, prompts=FakePrompts(), geometry=GEOMETRY
        )
        self.address = self.gateway.start()
        self.channel = grpc.insecure_channel(self.address)
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.jobs = jobs_pb2_grpc.JobsStub(self.channel)
        self.contexts = contexts_pb2_grpc.ContextsStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    @property
    def service(self) -> Any:
        return self.runtime.services["worker-0"]

    def generate(self, **fields: Any) -> list[inference_pb2.GenerateResponse]:
        return list(self.inference.Generate(request(**fields), timeout=WAIT_S))

    def submit(self, data: bytes, chunk: int = 1 << 16, **header: str) -> jobs_pb2.SubmitResponse:
        def parts() -> Iterator[jobs_pb2.SubmitRequest]:
            yield jobs_pb2.SubmitRequest(header=jobs_pb2.SubmitHeader(**header))
            if not header.get("uri") or data:
                pieces = (data[start : start + chunk] for start in range(0, len(data), chunk))
                yield from upload_parts(jobs_pb2.SubmitRequest, pieces)

        response: jobs_pb2.SubmitResponse = self.jobs.Submit(parts(), timeout=WAIT_S)
        return response

    def results(self, job_id: str, offset: int = 0) -> list[dict[str, Any]]:
        call = self.jobs.Results(
            jobs_pb2.ResultsRequest(job_id=job_id, follow=True, offset=offset), timeout=WAIT_S
        )
        return [json.loads(line.line) for line in call]

    def job(self, job_id: str) -> jobs_pb2.Job:
        return self.jobs.Get(jobs_pb2.GetJobRequest(job_id=job_id), timeout=WAIT_S)

    def upload(self, text: bytes, chunk: int = 10) -> contexts_pb2.Context:
        pieces = (text[start : start + chunk] for start in range(0, len(text), chunk))
        parts = upload_parts(contexts_pb2.UploadContextRequest, pieces)
        return self.contexts.Upload(parts, timeout=WAIT_S)

    def close(self) -> None:
        self.channel.close()
        self.gateway.stop()


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    sampling = fields.pop("sampling", {"max_tokens": 4})
    if not any(name.startswith("context") for name in fields) and "messages" not in fields:
        fields["context_text"] = "a b c"
    if "messages" not in fields:
        fields.setdefault("question", QUESTION)
    return inference_pb2.GenerateRequest(sampling=inference_pb2.Sampling(**sampling), **fields)


def batch(*names: str, **more: Any) -> bytes:
    rows = (
        {"custom_id": name, "context": "a b c", "question": f"what is {name}", "max_tokens": 3}
        for name in names
    )
    return b"".join(json.dumps({**row, **more}).encode() + b"\n" for row in rows)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def status_of(call: Callable[[], Any]) -> tuple[str, error_details_pb2.ErrorInfo, list[Any]]:
    """(code, ErrorInfo, other details) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    info, others = error_details_pb2.ErrorInfo(), []
    for detail in status.details:
        for kind in (error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
            other = kind()
            if detail.Unpack(other):
                others.append(other)
        detail.Unpack(info)
    assert info.domain == "longreach"
    return caught.value.code().name, info, others


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*sets: str, runtime: FakeRuntime | None = None) -> Rig:
        rigs.append(Rig(tmp_path / "state", runtime or FakeRuntime(), *sets))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


# Generate


def test_generate_streams_progress_tokens_and_the_answer(rig: Rig) -> None:
    events = rig.generate(answer_prefix="It is")
    kinds = [event.WhichOneof("event") for event in events]
    n_progress = kinds.count("progress")
    assert kinds == ["progress"] * n_progress + ["token"] * 4 + ["answer"]
    assert [event.token.index for event in events if event.HasField("token")] == [0, 1, 2, 3]
    assert events[n_progress - 1].progress.phase == inference_pb2.PHASE_PREFILL
    assert events[n_progress - 1].progress.total == 8
    answer = events[-1].answer
    assert answer.text == expected_text("a b c", QUESTION, 4, "It is")
    assert answer.text == "".join(event.token.text for event in events)
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 4)
    assert answer.stats["ttft_s"] == pytest.approx(0.01)


def test_generate_takes_an_uploaded_context_a_uri_and_messages(rig: Rig, tmp_path: Path) -> None:
    context = rig.upload("die Straße und das Gebäude".encode())
    answer = rig.generate(context_id=context.context_id)[-1].answer
    assert answer.text == expected_text("die Straße und das Gebäude", QUESTION, 4)
    (tmp_path / "x.txt").write_text("from a file")
    answer = rig.generate(context_uri=str(tmp_path / "x.txt"))[-1].answer
    assert answer.text == expected_text("from a file", QUESTION, 4)
    # what was asked once is not kept
    assert len(list((tmp_path / "state" / "contexts").iterdir())) == 1
    messages = [inference_pb2.ChatMessage(role="user", content="hello you")]
    assert rig.generate(messages=messages)[-1].answer.text == expected_text("hello you", "", 4)


BAD_REQUESTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"model": "other"}, "FAILED_PRECONDITION", "UNSUPPORTED_MODEL", ""),
    ({"context_text": " \n"}, "INVALID_ARGUMENT", "EMPTY_CONTEXT", "context_text"),
    ({"context_text": "word " * 101}, "INVALID_ARGUMENT", "CONTEXT_TOO_LONG", ""),
    ({"context_uri": "/no/such/file"}, "INVALID_ARGUMENT", "UNREADABLE_URI", ""),
    ({"context_uri": "ftp://host/file"}, "INVALID_ARGUMENT", "UNREADABLE_URI", ""),
    ({"context_id": "ctx-" + "0" * 64}, "NOT_FOUND", "NOT_FOUND", ""),
    ({"context_id": "../journal.sqlite3"}, "NOT_FOUND", "NOT_FOUND", ""),
    ({"question": " "}, "INVALID_ARGUMENT", "INVALID_INPUT", "question"),
    ({"sampling": {"temperature": -1}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "temperature"),
    ({"sampling": {"temperature": 1e9}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "temperature"),
    (
        {"sampling": {"temperature": float("nan")}},
        "INVALID_ARGUMENT",
        "SAMPLING_ERROR",
        "temperature",
    ),
    ({"sampling": {"top_p": 0}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "top_p"),
    ({"sampling": {"top_p": 2}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "top_p"),
    ({"sampling": {"max_tokens": 0}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "max_tokens"),
    ({"sampling": {"max_tokens": -5}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "max_tokens"),
    ({"sampling": {"max_tokens": 10**12}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "max_tokens"),
    ({"sampling": {"stop": [""]}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "stop"),
    ({"sampling": {"stop": ["x"] * 99}}, "INVALID_ARGUMENT", "SAMPLING_ERROR", "stop"),
]


def test_bad_requests_get_a_clear_status(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("model.max_context_tokens=100")
    for fields, code, reason, field in BAD_REQUESTS:
        got, info, others = status_of(lambda fields=fields: rig.generate(**fields))
        assert (got, info.reason) == (code, reason), fields
        violations = [o for o in others if isinstance(o, error_details_pb2.BadRequest)]
        assert bool(violations) == (code == "INVALID_ARGUMENT")
        if field:
            assert violations[0].field_violations[0].field == field, fields
        assert not any(isinstance(o, error_details_pb2.RetryInfo) for o in others)
    messages = [inference_pb2.ChatMessage(role="wizard", content="x")]
    assert status_of(lambda: rig.generate(messages=messages))[0] == "INVALID_ARGUMENT"
    empty = inference_pb2.GenerateRequest(question="q")
    code, info, _ = status_of(lambda: list(rig.inference.Generate(empty)))
    assert (code, info.reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    # the client's half makes the same error of it, and nothing was harmed
    with pytest.raises(grpc.RpcError) as caught:
        rig.generate(context_text="word " * 101)
    error = error_from_rpc(caught.value, rig.address)
    assert isinstance(error, ContextTooLong)
    assert error.details["limit"] == "100"
    assert rig.generate()[-1].answer.text


def test_a_message_too_large_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("gateway.max_message_bytes=100000")
    with pytest.raises(grpc.RpcError) as caught:
        rig.generate(context_text="x" * 200_000)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rig.generate()[-1].answer.text


def test_a_client_gone_in_the_middle_stops_the_row(rig: Rig) -> None:
    rig.service.token_s = 0.02
    call = rig.inference.Generate(request(sampling={"max_tokens": 5000}), timeout=WAIT_S)
    for event in call:
        if event.HasField("token") and event.token.index == 5:
            break
    call.cancel()
    wait_for(lambda: not rig.service.running)
    assert rig.service.n_emitted < 100
    assert sum(rig.service.cancelled.values()) == 1
    wait_for(lambda: rig.gateway.metrics.numbers()["streams_open"] == 0)
    rig.service.token_s = 0.0
    assert rig.generate()[-1].answer.text
    assert rig.runtime.n_failed == 0


def test_a_client_gone_while_the_row_waits_stops_it_too(rig: Rig) -> None:
    rig.service.hold.clear()
    with pytest.raises(grpc.RpcError) as caught:
        list(rig.inference.Generate(request(), timeout=0.5))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: not rig.service.running)


def test_generate_survives_its_worker(make_rig: Callable[..., Rig]) -> None:
    runtime = FakeRuntime()
    incarnations: list[Any] = []

    def configure(service: Any) -> None:
        service.token_s = 0.002
        service.die_after_tokens = 7 if len(incarnations) < 2 else None
        incarnations.append(service)

    runtime.configure = configure
    rig = make_rig(runtime=runtime)
    events = rig.generate(sampling={"max_tokens": 30})
    tokens = [event.token for event in events if event.HasField("token")]
    assert [token.index for token in tokens] == list(range(30))
    assert events[-1].answer.text == expected_text("a b c", QUESTION, 30)
    assert "".join(token.text for token in tokens) == events[-1].answer.text
    assert runtime.n_failed == 2


def test_a_worker_that_never_works_is_unavailable_with_retry_info(
    make_rig: Callable[..., Rig],
) -> None:
    runtime = FakeRuntime()
    runtime.configure = lambda service: setattr(service, "die_after_tokens", 0)
    rig = make_rig("gateway.max_attempts=2", runtime=runtime)
    code, info, others = status_of(rig.generate)
    assert (code, info.reason) == ("UNAVAILABLE", "WORKER_LOST")
    (retry,) = others
    assert retry.retry_delay.seconds >= 1


# Jobs


def test_a_batch_end_to_end(rig: Rig) -> None:
    chat = {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hi there"}], "max_tokens": 2},
    }
    data = batch("a", "b") + b"{broken\n\n" + batch("a") + json.dumps(chat).encode()
    response = rig.submit(data, chunk=7, name="batch.jsonl")
    assert not response.existed
    job_id = response.job.job_id
    assert response.job.rows.total == 5
    results = rig.results(job_id)
    assert len(results) == 5
    # rows that could not be read have ended before any other ran
    assert [line["error"] and line["error"]["code"] for line in results] == [
        *("BATCH_LINE_ERROR", "ALREADY_EXISTS"),
        *(None, None, None),
    ]
    assert [line["error"]["line"] for line in results[:2]] == [3, 5]
    good = {line["custom_id"]: line["response"] for line in results[2:]}
    assert set(good) == {"a", "b", "chat"}
    assert good["chat"]["status_code"] == 200
    body = good["chat"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": expected_text("hi there", "", 2),
    }
    assert body["choices"][0]["finish_reason"] == "length"
    job = rig.job(job_id)
    assert job.state == jobs_pb2.JOB_STATE_COMPLETED
    assert (job.name, job.rows.done, job.rows.failed) == ("batch.jsonl", 3, 2)
    assert job.ended_s >= job.started_s >= job.created_s > 0
    assert rig.results(job_id, offset=3) == results[3:]
    listed = rig.jobs.List(jobs_pb2.ListJobsRequest()).jobs
    assert [job.job_id for job in listed] == [job_id]
    assert not rig.jobs.List(jobs_pb2.ListJobsRequest(active_only=True)).jobs


def test_results_come_while_rows_run(rig: Rig) -> None:
    rig.service.token_s = 0.02
    names = [f"r{i}" for i in range(20)]
    lengths = {name: 1 if name == "r7" else 60 for name in names}
    data = b"".join(batch(name, max_tokens=length) for name, length in lengths.items())
    job_id = rig.submit(data).job.job_id
    first = next(iter(rig.jobs.Results(jobs_pb2.ResultsRequest(job_id=job_id, follow=True))))
    assert (first.position, first.custom_id) == (0, "r7")
    assert rig.job(job_id).state == jobs_pb2.JOB_STATE_RUNNING
    rig.jobs.Cancel(jobs_pb2.CancelJobRequest(job_id=job_id))


def test_watch_shows_rows_and_ends_with_the_job(rig: Rig) -> None:
    rig.service.token_s = 0.02
    job_id = rig.submit(batch("a", "b", max_tokens=40)).job.job_id
    request = jobs_pb2.WatchJobRequest(job_id=job_id, interval_s=0.15)
    updates = list(rig.jobs.Watch(request, timeout=WAIT_S))
    assert len(updates) >= 4
    assert updates[-1].job.state == jobs_pb2.JOB_STATE_COMPLETED
    assert not updates[-1].active
    assert (updates[-1].prefilled_tokens, updates[-1].decoded_tokens) == (2 * 6, 2 * 40)
    middle = updates[-2]
    assert {row.custom_id for row in middle.active} == {"a", "b"}
    assert all(row.phase == "decode" and row.max_tokens == 40 for row in middle.active)
    assert all(row.worker_id == "worker-0" and row.total == 6 for row in middle.active)
    assert 0 < middle.decoded_tokens <= 80
    assert middle.decode_tokens_per_s > 0
    assert middle.eta_s >= 0
    decoded = [update.decoded_tokens for update in updates]
    assert decoded == sorted(decoded)


def test_cancel(rig: Rig) -> None:
    rig.service.hold.clear()
    job_id = rig.submit(batch(*(f"r{i}" for i in range(40)))).job.job_id
    wait_for(lambda: len(rig.service.running) == 16)
    job = rig.jobs.Cancel(jobs_pb2.CancelJobRequest(job_id=job_id))
    assert job.state in (jobs_pb2.JOB_STATE_CANCELLING, jobs_pb2.JOB_STATE_CANCELLED)
    results = rig.results(job_id)
    assert len(results) == 40
    assert {line["error"]["code"] for line in results} == {"CANCELLED"}
    assert rig.job(job_id).state == jobs_pb2.JOB_STATE_CANCELLED
    cancel = jobs_pb2.CancelJobRequest(job_id=job_id)
    code, info, _ = status_of(lambda: rig.jobs.Cancel(cancel))
    assert (code, info.reason) == ("FAILED_PRECONDITION", "ALREADY_ENDED")
    for call in (
        lambda: rig.jobs.Cancel(jobs_pb2.CancelJobRequest(job_id="job-none")),
        lambda: rig.job("job-none"),
        lambda: rig.results("job-none"),
        lambda: list(rig.jobs.Watch(jobs_pb2.WatchJobRequest(job_id="job-none"))),
    ):
        assert status_of(call)[0] == "NOT_FOUND"


def test_submit_by_uri_and_idempotency(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(batch("a"))
    first = rig.submit(b"", uri=path.as_uri(), idempotency_key="k")
    assert first.job.name == "batch.jsonl"
    again = rig.submit(batch("a"), idempotency_key="k")
    assert again.existed
    assert again.job.job_id == first.job.job_id
    code, info, _ = status_of(lambda: rig.submit(batch("b"), idempotency_key="k"))
    assert (code, info.reason) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    missing = (tmp_path / "none").as_uri()
    code, info, _ = status_of(lambda: rig.submit(b"", uri=missing))
    assert (code, info.reason) == ("INVALID_ARGUMENT", "UNREADABLE_URI")
    assert status_of(lambda: rig.submit(batch("a"), uri=path.as_uri()))[0] == "INVALID_ARGUMENT"
    assert status_of(lambda: rig.submit(b"\n\n"))[0] == "INVALID_ARGUMENT"
    assert status_of(lambda: rig.jobs.Submit(iter(())))[0] == "INVALID_ARGUMENT"
    assert len(rig.jobs.List(jobs_pb2.ListJobsRequest()).jobs) == 1


def test_a_client_gone_while_it_submits_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    gate = threading.Event()

    def parts() -> Iterator[jobs_pb2.SubmitRequest]:
        yield jobs_pb2.SubmitRequest(header=jobs_pb2.SubmitHeader())
        yield jobs_pb2.SubmitRequest(chunk=batch("a"))
        gate.wait(WAIT_S)

    call = rig.jobs.Submit.future(parts())
    spool = tmp_path / "state" / "spool"
    wait_for(lambda: list(spool.iterdir()))
    call.cancel()
    gate.set()
    wait_for(lambda: not list(spool.iterdir()))
    assert not rig.jobs.List(jobs_pb2.ListJobsRequest()).jobs


def test_an_upload_without_its_end_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    """What a cancelled stream may look like from the server: chunks, then nothing more."""
    head = jobs_pb2.SubmitRequest(header=jobs_pb2.SubmitHeader())
    whole = list(upload_parts(jobs_pb2.SubmitRequest, [batch("a"), batch("b")]))
    for parts in (
        whole[:1],  # a line boundary: nothing in the bytes tells that more was to come
        [whole[0], whole[2]],
        [*whole, whole[2]],
        [*whole, head],
    ):
        code, _, others = status_of(lambda p=parts: rig.jobs.Submit(iter([head, *p])))
        assert code == "INVALID_ARGUMENT", others
    text = list(upload_parts(contexts_pb2.UploadContextRequest, [b"a b ", b"c d"]))
    assert status_of(lambda: rig.contexts.Upload(iter(text[:1])))[0] == "INVALID_ARGUMENT"
    assert not rig.jobs.List(jobs_pb2.ListJobsRequest()).jobs
    state = tmp_path / "state"
    assert not [*(state / "spool").iterdir(), *(state / "contexts").iterdir()]


def test_oversized_lines_fail_alone(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("gateway.max_line_bytes=1000")
    job = rig.submit(batch("a") + batch("big", context="x " * 5000) + batch("c")).job
    results = {line["custom_id"]: line for line in rig.results(job.job_id)}
    assert results[""]["error"]["code"] == "BATCH_LINE_ERROR"
    assert "max_line_bytes" in results[""]["error"]["message"]
    assert results["a"]["error"] is results["c"]["error"] is None


def test_a_full_queue_says_when_to_come_back(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("gateway.max_queued_rows=2")
    rig.service.hold.clear()
    rig.submit(batch("a", "b"))
    code, info, others = status_of(lambda: rig.submit(batch("c")))
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert isinstance(others[0], error_details_pb2.RetryInfo)
    rig.service.hold.set()


# the gateway itself


def test_a_restart_on_the_same_journal_continues(make_rig: Callable[..., Rig]) -> None:
    runtime = FakeRuntime()
    runtime.configure = lambda service: setattr(service, "token_s", 0.01)
    rig = make_rig("worker.max_rows=2", runtime=runtime)
    names = [f"r{i}" for i in range(8)]
    job_id = rig.submit(batch(*names, max_tokens=30)).job.job_id
    wait_for(lambda: rig.service.n_emitted > 150)
    before = rig.job(job_id).rows.done
    assert 0 < before < 8
    rig.close()
    second = FakeRuntime()
    rig = make_rig("worker.max_rows=2", runtime=second)
    assert rig.gateway.epoch == 2
    results = rig.results(job_id)
    assert sorted(line["custom_id"] for line in results) == names
    for line in results:
        content = line["response"]["body"]["choices"][0]["message"]["content"]
        assert content == expected_text("a b c", f"what is {line['custom_id']}", 30)
    assert sum(rig.service.resumed_from.values()) > 0
    assert rig.service.n_emitted < 8 * 30 - 100


def test_a_second_gateway_is_refused_before_anything_starts(rig: Rig, tmp_path: Path) -> None:
    port = rig.address.rpartition(":")[2]
    runtime = FakeRuntime()
    config = make_config(tmp_path / "other", f"gateway.port={port}")
    with pytest.raises(AlreadyServing, match=port):
        Gateway(config, runtime, prompts=FakePrompts(), geometry=GEOMETRY).start()
    assert not (tmp_path / "other").exists()
    config = make_config(tmp_path / "state")
    with pytest.raises(AlreadyServing, match="in use by process"):
        Gateway(config, runtime, prompts=FakePrompts(), geometry=GEOMETRY).start()
    assert not runtime.started
    # neither attempt touched the one that runs
    assert json.loads((tmp_path / "state" / "gateway.json").read_text())["address"] == rig.address
    assert rig.generate()[-1].answer.text


def test_stop_frees_port_and_journal(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    first = make_rig()
    port = first.address.rpartition(":")[2]
    first.close()
    assert first.runtime.stopped
    assert not (tmp_path / "state" / "gateway.json").exists()
    second = make_rig(f"gateway.port={port}")
    assert second.address == first.address
    with pytest.raises(FailedPrecondition):
        second.gateway.start()


def test_a_search_stage_over_stores_elsewhere_is_refused(tmp_path: Path) -> None:
    class Apart(FakeRuntime):
        def stats(self) -> dict[str, dict[str, Any]]:
            return {
                "store-0": {"kind": "store", "node_id": "one"},
                "worker-0": {"kind": "worker", "node_id": "two"},
            }

    stages = "[{scorer: search, chunk: 16, keep: 160}]"
    policies = f"attention.policies=[{{stages: {stages}, window: 256}}]"
    config = make_config(tmp_path, policies, "cache.page_tokens=64")
    runtime = Apart()
    with pytest.raises(FailedPrecondition, match="search"):
        Gateway(config, runtime, prompts=FakePrompts(), geometry=GEOMETRY).start()
    assert runtime.stopped


def test_health_and_reflection_answer(rig: Rig) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", *SERVICE_NAMES):
        assert rig.health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
    with pytest.raises(grpc.RpcError) as caught:
        rig.health.Check(health_pb2.HealthCheckRequest(service="longreach.v1.Nothing"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    stub = reflection_pb2_grpc.ServerReflectionStub(rig.channel)
    ask = reflection_pb2.ServerReflectionRequest
    answers = list(
        stub.ServerReflectionInfo(
            iter([ask(list_services=""), ask(file_containing_symbol="longreach.v1.Jobs")])
        )
    )
    listed = {service.name for service in answers[0].list_services_response.service}
    assert set(SERVICE_NAMES) <= listed
    assert SERVICE_NAMES[0] == "longreach.v1.Inference"
    assert answers[1].file_descriptor_response.file_descriptor_proto


def test_drain_refuses_new_work_and_finishes_what_runs(rig: Rig) -> None:
    rig.service.hold.clear()
    job_id = rig.submit(batch("a")).job.job_id
    wait_for(lambda: rig.service.running)
    draining = rig.admin.Drain.future(admin_pb2.DrainRequest(timeout_s=WAIT_S))
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    check = health_pb2.HealthCheckRequest(service="longreach.v1.Jobs")
    wait_for(lambda: rig.health.Check(check).status == not_serving)
    wait_for(lambda: rig.admin.Stats(admin_pb2.StatsRequest()).draining)
    for call in (rig.generate, lambda: rig.submit(batch("b"))):
        code, info, others = status_of(call)
        assert (code, info.reason) == ("UNAVAILABLE", "DRAINING")
        assert isinstance(others[0], error_details_pb2.RetryInfo)
    rig.service.hold.set()
    assert draining.result(WAIT_S).running_rows == 0
    assert rig.job(job_id).state == jobs_pb2.JOB_STATE_COMPLETED


def test_drain_waits_for_interactive_rows_too(rig: Rig) -> None:
    rig.service.hold.clear()
    call = rig.inference.Generate(request(), timeout=WAIT_S)
    wait_for(lambda: rig.service.running)
    assert rig.gateway.drain(0.3) == 1
    rig.service.hold.set()
    assert rig.gateway.drain(WAIT_S) == 0
    assert list(call)[-1].answer.text == expected_text("a b c", QUESTION, 4)


def test_long_streams_leave_room_for_short_calls(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.service.hold.clear()
    job_id = rig.submit(batch("a")).job.job_id
    wait_for(lambda: rig.service.running)
    streams = rig.gateway._service.streams  # type: ignore[union-attr]
    monkeypatch.setattr(streams, "_limit", 5)
    watch = jobs_pb2.WatchJobRequest(job_id=job_id)
    calls = [rig.jobs.Watch(watch, timeout=WAIT_S) for _ in range(5)]
    for call in calls:
        next(call)
    code, info, _ = status_of(lambda: list(rig.jobs.Watch(watch, timeout=WAIT_S)))
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED")
    assert rig.job(job_id).rows.running == 1
    for call in calls:
        call.cancel()
    wait_for(lambda: streams.n_open == 0)
    rig.service.hold.set()
    assert len(rig.results(job_id)) == 1


def test_contexts(rig: Rig, tmp_path: Path) -> None:
    text = ("für jeden Tag ein Wort\r\n" * 40).encode()
    context = rig.upload(text, chunk=7)
    assert context.n_bytes == len(text)
    assert rig.upload(text, chunk=100).context_id == context.context_id
    got = rig.contexts.Get(contexts_pb2.GetContextRequest(context_id=context.context_id))
    assert got == context
    path = tmp_path / "document.txt"
    path.write_bytes(text)
    imported = rig.contexts.Import(contexts_pb2.ImportContextRequest(uri=path.as_uri()))
    assert imported.context_id == context.context_id
    for bad in (b"", b" \n ", b"\xff\xff"):
        assert status_of(lambda bad=bad: rig.upload(bad))[0] == "INVALID_ARGUMENT"
    delete = contexts_pb2.DeleteContextRequest(context_id=context.context_id)
    rig.service.hold.clear()
    row = {"custom_id": "a", "context_id": context.context_id, "question": "q", "max_tokens": 1}
    job_id = rig.submit(json.dumps(row).encode()).job.job_id
    assert status_of(lambda: rig.contexts.Delete(delete))[0] == "FAILED_PRECONDITION"
    rig.service.hold.set()
    rig.results(job_id)
    rig.contexts.Delete(delete)
    assert status_of(lambda: rig.contexts.Delete(delete))[0] == "NOT_FOUND"
    assert list((tmp_path / "state" / "contexts").iterdir()) == []


def test_stats_and_metrics(make_rig: Callable[..., Rig]) -> None:
    import urllib.request

    rig = make_rig("gateway.metrics_port=0")
    rig.generate()
    rig.results(rig.submit(batch("a", "b")).job.job_id)
    status_of(lambda: rig.generate(sampling={"top_p": 7}))
    stats = rig.admin.Stats(admin_pb2.StatsRequest())
    assert stats.epoch == 1
    assert stats.model == "embedded"
    assert stats.parts[0].part == "worker-0"
    assert stats.parts[0].labels["state"] == "live"
    assert stats.gateway["rows_total_batch_length"] == 2
    assert stats.gateway["rows_total_interactive_length"] == 1
    assert stats.gateway["generation_tokens_total"] == 4 + 2 * 3
    assert stats.gateway["failures_total_Generate_SAMPLING_ERROR"] == 1
    assert stats.gateway["workers_live"] == 1
    port = rig.gateway.metrics._server.server_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        page = response.read().decode()
    assert "longreach_time_to_first_token_seconds_count 3.0" in page
