from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.cluster.local_runtime import LocalRuntime
from longreach.cluster.parts import Parts
from longreach.core.config import Config
from longreach.core.errors import (
    ConfigError,
    FailedPrecondition,
    NotFound,
    Unavailable,
    UnsupportedModel,
)
from longreach.core.page_key import ROOT_KEY, PageKey, RecipeFingerprint
from longreach.kvstore.page import PageGeometry
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.serving import builder


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


def test_members_are_the_live_stores_with_rising_epochs(runtime: LocalRuntime) -> None:
    before = runtime.membership()
    assert [member.store_id for member in before] == ["store-0", "store-1"]
    assert before.epoch > 7 << 32  # above all epochs of the gateways before this one
    assert sorted(runtime.stores()) == ["store-0", "store-1"]
    runtime.restart("store-0")
    runtime._supervisor.fail("store-0")
    after = eventually(lambda: m if (m := runtime.membership()).epoch > before.epoch else None)
    assert after.addresses()["store-0"] != before.addresses()["store-0"]
    assert after.find("store-1") == before.find("store-1")


def test_a_drain_reaches_workers_and_stores(runtime: LocalRuntime) -> None:
    with pytest.raises(NotFound, match="store-7"):
        runtime.drain_store("store-7")
    drained = runtime.drain_store("store-1")
    assert runtime.drain_store("store-1") == drained == runtime.membership()
    with pytest.raises(FailedPrecondition, match="last"):
        runtime.drain_store("store-0")

    def told(part_id: str) -> bool:
        service: Any = runtime.service(part_id)
        return service.known.get("membership") == drained.to_wire()

    eventually(lambda: all(map(told, ("worker-0", "worker-1", "store-0", "store-1"))))


def test_stores_repair_each_other_after_a_loss() -> None:
    """The stores are real, what tells them of each other is the supervisor."""
    small = {"capacity_bytes": 1 << 20, "count": 3, "repair_delay_s": 0.2, "zone": "here"}
    parts = dataclasses.replace(fakes(), store=Parts().store)
    runtime = LocalRuntime(config(store=small), parts)
    runtime.start(epoch=1)
    geometry = PageGeometry.from_dict(builder(parts.geometry)(config()))
    key = PageKey(b"k" * 32)
    try:
        assert {(m.zone, m.weight) for m in runtime.membership()} == {("here", 1 << 20)}
        client = PageClient(
            runtime.membership(), geometry, RecipeFingerprint(b"r" * 32), 2, 60.0, 20.0, "x", "w"
        )
        page = np.arange(geometry.page_nbytes, dtype=np.uint8)
        client.store(key, ROOT_KEY, page, "row").result(20)
        client.close()

        def holders() -> list[str]:
            asked = runtime.stores().items()
            held = {i: c.call("lookup", {"keys": [key]}, timeout_s=5.0).header for i, c in asked}
            return sorted(store_id for store_id, answer in held.items() if answer["held"][0])

        first, other = before = holders()
        runtime.restart(first)  # it comes back empty
        runtime._supervisor.fail(first)
        eventually(lambda: len(runtime.stores()) == 3 and holders() == before, 30.0)
        status = runtime.stores()[other].call("repair_status", timeout_s=5.0).header
        assert status["pages_pushed"] == 1
        assert status["time_to_first_repair_s"] is not None
        runtime.drain_store(other)
        eventually(lambda: other not in holders() and len(holders()) == 2, 30.0)
        status = runtime.stores()[other].call("repair_status", timeout_s=5.0).header
        assert status["drained"]
    finally:
        runtime.stop()
