from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longreach.cluster.local_runtime import LocalRuntime
from longreach.cluster.parts import Parts
from longreach.core.config import Config
from longreach.core.errors import ConfigError, FailedPrecondition, Unavailable, UnsupportedModel


@pytest.fixture(autouse=True)
def _fakes_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def config(**sections: Any) -> Config:
    small = {"worker": {"count": 2}, "store": {"capacity_bytes": 1 << 20}}
    return Config.model_validate(small | sections)


@pytest.fixture
def runtime() -> Iterator[LocalRuntime]:
    made = LocalRuntime(config(), fakes())
    made.start(epoch=7)
    yield made
    made.stop()


def fakes() -> Parts:
    from fake_parts import FAKES  # beside this file; the actors import it by the same name

    return FAKES


def eventually(check: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


def state(runtime: LocalRuntime, worker_id: str) -> dict[str, Any]:
    return runtime.workers()[worker_id].call("state", timeout_s=2.0).header


def test_workers_know_epoch_stores_and_retrievers(runtime: LocalRuntime) -> None:
    assert sorted(runtime.workers()) == ["worker-0", "worker-1"]
    seen = state(runtime, "worker-1")
    assert seen["epoch"] == 7
    assert sorted(seen["known"]["addresses"]) == ["store-0", "store-1"]
    assert sorted(seen["known"]["retrievers"]) == ["retriever-0"]


def test_streams_pass(runtime: LocalRuntime) -> None:
    with runtime.workers()["worker-0"].stream("count", {"n": 3}, idle_timeout_s=5.0) as stream:
        assert [reply.header["n"] for reply in stream] == [0, 1, 2]


def test_stats_of_every_part(runtime: LocalRuntime) -> None:
    stats = runtime.stats()
    assert sorted(stats) == ["retriever-0", "store-0", "store-1", "worker-0", "worker-1"]
    assert all(part["state"] == "live" for part in stats.values())
    assert {part["node_id"] for part in stats.values()} == {"local"}
    assert stats["store-1"]["part_id"] == "store-1"  # the part's own numbers are merged in


def test_failed_worker_leaves_and_comes_back(runtime: LocalRuntime) -> None:
    old = runtime.workers()["worker-0"]
    runtime.worker_failed("worker-0")
    with pytest.raises(Unavailable):
        old.call("state", timeout_s=2.0)
    assert eventually(lambda: runtime.workers().get("worker-0")) is not old
    assert state(runtime, "worker-0")["epoch"] == 7
    runtime.worker_failed("no-such-worker")  # ignored


def test_store_that_was_ended_is_rebuilt_and_workers_are_told(runtime: LocalRuntime) -> None:
    before = state(runtime, "worker-0")["known"]["addresses"]
    runtime.restart("store-0")  # its server is gone from now on
    runtime._supervisor.fail("store-0")

    def moved() -> bool:
        now = state(runtime, "worker-0")["known"]["addresses"]
        return sorted(now) == sorted(before) and now["store-0"] != before["store-0"]

    eventually(moved)
    assert state(runtime, "worker-1")["known"]["addresses"]["store-1"] == before["store-1"]
    assert runtime.stats()["store-0"]["restarts"] == 1


def test_silent_part_is_ended_and_rebuilt() -> None:
    runtime = LocalRuntime(config(gateway={"heartbeat_timeout_s": 0.5}), fakes())
    runtime.start(epoch=1)
    try:
        service: Any = runtime.service("worker-0")
        service.healthy = False
        eventually(lambda: runtime._services.get("worker-0") not in (None, service))
        eventually(lambda: "worker-0" in runtime.workers())
        assert state(runtime, "worker-0")["epoch"] == 1
    finally:
        runtime.stop()


def test_worker_whose_engine_died_is_rebuilt(runtime: LocalRuntime) -> None:
    service = runtime.service("worker-0")
    runtime.workers()["worker-0"].call("die", timeout_s=5.0)
    eventually(lambda: runtime._services.get("worker-0") not in (None, service))
    eventually(lambda: "worker-0" in runtime.workers())
    assert state(runtime, "worker-0")["epoch"] == 7


def test_stop_removes_the_arenas() -> None:
    runtime = LocalRuntime(config(), fakes())
    runtime.start(epoch=1)
    arenas = [Path(runtime.stats()[f"store-{i}"]["known"]["arena"]) for i in (0, 1)]
    assert all(arena.exists() for arena in arenas)
    runtime.stop()
    assert not any(arena.exists() for arena in arenas)


def test_part_that_cannot_be_built_fails_the_start_with_its_own_error() -> None:
    runtime = LocalRuntime(config(model={"name": "unsupported"}), fakes())
    with pytest.raises(UnsupportedModel, match="mamba"):
        runtime.start(epoch=1)
    assert runtime.workers() == {}


def test_starts_once_and_stops_twice(runtime: LocalRuntime) -> None:
    with pytest.raises(FailedPrecondition):
        runtime.start(epoch=8)
    runtime.stop()
    runtime.stop()
    assert runtime.workers() == {}


def test_unknown_builder_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no_such_module"):
        LocalRuntime(config(), dataclasses.replace(fakes(), store="no_such_module:build")).start(
            epoch=1
        )


def test_never_imports_ray() -> None:
    code = (
        "import sys; import longreach.cluster.local_runtime; "
        "assert not [m for m in sys.modules if m == 'ray' or m.startswith('ray.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
