"""The Ray wiring with tiny services: one cluster for the whole file, killed from all sides.

The tests run in file order and share the cluster, because starting one takes seconds.
"""

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

from longreach.cluster.parts import Parts
from longreach.cluster.processes import (
    command_of,
    environment_of,
    process_alive,
    session_members,
)
from longreach.cluster.ray_head import RayHead
from longreach.core.config import Config
from longreach.core.errors import AlreadyServing, DeadlineExceeded, Unavailable

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ray_runtime = pytest.importorskip("longreach.cluster.ray_runtime")

HERE = Path(__file__).parent
TREE: dict[str, Any] = {
    "worker": {"count": 1},
    "store": {"capacity_bytes": 1 << 20},
    "gateway": {"heartbeat_timeout_s": 3.0},
}


def fakes() -> Parts:
    from fake_parts import FAKES  # beside this file; the actors import it by the same name

    return FAKES


def eventually(check: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError("did not happen in time")


@pytest.fixture(scope="module", autouse=True)
def _fakes_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a-state-directory-whose-path-is-too-long-for-a-unix-socket")


@pytest.fixture(scope="module")
def abandoned(state_dir: Path) -> dict[str, dict[str, Any]]:
    """Stats of the parts that a driver started before it was killed with -9."""
    env = os.environ | {"PYTHONPATH": str(HERE)}
    arguments = [str(HERE / "ray_driver.py"), str(state_dir), "1", json.dumps(TREE)]
    with subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        line = driver.stdout.readline()
        driver.kill()
    stats: dict[str, dict[str, Any]] = json.loads(line)
    return stats


@pytest.fixture(scope="module")
def runtime(state_dir: Path, abandoned: dict[str, Any]) -> Iterator[Any]:
    made = ray_runtime.RayRuntime(Config.model_validate(TREE), state_dir, fakes())
    made.start(epoch=2)
    yield made
    made.stop()


def worker_state(runtime: Any, timeout_s: float = 20.0) -> dict[str, Any]:
    """What worker-0 says of itself, as soon as it can be asked."""

    def ask() -> dict[str, Any] | None:
        channel = runtime.workers().get("worker-0")
        try:
            return dict(channel.call("state", timeout_s=1.0).header) if channel else None
        except (Unavailable, DeadlineExceeded):
            return None

    state: dict[str, Any] = eventually(ask, timeout_s)
    return state


def test_parts_outlive_a_killed_driver_and_are_adopted(
    abandoned: dict[str, dict[str, Any]], runtime: Any, state_dir: Path
) -> None:
    stats = runtime.stats()
    assert sorted(stats) == ["retriever-0", "store-0", "store-1", "worker-0"]
    assert {i: p["pid"] for i, p in stats.items()} == {i: p["pid"] for i, p in abandoned.items()}
    assert len({p["node_id"] for p in stats.values()}) == 1
    assert worker_state(runtime)["known"]["node"] == stats["store-0"]["node_id"] != ""
    assert worker_state(runtime)["epoch"] == 2  # the new gateway's, not the dead one's
    record = json.loads((state_dir / "cluster.json").read_text())
    assert record["parts"]["store-1"] == stats["store-1"]["pid"]
    assert all(process_alive(pid) for pid in record["pids"])
    # whoever reaches a Ray without a token can run code in it
    (gcs,) = [pid for pid in record["pids"] if command_of(pid)[0].endswith("gcs_server")]
    assert "RAY_AUTH_MODE=token" in environment_of(gcs)


def test_second_runtime_on_the_state_dir_is_refused(runtime: Any, state_dir: Path) -> None:
    second = ray_runtime.RayRuntime(Config.model_validate(TREE), state_dir, fakes())
    with pytest.raises(AlreadyServing, match="another serve process"):
        second.start(epoch=3)
    assert runtime.workers()


def test_sigterm_stays_with_the_process(runtime: Any) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("part_id", ["store-0", "retriever-0"])
def test_killed_part_comes_back_and_the_worker_learns_where(runtime: Any, part_id: str) -> None:
    known = "addresses" if part_id == "store-0" else "retrievers"
    before = runtime.stats()[part_id]
    os.kill(before["pid"], signal.SIGKILL)

    def moved() -> bool:
        now = worker_state(runtime)["known"][known].get(part_id)
        return now is not None and now != before["address"]

    eventually(moved)
    after = runtime.stats()[part_id]
    assert after["pid"] != before["pid"]
    assert after["restarts"] == 1
    assert worker_state(runtime)["known"][known][part_id] == after["address"]


def test_killed_worker_leaves_and_comes_back_with_current_addresses(runtime: Any) -> None:
    before = runtime.stats()["worker-0"]
    channel = runtime.workers()["worker-0"]
    os.kill(before["pid"], signal.SIGKILL)
    eventually(lambda: runtime.workers().get("worker-0") is not channel)
    eventually(lambda: "worker-0" in runtime.workers())
    state = worker_state(runtime)
    assert state["pid"] != before["pid"]
    assert state["epoch"] == 2
    # Ray rebuilt it with the arguments of its first start; the stores have moved since
    assert state["known"]["addresses"]["store-0"] == runtime.stats()["store-0"]["address"]


def test_worker_whose_engine_died_exits_and_comes_back(runtime: Any) -> None:
    pid = worker_state(runtime)["pid"]
    with pytest.raises((Unavailable, DeadlineExceeded)):
        runtime.workers()["worker-0"].call("die", timeout_s=5.0)
    eventually(lambda: worker_state(runtime)["pid"] != pid)


def test_hanging_worker_is_ended_and_comes_back(runtime: Any) -> None:
    pid = worker_state(runtime)["pid"]
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: worker_state(runtime)["pid"] != pid)
    eventually(lambda: not process_alive(pid))


