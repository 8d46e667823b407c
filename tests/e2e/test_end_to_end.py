"""A batch from submit to results over real processes, the same tests in both wirings."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from longreach.cluster.gateway import SERVICE_NAMES
from longreach.cluster.proto import jobs_pb2

from .serving import Batch, Serve, jsonl, rows_of, run_cli, token_ids

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORDS = (900, 1200, 1700)
"""Lengths of the contexts: about 1,550, 2,050 and 2,950 tokens."""
ROWS = rows_of(1, 8, 32, WORDS)
PAGE_TOKENS = 64


@pytest.fixture(scope="session")
def undisturbed(inprocess: Serve) -> dict[str, str]:
    """Answers of each row asked alone, one after the other, in the in-process wiring."""
    alone = {}
    for row in ROWS:
        alone |= inprocess.run([row]).answers
    return alone


@pytest.fixture(scope="module")
def batch(serve: Serve, undisturbed: dict[str, str]) -> Batch:
    return serve.run(ROWS)


def test_every_row_is_answered_once_and_as_when_asked_alone(
    batch: Batch, undisturbed: dict[str, str]
) -> None:
    assert Counter(line["custom_id"] for line in batch.lines) == Counter(list(undisturbed))
    assert batch.answers == undisturbed
    # the comparison has power: answers depend on context and question, and hide few odd bytes
    assert len(set(undisturbed.values())) == len(ROWS)
    assert "".join(undisturbed.values()).count("\ufffd") < 8
    assert batch.job.state == jobs_pb2.JOB_STATE_COMPLETED
    assert batch.job.rows.done == batch.job.rows.total == len(ROWS)


def test_result_lines_have_the_openai_shape(batch: Batch) -> None:
    for line in batch.lines:
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        body = line["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["role"] == "assistant"
        assert body["choices"][0]["finish_reason"] == "length"
        usage, stats = body["usage"], body["longreach"]["stats"]
        assert usage["completion_tokens"] == 32
        assert usage["prompt_tokens"] == stats["tokens_prompt"] > 1400
        assert usage["total_tokens"] == usage["prompt_tokens"] + 32


def test_rows_that_share_a_context_reuse_its_pages(serve: Serve) -> None:
    rows = rows_of(20 + len(serve.command), 6, 2, WORDS)
    stats = serve.run(rows).stats
    by_context: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        by_context.setdefault(row["context"], []).append(stats[row["custom_id"]])
    for first, second in by_context.values():
        whole, reused = sorted((first, second), key=lambda s: s["tokens_reused"])
        assert whole["tokens_reused"] == 0
        assert whole["tokens_prefilled"] == whole["tokens_prompt"]
        # all full pages but those that hold the question
        assert reused["tokens_reused"] % PAGE_TOKENS == 0
        assert reused["tokens_reused"] > reused["tokens_prompt"] - 2 * PAGE_TOKENS
        assert reused["tokens_prefilled"] == reused["tokens_prompt"] - reused["tokens_reused"]
    # a later job finds the pages in the stores
    (later,) = serve.run([rows[0] | {"question": "And later?"}]).stats.values()
    assert later["tokens_reused"] > later["tokens_prompt"] - 2 * PAGE_TOKENS
    assert later["bytes_store_to_device"] > 0


def test_the_bank_is_smaller_than_a_context_and_pages_move(batch: Batch) -> None:
    largest = max(batch.stats.values(), key=lambda stats: stats["pages_context"])
    assert largest["pages_context"] + 1 > 45
    assert batch.total("bank_misses") > 0
    assert batch.total("bytes_device_to_store") > 0
    assert 0 < batch.total("mass_kept_sum") <= batch.total("mass_kept_n")
    assert batch.total("pages_recomputed") == batch.total("restarts") == 0


def test_generate_streams_the_answer_of_the_batch(
    serve: Serve, undisturbed: dict[str, str]
) -> None:
    row = ROWS[0]
    events = list(
        serve.client.generate(
            row["question"], context=row["context"], sampling={"max_tokens": row["max_tokens"]}
        )
    )
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "progress"
    assert kinds.count("token") == row["max_tokens"]
    assert kinds[-1] == "answer"
    assert [e.token.index for e in events if e.WhichOneof("event") == "token"] == list(range(32))
    assert events[-1].answer.text == undisturbed[row["custom_id"]]
    assert "".join(e.token.text for e in events) == events[-1].answer.text
    assert events[-1].answer.usage.reused_tokens > 0  # the batch's pages
    assert len(set(token_ids(iter(events)))) > 16


def test_sampling_is_reproducible_and_stop_ends_the_answer(
    serve: Serve, undisturbed: dict[str, str]
) -> None:
    def ask(**sampling: Any) -> Any:
        sampling = {"max_tokens": 12} | sampling
        return serve.client.ask(ROWS[1]["question"], context=ROWS[1]["context"], sampling=sampling)

    hot = {"temperature": 0.8, "top_p": 0.95}
    assert ask(**hot, seed=1).text == ask(**hot, seed=1).text
    assert ask(**hot, seed=1).text != ask(**hot, seed=2).text
    greedy = undisturbed[ROWS[1]["custom_id"]]
    stopped = ask(stop=[greedy[10:14]])
    assert stopped.finish_reason == "stop"
    assert stopped.text == greedy[: greedy.index(greedy[10:14])]


def test_openai_lines_uploads_and_uris_ask_the_same_context(serve: Serve, tmp_path: Path) -> None:
    document = ROWS[0]["context"]
    path = tmp_path / "document.txt"
    path.write_text(document)
    context_id = serve.client.upload_context(path).context_id
    common = {"question": "Which way?", "max_tokens": 4}
    message = {"role": "user", "content": f"{document}\n\nWhich way?"}
    body = {"model": "tiny", "messages": [message], "max_tokens": 4}
    rows = [
        {"custom_id": "text", "context": document, **common},
        {"custom_id": "id", "context_id": context_id, **common},
        {"custom_id": "uri", "context_uri": path.as_uri(), **common},
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body},
    ]
    answers = serve.run(rows).answers
    assert len(set(answers.values())) == 1
    assert set(answers) == {"text", "id", "uri", "chat"}


def test_the_commands_do_the_same(
    serve: Serve, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    source, output = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(ROWS[:3]))
    address = ("--address", serve.address)
    submitted = run_cli("submit", source, *address)
    assert re.fullmatch(r"job-\w+\n", submitted.stdout), submitted.stderr
    job_id = submitted.stdout.strip()
    watched = run_cli("watch", job_id, *address)
    assert watched.returncode == 0, watched.stderr
    assert "completed: 3/3 rows" in watched.stdout
    assert run_cli("results", job_id, "-o", output, *address).returncode == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert Batch(serve.client.get(job_id), lines).answers == {
        row["custom_id"]: undisturbed[row["custom_id"]] for row in ROWS[:3]
    }
    # the state directory tells the address too
    assert job_id in run_cli("jobs", "--state-dir", serve.state_dir).stdout


def test_health_and_reflection_answer(serve: Serve) -> None:
    with grpc.insecure_channel(serve.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", *SERVICE_NAMES):
            request = health_pb2.HealthCheckRequest(service=name)
            assert health.Check(request, timeout=10).status == 1
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (reply,) = stub.ServerReflectionInfo(asked, timeout=10)
        names = {service.name for service in reply.list_services_response.service}
        assert names >= set(SERVICE_NAMES) | {"grpc.health.v1.Health"}


def test_parts_tell_their_numbers(serve: Serve) -> None:
    assert {p.part for p in serve.client.stats().parts} == {
        *("store-0", "store-1", "retriever-0", "worker-0")
    }

    def settled() -> bool:
        stores = [serve.part("store-0"), serve.part("store-1")]
        held = {store["pages_held"] for store in stores}
        return len(held) == 1 and not any(store["pages_pinned"] for store in stores)

    # two stores, two replicas: both hold everything that was stored, once writes behind the last
    # rows have ended
    deadline = time.monotonic() + 20
    while not settled() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert settled()
    stored = serve.part("worker-0")["store_pages_stored"]
    assert 0 < serve.part("store-0")["pages_held"] <= stored
    assert serve.part("worker-0")["store_corrupt_detected"] == 0
