"""Strikes on real processes and on the parts of the in-process wiring; the record that they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longreach.cluster.chaos import RECORD_NAME, Chaos
from longreach.cluster.cli import app
from longreach.cluster.local_runtime import LocalRuntime
from longreach.cluster.parts import Parts, build_store, fingerprint
from longreach.cluster.processes import process_alive
from longreach.core.config import Config
from longreach.core.fault_config import FaultsConfig
from longreach.kvstore.fault_plan import FaultPlan
from longreach.kvstore.faults import FaultyService
from longreach.kvstore.page import PageGeometry
from longreach.kvstore.store_service import StoreService

pytestmark = pytest.mark.timeout(60)


class Processes:
    """A runtime whose parts are sleeping processes; a killed one stays dead until it is restarted."""

    def __init__(self, *part_ids: str) -> None:
        self.children = {part_id: self._start() for part_id in part_ids}
        self.pids = {part_id: child.pid for part_id, child in self.children.items()}

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def pid(self, part_id: str) -> int | None:
        return self.pids[part_id]

    def close(self) -> None:
        for child in self.children.values():
            child.kill()
            child.wait()


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes("store-0", "store-1", "worker-0")
    yield made
    made.close()


def chaos_on(runtime: Any, part_ids: list[str], state_dir: Path, **faults: Any) -> Chaos:
    config = FaultsConfig.model_validate(faults)
    return Chaos(config, runtime, part_ids, state_dir / RECORD_NAME)


def record_of(state_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state_dir / RECORD_NAME).read_text().splitlines()]


def eventually(check: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if found := check():
            return found
        time.sleep(0.01)
    raise AssertionError("did not happen in time")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_part_is_killed_and_one_that_is_gone_is_skipped(
    processes: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chaos = chaos_on(processes, sorted(processes.pids), tmp_path, kill="worker:500ms")
    chaos.start()
    eventually(lambda: not process_alive(processes.pids["worker-0"]))
    eventually(lambda: chaos.counts["skip"])
    chaos.stop()
    assert chaos.counts["kill"] >= 1
    assert processes.children["worker-0"].wait(5) == -9
    assert all(process_alive(processes.pids[store]) for store in ("store-0", "store-1"))
    first, *_, last = record_of(tmp_path)
    assert (first["kind"], first["part"], first["done"]) == ("kill", "worker-0", True)
    assert first["pid"] == processes.pids["worker-0"]
    assert first["at_s"] >= 0.2
    assert not last["done"]
    said = [record.getMessage() for record in caplog.records]
    assert any("CHAOS" in line for line in said)
    assert any("chaos kill part=worker-0" in line for line in said)


def test_a_part_is_stopped_and_goes_on(processes: Processes, tmp_path: Path) -> None:
    pid = processes.pids["store-1"]
    chaos = chaos_on(processes, sorted(processes.pids), tmp_path, pause="store-1:1s/300ms")
    chaos.start()
    eventually(lambda: state_of(pid) == "T")
    stopped_s = time.monotonic()
    eventually(lambda: state_of(pid) != "T")
    assert 0.1 < time.monotonic() - stopped_s < 3
    chaos.stop()
    assert chaos.counts["pause"] == 1
    assert process_alive(pid)


def test_what_is_paused_goes_on_when_chaos_ends(processes: Processes, tmp_path: Path) -> None:
    pid = processes.pids["worker-0"]
    chaos = chaos_on(processes, sorted(processes.pids), tmp_path, pause="worker:500ms/499ms")
    chaos.start()
    eventually(lambda: state_of(pid) == "T")
    chaos.stop()
    eventually(lambda: state_of(pid) != "T")


def test_the_gateways_own_process_is_never_struck(tmp_path: Path) -> None:
    class Own:
        def pid(self, part_id: str) -> int:
            return os.getpid()

    chaos = chaos_on(Own(), ["worker-0"], tmp_path, kill="worker:50ms", pause="worker:60ms/9ms")
    chaos.start()
    eventually(lambda: chaos.counts["skip"] >= 3)
    chaos.stop()
    assert chaos.counts["kill"] == chaos.counts["pause"] == 0


def test_trouble_in_the_wiring_does_not_end_it(tmp_path: Path) -> None:
    class Broken:
        def pid(self, part_id: str) -> None:
            return None

        def restart(self, part_id: str) -> None:
            raise RuntimeError("no")

    chaos = chaos_on(Broken(), ["worker-0"], tmp_path, kill="worker:50ms")
    chaos.start()
    eventually(lambda: chaos.counts["skip"] >= 2)
    chaos.stop()


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalRuntime]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from fake_parts import FAKES  # beside this file

    parts: Parts = FAKES
    config = Config.model_validate({"store": {"capacity_bytes": 1 << 20}})
    made = LocalRuntime(config, parts)
    made.start(epoch=1)
    yield made
    made.stop()


def test_parts_of_this_process_are_ended_and_come_back(local: LocalRuntime, tmp_path: Path) -> None:
    before = local.stats()
    chaos = chaos_on(local, sorted(before), tmp_path, kill=["store-1:100ms", "worker:170ms"])
    chaos.start()

    def both_back() -> bool:
        now = local.stats()
        return all(now[part]["restarts"] > 0 for part in ("store-1", "worker-0"))

    eventually(both_back)
    chaos.stop()
    eventually(lambda: all(part["state"] == "live" for part in local.stats().values()))
    after = local.stats()
    assert after["store-0"]["restarts"] == 0
    assert after["store-1"]["address"] != before["store-1"]["address"]
    assert chaos.counts["kill"] >= 2
    assert {line["pid"] for line in record_of(tmp_path)} == {None}


def test_parts_of_this_process_are_paused_through_their_shell(
    local: LocalRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = FaultsConfig.model_validate({"pause": "store-0:200ms/100ms"})
    shell = FaultyService(local.service("store-1"), FaultPlan(faults), "store-0", store=True)
    monkeypatch.setitem(local._services, "store-0", shell)
    paused: list[float] = []
    monkeypatch.setattr(shell, "pause", paused.append)
    chaos = chaos_on(local, ["store-0"], tmp_path, pause="store-0:200ms/100ms")
    chaos.start()
    eventually(lambda: len(paused) >= 2)
    chaos.stop()
    assert set(paused) == {0.1}


GEOMETRY = PageGeometry(n_layers=1, n_kv_heads=1, page_tokens=8, head_dim=8)


def store_config(tmp_path: Path, **faults: Any) -> Config:
    tiers = {"disk_dir": str(tmp_path / "disk"), "disk_bytes": 1 << 20}
    store = {"arena_dir": str(tmp_path), "capacity_bytes": 1 << 16, **tiers}
    return Config.model_validate({"store": store, "faults": faults})


def test_stores_are_built_with_the_faults_of_the_configuration(tmp_path: Path) -> None:
    calm = build_store(store_config(tmp_path), "store-0", "node", GEOMETRY.to_dict())
    assert isinstance(calm, StoreService)
    calm.close()
    config = store_config(tmp_path, drop=0.1, disk_full=0.9, corrupt=0.1, seed=3)
    made: Any = build_store(config, "store-1", "node", GEOMETRY.to_dict())
    assert isinstance(made, FaultyService)
    # the disk tier is there, and its hook makes it full
    disk = made.service._core.disk
    assert disk.n_slots > 0
    assert {disk.reserve(slot) for slot in range(20)} == {True, False}
    stats = made.handle("stats", {}, []).header
    assert stats["disk_slots"] == disk.n_slots
    assert 10 < stats["faults_disk_full"] <= 20
    assert stats["faults_injected"] == stats["faults_disk_full"]
    made.close()


def test_parts_with_another_plan_are_not_adopted(tmp_path: Path) -> None:
    calm, faulty = store_config(tmp_path), store_config(tmp_path, drop=0.1)
    assert fingerprint(calm, Parts()) != fingerprint(faulty, Parts())


@pytest.mark.slow
def test_serve_strikes_by_its_plan_and_says_so(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    child = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).parent / "serve_child.py"),
            *(str(state_dir), "0.05", "faults.kill=worker:300ms"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    record = state_dir / RECORD_NAME
    try:
        eventually(record.exists, 40)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=40)[1]
    finally:
        child.kill()
    assert child.returncode == 0
    assert "CHAOS" in said
    assert "chaos kill part=worker-0" in said
    assert record_of(state_dir)[0]["done"]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("kill=gateway:20s", "the gateway is what strikes"),
        ("explode=1", "faults.explode: unknown key"),
        ("disk_full=0.1", "need store.disk_dir"),
        ("nothing", "is not kind=value"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_of_error(plan: str, said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--wiring", "inprocess", "--chaos", plan])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: CONFIG_ERROR: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
