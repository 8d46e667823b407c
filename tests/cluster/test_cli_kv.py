"""`longreach kv` and `longreach top` as they are typed, against a gateway over real stores."""

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
from typer.testing import CliRunner, Result

from longreach.cluster import cli_base
from longreach.cluster.cli import app
from longreach.cluster.proto import admin_pb2, jobs_pb2, kv_pb2
from longreach.cluster.render_kv import hit_rate, stat_table
from longreach.cluster.top_view import Frame, frame_dict, frame_view

from .fakes import GEOMETRY, PAGE_TOKENS
from .kv_cluster import DOCUMENT, N_PAGES, KvCluster, flip

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KvCluster]:
    with KvCluster(tmp_path / "first") as made:
        yield made


@pytest.fixture
def run(cluster: KvCluster) -> Callable[..., Result]:
    return lambda *args: invoke(cluster, *args)


def invoke(cluster: KvCluster, *args: Any) -> Result:
    arguments = [*(str(a) for a in args), "--state-dir", cluster.state_dir]
    # read once, at import, from whatever runs the tests
    cli_base.out.width = cli_base.PIPE_COLUMNS
    return CliRunner().invoke(app, arguments)


def assert_fails(result: Result, reason: str) -> None:
    assert result.exit_code == 1, result.output
    assert re.search(rf"^error: {reason}: [^\n]+\n\Z", result.stderr, re.MULTILINE), result.stderr


def test_a_document_goes_from_one_cluster_to_another(
    cluster: KvCluster, run: Callable[..., Result], tmp_path: Path
) -> None:
    context_id = cluster.read()
    snap = tmp_path / "snap"
    written = run("kv", "snapshot", context_id, snap)
    assert written.exit_code == 0, written.output
    assert written.stdout == f"{context_id}\n"
    assert f"{N_PAGES * PAGE_TOKENS} tokens, {N_PAGES} pages, " in written.stderr
    assert_fails(run("kv", "snapshot", context_id, snap), "ALREADY_EXISTS")

    with KvCluster(tmp_path / "second") as fresh:
        restored = invoke(fresh, "kv", "restore", snap)
        assert restored.exit_code == 0, restored.output
        assert restored.stdout == f"{context_id}\n"
        fresh.check_pages(fresh.keys())
        as_json = json.loads(invoke(fresh, "kv", "restore", snap, "--json").stdout)
        assert as_json["context_id"] == context_id
        assert as_json["n_pages"] == N_PAGES
        assert_fails(invoke(fresh, "kv", "restore", tmp_path / "absent"), "NOT_FOUND")
        (snap / "tokens.bin").write_bytes(b"")
        assert_fails(invoke(fresh, "kv", "restore", snap), "DATA_LOSS")


