"""Each bad input gets one clear error with its status, and nothing else is harmed."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from longreach.cluster.proto import inference_pb2, inference_pb2_grpc, jobs_pb2
from longreach.core.errors import AlreadyEnded

from .serving import Serve, jsonl, rows_of, run_cli, text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

GOOD = rows_of(3, 2, 4, (300,))
LONG = text_of(99, 5_500)
"""About 9,400 tokens; the limit is 8,192."""


def assert_one_line(done: subprocess.CompletedProcess[str], reason: str, *words: str) -> None:
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[0].startswith(f"error: {reason}: "), lines[0]
    for word in words:
        assert word in lines[0]


def line(**values: Any) -> bytes:
    given = {"context": "the keeper is Ebba", "question": "who?", "max_tokens": 2} | values
    return json.dumps({k: v for k, v in given.items() if v is not None}).encode()


BAD_LINES: list[tuple[bytes, str, int, str]] = [
    (b"{nonsense", "BATCH_LINE_ERROR", 400, "not valid JSON"),
    (b"[1, 2]", "BATCH_LINE_ERROR", 400, "expected a JSON object"),
    (b'{"custom_id": "\xff"}', "BATCH_LINE_ERROR", 400, "UTF-8"),
    (line(custom_id="big", context="x" * 200_000), "BATCH_LINE_ERROR", 400, "max_line_bytes"),
    (line(custom_id=GOOD[0]["custom_id"]), "ALREADY_EXISTS", 409, "was used in line 1"),
    (line(custom_id="model", model="gpt-17"), "UNSUPPORTED_MODEL", 400, "gpt-17"),
    (line(custom_id="empty", context=""), "EMPTY_CONTEXT", 400, "empty"),
    (line(custom_id="blank", context=" \n "), "EMPTY_CONTEXT", 400, "empty"),
    (line(custom_id="long", context=LONG), "CONTEXT_TOO_LONG", 400, "8192"),
    (line(custom_id="none", context=None), "BATCH_LINE_ERROR", 400, "exactly one of"),
    (
        line(custom_id="gone", context=None, context_uri="file:///no/such/file"),
        *("UNREADABLE_URI", 400, "/no/such/file"),
    ),
    (
        line(custom_id="odd", context=None, context_uri="gopher://example.org/x"),
        *("UNREADABLE_URI", 400, "gopher"),
    ),
    (line(custom_id="cold", temperature=-1), "SAMPLING_ERROR", 400, "temperature"),
    (line(custom_id="hot", temperature=1e9), "SAMPLING_ERROR", 400, "temperature"),
    (line(custom_id="p", top_p=0), "SAMPLING_ERROR", 400, "top_p"),
    (line(custom_id="short", max_tokens=-5), "SAMPLING_ERROR", 400, "max_tokens"),
    (line(custom_id="endless", max_tokens=10**9), "SAMPLING_ERROR", 400, "max_new_tokens"),
    (line(custom_id="word", seed="x"), "SAMPLING_ERROR", 400, "seed"),
    (line(custom_id="typo", questoin="?"), "BATCH_LINE_ERROR", 400, "questoin"),
    (line(question="anonymous?"), "BATCH_LINE_ERROR", 400, "custom_id"),
]


def test_bad_lines_fail_alone_with_their_number(serve: Serve) -> None:
    data = b"\n".join([jsonl(GOOD[:1]).strip(), *(bad for bad, *_ in BAD_LINES), jsonl(GOOD[1:])])
    batch = serve.finish(serve.client.submit(data).job_id)
    assert batch.job.state == jobs_pb2.JOB_STATE_COMPLETED
    assert batch.job.rows.done == 2
    assert batch.job.rows.failed == len(BAD_LINES)
    assert set(batch.answers) == {row["custom_id"] for row in GOOD}
    failed = {ln["error"].get("line"): ln for ln in batch.lines if ln["error"] is not None}
    for number, (_, reason, status, words) in enumerate(BAD_LINES, start=2):
        result = failed[number]
        assert result["error"]["code"] == reason, result
        assert result["response"]["status_code"] == status, result
        assert words in result["error"]["message"], result


def test_a_batch_without_a_row_is_refused(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"\n\n")
    assert_one_line(run_cli("submit", path, "--address", serve.address), "INVALID_INPUT", "no row")


BAD_REQUESTS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"context_text": ""}, {}, "INVALID_ARGUMENT", "EMPTY_CONTEXT"),
    ({"context_text": LONG}, {}, "INVALID_ARGUMENT", "CONTEXT_TOO_LONG"),
    ({"context_uri": "file:///no/such/file"}, {}, "INVALID_ARGUMENT", "UNREADABLE_URI"),
    ({"context_id": "ctx-" + 64 * "0"}, {}, "NOT_FOUND", "NOT_FOUND"),
    ({"model": "gpt-17"}, {}, "FAILED_PRECONDITION", "UNSUPPORTED_MODEL"),
    ({"question": ""}, {}, "INVALID_ARGUMENT", "INVALID_INPUT"),
    ({}, {"temperature": -1.0}, "INVALID_ARGUMENT", "SAMPLING_ERROR"),
    ({}, {"temperature": float("nan")}, "INVALID_ARGUMENT", "SAMPLING_ERROR"),
    ({}, {"top_p": 1.5}, "INVALID_ARGUMENT", "SAMPLING_ERROR"),
    ({}, {"max_tokens": 0}, "INVALID_ARGUMENT", "SAMPLING_ERROR"),
]


def test_bad_requests_get_a_status_with_details(serve: Serve) -> None:
    with grpc.insecure_channel(serve.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for fields, sampling, code, reason in BAD_REQUESTS:
            given = {"context_text": "the keeper is Ebba", "question": "who?"}
            if any(name.startswith("context") for name in fields):
                del given["context_text"]
            request = inference_pb2.GenerateRequest(
                sampling=inference_pb2.Sampling(**sampling), **(given | fields)
            )
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request, timeout=30))
            status = rpc_status.from_call(caught.value)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            found = (caught.value.code().name, info.reason)
            assert found == (code, reason), (fields, sampling)


@pytest.mark.parametrize(
    ("arguments", "reason", "words"),
    [
        (("watch", "job-none"), "NOT_FOUND", "job-none"),
        (("results", "job-none"), "NOT_FOUND", "job-none"),
        (("cancel", "job-none"), "NOT_FOUND", "job-none"),
        (("submit", "/no/such/batch.jsonl"), "UNREADABLE_URI", "/no/such/batch.jsonl"),
        (("submit", "--uri", "file:///no/such"), "UNREADABLE_URI", "/no/such"),
        (
            ("generate", "--question", "?", "--context", "file:///no/such"),
            *("UNREADABLE_URI", "/no/such"),
        ),
    ],
)
def test_commands_fail_with_one_line(
    inprocess: Serve, arguments: tuple[str, ...], reason: str, words: str
) -> None:
    assert_one_line(run_cli(*arguments, "--address", inprocess.address), reason, words)


def test_cancel_of_an_ended_job(serve: Serve) -> None:
    job_id = serve.run(GOOD[:1]).job.job_id
    with pytest.raises(AlreadyEnded):
        serve.client.cancel(job_id)
    done = run_cli("cancel", job_id, "--address", serve.address)
    assert_one_line(done, "ALREADY_ENDED", job_id, "completed")


def test_cancel_of_a_running_job_keeps_what_was_answered(serve: Serve) -> None:
    rows = [*rows_of(4, 1, 2, (200,)), *rows_of(5, 3, 6000, (200,))]
    job_id = serve.submit(rows)
    serve.updates_until(job_id, lambda u: u.job.rows.done == 1 and u.decoded_tokens > 40)
    serve.client.cancel(job_id)
    batch = serve.finish(job_id, 20)
    assert batch.job.state == jobs_pb2.JOB_STATE_CANCELLED
    assert set(batch.answers) == {"row-4-0"}
    cancelled = [ln for ln in batch.lines if ln["error"] is not None]
    assert [ln["error"]["code"] for ln in cancelled] == 3 * ["CANCELLED"]
    assert [ln["response"]["status_code"] for ln in cancelled] == 3 * [499]


def eventually(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_client_gone_in_the_middle_frees_its_row(serve: Serve) -> None:
    events = serve.client.generate(
        "Who?", context=GOOD[0]["context"], sampling={"max_tokens": 6000}
    )
    for event in events:
        if event.WhichOneof("event") == "token" and event.token.index == 3:
            break
    assert serve.part("worker-0")["rows"] == 1
    events.close()  # type: ignore[attr-defined]
    eventually(lambda: serve.part("worker-0")["rows"] == 0)
    eventually(lambda: serve.part("store-0")["pages_pinned"] == 0)


def test_a_killed_client_frees_its_row(serve: Serve, tmp_path: Path) -> None:
    from .serving import longreach_command

    document = tmp_path / "document.txt"
    document.write_text(GOOD[0]["context"])
    command = [*longreach_command(), "generate", "--context", str(document), "--question", "Who?"]
    command += ["--max-tokens", "6000", "--address", serve.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        client.stdout.read(20)  # it streams
        assert serve.part("worker-0")["rows"] == 1
        client.kill()
    eventually(lambda: serve.part("worker-0")["rows"] == 0)


def end_of(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_a_second_serve_is_refused(serve: Serve, tmp_path: Path) -> None:
    before = serve.client.stats()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    same_state = serve.popen(**pipes)
    port = serve.address.rpartition(":")[2]
    other = Serve(serve.command, tmp_path / "other", serve.mark)
    same_port = other.popen("--port", port, **pipes)
    assert_one_line(end_of(same_state), "ALREADY_SERVING", str(serve.state_dir))
    assert_one_line(end_of(same_port), "ALREADY_SERVING", port)
    after = serve.client.stats()
    assert (after.epoch, len(after.parts)) == (before.epoch, len(before.parts))
    assert set(serve.run(GOOD).answers) == {row["custom_id"] for row in GOOD}


@pytest.mark.parametrize(
    ("sets", "reason", "words"),
    [
        (("stoer.count=3",), "CONFIG_ERROR", ("stoer", "did you mean 'store'")),
        (("store.replica=1",), "CONFIG_ERROR", ("store.replica", "did you mean 'replicas'")),
        (("store.count=-1",), "CONFIG_ERROR", ("store.count", "-1")),
        (("model.name=/no/such/model.gguf",), "UNSUPPORTED_MODEL", ("/no/such/model.gguf",)),
    ],
)
def test_serve_refuses_a_bad_configuration(
    config_file: Path, tmp_path: Path, sets: tuple[str, ...], reason: str, words: tuple[str, ...]
) -> None:
    options = [item for value in sets for item in ("--set", value)]
    done = run_cli(
        *("serve", "--config", config_file, "--wiring", "inprocess", "--port", "0"),
        *("--state-dir", tmp_path / "state", *options),
    )
    assert_one_line(done, reason, *words)


def test_a_port_that_something_else_holds(config_file: Path, tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        done = run_cli(
            *("serve", "--config", config_file, "--wiring", "inprocess", "--port", str(port)),
            *("--state-dir", tmp_path / "state"),
        )
    assert_one_line(done, "ALREADY_SERVING", re.escape(str(port)))
