"""The commands, against a real gateway whose worker is a stand-in; serve as a real process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from longreach.cluster.cli import app
from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.core.config import Config

from .fakes import GEOMETRY, FakePrompts, FakeRuntime, expected_text, make_config

DOCUMENT = "the keeper of the lighthouse was called Ebba"
HERE = Path(__file__).parent


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def gateway(state_dir: Path, runtime: FakeRuntime) -> Iterator[Gateway]:
    made = Gateway(make_config(state_dir), runtime, prompts=FakePrompts(), geometry=GEOMETRY)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def run(gateway: Gateway, state_dir: Path) -> Callable[..., Result]:
    """A command that finds its gateway through the state directory."""
    return lambda *args: invoke(*args, "--state-dir", str(state_dir))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"custom_id": name, "context": DOCUMENT, "question": name, "max_tokens": 3}
        for name in ("a", "b")
    ]
    path = tmp_path / "batch.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_life_of_a_batch(run: Callable[..., Result], batch: Path, tmp_path: Path) -> None:
    submitted = run("submit", batch)
    assert submitted.exit_code == 0
    assert re.fullmatch(r"job-\w+\n", submitted.stdout)  # the id alone
    job_id = submitted.stdout.strip()

    watched = run("watch", job_id, "--interval-s", "0.1")
    assert watched.exit_code == 0
    assert f"{job_id} completed: 2/2 rows" in watched.stdout
    assert "took" in watched.stdout.splitlines()[-1]

    output = tmp_path / "out.jsonl"
    assert run("results", job_id, "-o", output).exit_code == 0
    rows = {row["custom_id"]: row for row in map(json.loads, output.read_text().splitlines())}
    text = rows["b"]["response"]["body"]["choices"][0]["message"]["content"]
    assert text == expected_text(DOCUMENT, "b", 3)
    assert run("results", job_id).stdout == output.read_text()

    listed = run("jobs")
    assert job_id in listed.stdout  # whole, however narrow the terminal
    assert "2/2" in listed.stdout
    assert job_id not in run("jobs", "--active").stdout


def test_submit_by_uri(run: Callable[..., Result], batch: Path) -> None:
    submitted = run("submit", "--uri", batch.as_uri())
    assert re.fullmatch(r"job-\w+\n", submitted.stdout)
    assert run("watch", submitted.stdout.strip()).exit_code == 0


def test_watch_of_a_job_that_failed_is_a_failure(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{nonsense")
    job_id = run("submit", bad).stdout.strip()
    watched = run("watch", job_id)
    assert watched.exit_code == 1
    assert "failed: 1/1 rows" in watched.stdout


def test_cancel(run: Callable[..., Result], runtime: FakeRuntime, batch: Path) -> None:
    runtime.services["worker-0"].hold.clear()
    job_id = run("submit", batch).stdout.strip()
    cancelled = run("cancel", job_id)
    assert cancelled.exit_code == 0
    assert cancelled.stdout.startswith(job_id)
    assert run("watch", job_id).exit_code == 1
    assert_fails(run("cancel", job_id), "ALREADY_ENDED")


@pytest.mark.parametrize("n_words", [10, 250_000])  # inline, and uploaded first
def test_generate_streams_the_answer(
    run: Callable[..., Result], tmp_path: Path, n_words: int
) -> None:
    document = tmp_path / "document.txt"
    document.write_text("word " * n_words)
    answered = run(
        *("generate", "--context", document, "--question", "who", "--answer-prefix", "It was"),
        *("--max-tokens", "3", "--stats"),
    )
    assert answered.exit_code == 0
    assert answered.stdout == expected_text("word " * n_words, "who", 3, "It was") + "\n"
    assert "1 answered" in answered.stderr


def assert_fails(result: Result, reason: str) -> None:
    assert result.exit_code == 1
    assert re.fullmatch(rf"error: {reason}: [^\n]+\n", result.stderr)


def test_errors_are_one_line(run: Callable[..., Result], tmp_path: Path) -> None:
    assert_fails(run("watch", "job-x"), "NOT_FOUND")
    assert_fails(run("results", "job-x", "-o", tmp_path / "out.jsonl"), "NOT_FOUND")
    assert not (tmp_path / "out.jsonl").exists()
    assert_fails(run("submit", tmp_path / "absent.jsonl"), "UNREADABLE_URI")
    ask = ("generate", "--question", "who", "--context")
    assert_fails(run(*ask, tmp_path / "absent.txt"), "UNREADABLE_URI")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert_fails(run(*ask, tmp_path / "latin.txt"), "UNREADABLE_URI")
    (tmp_path / "ok.txt").write_text(DOCUMENT)
    assert_fails(run(*ask, tmp_path / "ok.txt", "--temperature", "-1"), "SAMPLING_ERROR")


def test_no_gateway(tmp_path: Path) -> None:
    assert_fails(invoke("jobs", "--address", "127.0.0.1:1"), "UNAVAILABLE")
    # a state directory without a gateway falls back to the default port
    found = invoke("jobs", "--state-dir", str(tmp_path))
    if found.exit_code:
        assert "127.0.0.1:50051" in found.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--no-such-option",), ("no-such-command",), ("submit",), ("jobs", "--limit", "0")],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_bugs_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("longreach.cluster.cli_jobs.connect", broken)
    assert_fails(invoke("jobs"), "INTERNAL_ERROR")


def test_config_show_prints_what_it_would_load(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("store: {count: 3}")
    shown = invoke("config", "show", "--config", file, "--set", "store.replicas=1")
    tree = yaml.safe_load(shown.stdout)
    assert Config.model_validate(tree).store.count == 3
    assert tree["store"]["replicas"] == 1
    assert_fails(invoke("config", "show", "--set", "stoer.count=3"), "CONFIG_ERROR")
    assert_fails(invoke("serve", "--config", tmp_path / "absent.yaml"), "CONFIG_ERROR")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", invoke("version").stdout)


class Child:
    """`serve` as a process of its own."""

    def __init__(self, state_dir: Path, token_s: float, *sets: str) -> None:
        self.state_dir = state_dir
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "serve_child.py"), str(state_dir), str(token_s), *sets],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def address(self) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                return str(json.loads((self.state_dir / "gateway.json").read_text())["address"])
            except (OSError, ValueError):
                assert self.process.poll() is None, self.process.communicate()[1]
                time.sleep(0.05)
        raise AssertionError("serve did not come up")

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def serve(state_dir: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(token_s: float = 0.0, *sets: str) -> Child:
        children.append(Child(state_dir, token_s, *sets))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.communicate()


def submit_slow(address: str, n_tokens: int) -> str:
    row = {"custom_id": "a", "context": DOCUMENT, "question": "q", "max_tokens": n_tokens}
    with Client(address) as client:
        job_id = client.submit(json.dumps(row).encode()).job_id
        deadline = time.monotonic() + 20
        while not client.get(job_id).rows.running:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return job_id


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_serve_drains_on_a_signal(serve: Callable[..., Child], signum: int) -> None:
    child = serve(0.05)
    submit_slow(child.address(), 20)
    os.kill(child.process.pid, signum)
    code, stdout, stderr = child.end()
    assert code == 0
    assert re.match(r"serving at 127\.0\.0\.1:\d+\nstate in /", stdout)
    assert "rows still ran" not in stderr  # the row was let finish


@pytest.mark.slow
def test_serve_leaves_to_the_journal_what_does_not_end_in_time(
    serve: Callable[..., Child],
) -> None:
    child = serve(0.05, "gateway.drain_timeout_s=0.5")
    job_id = submit_slow(child.address(), 8_000)
    child.process.terminate()
    code, _, stderr = child.end()
    assert code == 0
    assert "1 rows still ran" in stderr
    again = serve(0.0)
    with Client(again.address()) as client:
        assert [u.job.rows.done for u in client.watch(job_id)][-1] == 1


@pytest.mark.slow
def test_second_signal_ends_serve_at_once(serve: Callable[..., Child]) -> None:
    child = serve(0.05)
    submit_slow(child.address(), 8_000)
    child.process.terminate()
    time.sleep(0.5)
    started = time.monotonic()
    child.process.terminate()
    assert child.end()[0] == 1
    assert time.monotonic() - started < 2


@pytest.mark.slow
def test_second_serve_is_refused(serve: Callable[..., Child], tmp_path: Path) -> None:
    first = serve()
    address = first.address()
    same_journal = serve()
    assert same_journal.end()[0] == 1
    port = address.rpartition(":")[2]
    # the real command: it must fail before any part is started
    refused = invoke(
        *("serve", "--wiring", "inprocess", "--port", port, "--state-dir", tmp_path / "other")
    )
    assert_fails(refused, "ALREADY_SERVING")
    assert port in refused.stderr


@pytest.mark.slow
def test_plan_works_without_a_gateway(tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("The harbour was quiet. " * 200)
    rows = [{"custom_id": n, "context_uri": str(document), "question": n} for n in ("a", "b")]
    rows.append({"custom_id": "none", "context": " ", "question": "q"})
    path = tmp_path / "batch.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    planned = invoke("plan", path, "--prefill-rate", "100", "--decode-rate", "10")
    assert planned.exit_code == 1  # a row was refused
    assert "2 can run, 1 refused" in planned.stdout
    assert re.search(r"refused: line 3 \(none\): EMPTY_CONTEXT: [^\n]+", planned.stderr)
    tokens = re.search(r"([\d,]+), of which ([\d,]+) are shared", " ".join(planned.stdout.split()))
    assert tokens is not None
    total, shared = (int(text.replace(",", "")) for text in tokens.groups())
    assert 1900 < total < 3000
    assert 0.4 * total < shared < 0.5 * total  # the second row computes its question only
    assert_fails(invoke("plan", tmp_path / "absent.jsonl"), "UNREADABLE_URI")


@pytest.mark.slow
def test_plan_says_what_a_gpu_has_to_hold(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "context": "One. Two.", "question": "Three?"}))
    ask = ("plan", path, "--prefill-rate", "100", "--decode-rate", "10")
    cuda = ("--set", "model.device=cuda", "--set", "model.max_context_tokens=100000")
    fits = invoke(*ask, *cuda, "--device-gib", "80", "--host-gib", "128")
    assert fits.exit_code == 0, fits.stderr
    text = " ".join(fits.stdout.split())
    assert "weights" in text
    assert "page tables" in text
    assert "estimate" in text
    small = invoke(*ask, *cuda, "--device-gib", "1", "--host-gib", "128")
    assert small.exit_code == 1
    assert "does not fit" in small.stderr
    assert "cache.device_pages" in small.stderr