def test_a_path_is_the_callers(
    cluster: KvCluster, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.read()
    (tmp_path / "document.txt").write_text(DOCUMENT)
    monkeypatch.chdir(tmp_path)
    written = run("kv", "snapshot", "document.txt", "here", "--text-file", "--no-text", "--json")
    assert json.loads(written.stdout)["uri"] == str(tmp_path / "here")
    assert (tmp_path / "here" / "manifest.json").exists()
    assert not (tmp_path / "here" / "document").exists()


def test_stat_shows_stores_and_sums(cluster: KvCluster, run: Callable[..., Result]) -> None:
    cluster.read()
    shown = run("kv", "stat")
    assert shown.exit_code == 0
    for line, n in (("store-0 +live", 1), ("store-1 +live", 1), ("all +2 answer", 2)):
        row = rf"^ *{line} .* {n * N_PAGES} +0 "
        assert re.search(row, shown.stdout, re.MULTILINE), shown.stdout
    tree = json.loads(run("kv", "stat", "--json").stdout)
    assert tree["totals"]["pages_held"] == 2 * N_PAGES
    assert tree["page_bytes"] == GEOMETRY.page_nbytes
    cluster.runtime.lose_store("store-1")
    shown = run("kv", "stat")
    assert shown.exit_code == 0
    assert "no answer" in shown.stdout
    assert shown.stderr == "store-1: UNAVAILABLE: store store-1 is lost\n"
    (_, lost) = json.loads(run("kv", "stat", "--json").stdout)["stores"]
    assert (lost["state"], lost["numbers"]) == ("lost", {})


def test_stat_has_a_cell_for_every_number() -> None:
    numbers = {
        **{"arena_slots": 4, "arena_pages": 2, "disk_slots": 8, "disk_pages": 6, "pages_held": 8},
        **{"pages_pinned": 11, "leases": 12, "hits_arena": 1, "hits_disk": 1, "misses": 2},
        **{"evictions": 13, "repair_under_replicated": 14, "corrupt_arena": 15, "corrupt_disk": 16},
    }
    response = kv_pb2.KvStatResponse(page_bytes=1024, totals=numbers)
    response.stores.add(store_id="store-0", state="live", numbers=numbers)
    cells = [next(iter(column.cells)) for column in stat_table(response).columns]
    expected = ["store-0", "live", "2.0 KiB of 4.0 KiB", "6.0 KiB of 8.0 KiB", "8", "11", "12"]
    assert cells == [*expected, "50.0%", "13", "14", "15 + 16"]
    assert hit_rate({}) is None


def test_verify_exits_with_1_if_any_page_was_bad(
    cluster: KvCluster, run: Callable[..., Result]
) -> None:
    cluster.read()
    good = run("kv", "verify")
    assert good.exit_code == 0, good.output
    key = cluster.keys()[4]
    flip(cluster.stores["store-1"], key)
    bad = run("kv", "verify", "--store", "store-1")
    assert_fails(bad, "DATA_LOSS")
    assert f"bad page {key.hex()[:16]} in arena of store-1" in bad.stdout
    tree = json.loads(run("kv", "verify", "--json").stdout)
    assert [(s["checked"], s["bad"]) for s in tree["stores"]] == [(N_PAGES, 0), (N_PAGES - 1, 0)]
    assert_fails(run("kv", "verify", "--store", "store-7"), "NOT_FOUND")
    cluster.runtime.lose_store("store-0")
    assert_fails(run("kv", "verify"), "UNAVAILABLE")


def test_scrub(run: Callable[..., Result]) -> None:
    assert run("kv", "scrub", "--start").exit_code == 0
    tree = json.loads(run("kv", "scrub", "--json").stdout)
    assert [store["store_id"] for store in tree["stores"]] == ["store-0", "store-1"]
    assert {store["bad"] for store in tree["stores"]} == {0}


def test_drop(cluster: KvCluster, run: Callable[..., Result]) -> None:
    context_id = cluster.read()
    dropped = run("kv", "drop", context_id)
    assert dropped.stdout == f"store-0 dropped {N_PAGES} pages\nstore-1 dropped {N_PAGES} pages\n"
    cluster.read()
    tree = json.loads(run("kv", "drop", "--all", "--json").stdout)
    assert tree["n_dropped"] == {"store-0": N_PAGES, "store-1": N_PAGES}
    assert_fails(run("kv", "drop"), "INVALID_INPUT")
    assert_fails(run("kv", "drop", context_id, "--all"), "INVALID_INPUT")
    cluster.runtime.lose_store("store-0")
    assert_fails(run("kv", "drop", "--all"), "UNAVAILABLE")


def test_drain(cluster: KvCluster, run: Callable[..., Result]) -> None:
    status = {"epoch": 2, "to_move": 1, "under_replicated": 2, "pages_pushed": 4, "bytes_pushed": 5}
    store = cluster.stores["store-1"]
    store.answers["repair_status"] = {**status, "drained": False}
    asked = run("kv", "drain", "store-1")
    assert asked.stdout == "store-1 has 3 pages to move, 4 pushed\n"
    assert asked.exit_code == 0
    assert_fails(run("kv", "drain", "store-1", "--wait", "--timeout-s", "1"), "DEADLINE_EXCEEDED")
    store.answers["repair_status"] = {
        **status,
        "to_move": 0,
        "under_replicated": 0,
        "drained": True,
    }
    assert run("kv", "drain", "store-1", "--wait").stdout == "store-1 is drained, 4 pushed\n"
    tree = json.loads(run("kv", "drain", "store-1", "--json").stdout)
    assert tree["drained"] is True
    assert tree["bytes_pushed"] == 5


def test_no_gateway() -> None:
    for command in (("kv", "stat"), ("kv", "verify"), ("kv", "restore", "x"), ("top", "--once")):
        result = CliRunner().invoke(app, [*command, "--address", "127.0.0.1:1"])
        assert_fails(result, "UNAVAILABLE")


# --- top ------------------------------------------------------------------------------------------


def test_top_prints_one_frame(cluster: KvCluster, run: Callable[..., Result]) -> None:
    cluster.read()
    shown = run("top", "--once")
    assert shown.exit_code == 0, shown.output
    assert "serving for" in shown.stdout
    for name in ("worker-0", "store-0", "store-1"):
        assert re.search(rf"^ *{name} +live", shown.stdout, re.MULTILINE), shown.stdout
    cluster.stores["store-1"].awake.clear()
    shown = run("top", "--once")
    assert re.search(r"store-1 +live +no answer", shown.stdout), shown.stdout
    tree = json.loads(run("top", "--once", "--json").stdout)
    assert tree["gateway"]["draining"] is False
    assert tree["parts"]["worker-0"]["state"] == "live"
    assert tree["kv"]["stores"][0]["numbers"]["pages_held"] == N_PAGES
    assert tree["jobs"] == []


def test_top_shows_jobs_that_run(cluster: KvCluster, run: Callable[..., Result]) -> None:
    worker = cluster.runtime.services["worker-0"]
    worker.hold.clear()
    rows = [{"custom_id": f"{i}", "context": "a b", "question": "c"} for i in range(3)]
    batch = "\n".join(json.dumps(row) for row in rows).encode()
    job_id = cluster.client.submit(batch).job_id
    deadline = time.monotonic() + 10
    while len(worker.running) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    (job,) = json.loads(run("top", "--once", "--json").stdout)["jobs"]
    assert job["job_id"] == job_id
    assert (job["state"], job["rows_total"], job["rows_running"]) == ("running", 3, 3)
    shown = run("top", "--once")
    assert re.search(rf"{job_id} +running +0/3, 3 running", shown.stdout), shown.stdout
    worker.hold.set()


def frame(taken_s: float, written: float) -> Frame:
    stats = admin_pb2.StatsResponse(version="1", model="tiny", gateway={"rows_running": 2})
    numbers = {"rows": 2, "bank_slots": 8, "bank_slots_used": 4, "store_bytes_written": written}
    stats.parts.add(part="worker-0", numbers=numbers, labels={"kind": "worker", "state": "live"})
    updates = [
        jobs_pb2.JobUpdate(
            job=jobs_pb2.Job(job_id=f"job-{i}", state=jobs_pb2.JOB_STATE_RUNNING),
            prefill_tokens_per_s=100.0,
            decode_tokens_per_s=2.5,
            eta_s=75.0 if i else -1.0,
        )
        for i in range(2)
    ]
    return Frame(taken_s, stats, kv_pb2.KvStatResponse(page_bytes=1024), updates, 12)


def text_of(view: Any) -> str:
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_rates_are_of_the_time_between_two_frames() -> None:
    first, second = frame(10.0, 4096.0), frame(12.0, 8192.0)
    assert "4.0 KiB" in text_of(frame_view(first, None))
    assert "2.0 KiB/s" in text_of(frame_view(second, first))
    # a worker that came back counts from zero
    assert "0 B/s" in text_of(frame_view(frame(14.0, 0.0), second))
    shown = text_of(frame_view(first, None))
    assert "prefill 200 tokens/s, decode 5.0" in shown
    assert "1m 15s" in shown
    assert "and 10 more" in shown
    tree = frame_dict(first)
    assert tree["gateway"]["prefill_tokens_per_s"] == 200
    assert [job["eta_s"] for job in tree["jobs"]] == [None, 75.0]


def top_process(cluster: KvCluster, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longreach", "top", "--interval-s", "0.2", *options]
    return subprocess.Popen(
        [*command, "--state-dir", cluster.state_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_top_goes_on_without_the_gateway_and_leaves_at_ctrl_c(tmp_path: Path) -> None:
    cluster = KvCluster(tmp_path / "first")
    process = top_process(cluster, "--json")
    try:
        assert process.stdout is not None
        assert "gateway" in json.loads(process.stdout.readline())
        cluster.close()
        for line in process.stdout:
            if "error" in json.loads(line):
                break
        assert json.loads(line)["error"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
        with KvCluster(tmp_path / "first"):  # another port, the same state directory
            for line in process.stdout:
                if "gateway" in json.loads(line):
                    break
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            assert process.wait(10) in (0, 130)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait(10)


def test_top_on_a_terminal_draws_and_leaves_at_ctrl_c(cluster: KvCluster) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "longreach", "top", "--state-dir", cluster.state_dir]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    try:
        seen = b""
        while b"store-1" not in seen:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (0, 130)
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