def test_members_are_on_this_node(runtime: Any) -> None:
    node_ids = {part["node_id"] for part in runtime.stats().values()}
    assert {member.node_id for member in runtime.membership()} == node_ids
    assert sorted(runtime.stores()) == ["store-0", "store-1"]
    assert runtime.drain_store("store-1").find("store-1").draining


def test_labelled_nodes_give_the_zone(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kubernetes, ray_own = "topology.kubernetes.io/zone", "ray.io/availability-zone"
    nodes = [
        {"NodeID": "n1", "Labels": {kubernetes: "one-a", ray_own: "other"}},
        {"NodeID": "n2", "Labels": {ray_own: "one-b"}},
        {"NodeID": "n3", "Labels": {"ray.io/node-id": "n3"}},
        {"NodeID": "n4"},
    ]
    monkeypatch.setattr(ray_runtime.ray, "nodes", lambda: nodes)
    assert [runtime._zone_of(f"n{i}") for i in range(1, 6)] == ["one-a", "one-b", "", "", ""]


def test_stop_leaves_nothing(runtime: Any, state_dir: Path) -> None:
    record = json.loads((state_dir / "cluster.json").read_text())
    stats = runtime.stats()
    pids = [part["pid"] for part in stats.values()]
    arenas = [Path(stats[f"store-{i}"]["known"]["arena"]) for i in (0, 1)]
    assert all(arena.exists() for arena in arenas)
    os.kill(stats["store-1"]["pid"], signal.SIGKILL)  # cannot remove its own file
    runtime.stop()
    runtime.stop()
    assert not [pid for pid in (*pids, *record["pids"]) if process_alive(pid)]
    assert session_members(record["session_pid"]) == []
    assert not any(arena.exists() for arena in arenas)
    assert not Path(record["temp_dir"]).exists()
    assert not (state_dir / "cluster.json").exists()


def test_temp_dir_is_short_enough_for_unix_sockets(tmp_path: Path) -> None:
    config = Config().cluster
    assert RayHead(config, Path("/srv/lr"), 1).temp_dir == Path("/srv/lr/ray")
    deep = RayHead(config, tmp_path / ("x" * 60), 1).temp_dir
    assert len(str(deep)) <= 40
    assert deep != RayHead(config, tmp_path / ("y" * 60), 1).temp_dir
