"""The operators' calls over the in-process wiring: real stores, real membership, real repair."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.cluster.local_runtime import LocalRuntime
from longreach.cluster.parts import Parts
from longreach.cluster.tier_metrics import _BYTES, _METRICS, TIERS
from longreach.core.errors import FailedPrecondition, NotFound
from longreach.core.page_key import ROOT_KEY
from longreach.kvstore.page_client import PageClient

from .fake_parts import FAKES
from .fakes import GEOMETRY, PAGE_TOKENS, make_config
from .kv_cluster import DOCUMENT, N_PAGES, RECIPE, RecipePrompts, page_of

pytestmark = pytest.mark.timeout(90)
NAMES = [f"store-{i}" for i in range(3)]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalRuntime:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # where `fake_parts` is
    config = make_config(
        tmp_path / "state",
        *("store.count=3", "store.replicas=2", "store.capacity_bytes=1048576"),
        *("store.timeout_s=3", f"store.arena_dir={tmp_path}"),
    )
    parts = Parts(retriever=FAKES.retriever, worker=FAKES.worker, geometry=FAKES.geometry)
    return LocalRuntime(config, parts)


@pytest.fixture
def client(runtime: LocalRuntime) -> Iterator[Client]:
    config = runtime._config
    prompts = RecipePrompts(RECIPE)
    gateway = Gateway(config, runtime, prompts=prompts, geometry=GEOMETRY, recipe=RECIPE)
    with Client(gateway.start(), timeout_s=15.0) as made:
        yield made
    gateway.stop()


def fill(runtime: LocalRuntime) -> list[bytes]:
    """The document's pages, stored by a client as a worker has it."""
    prompts = RecipePrompts(RECIPE)
    keys = prompts.page_keys(prompts.build(DOCUMENT, ""))[:N_PAGES]
    client = PageClient(
        runtime.membership(),
        GEOMETRY,
        RECIPE.fingerprint(),
        replicas=2,
        lease_s=30.0,
        timeout_s=5.0,
        node_id="local",
        owner="test",
    )
    try:
        parents = [ROOT_KEY, *keys]
        for key, parent in zip(keys, parents, strict=False):
            client.store(key, parent, page_of(key), "row").result(10)
    finally:
        client.close()
    return [bytes(key) for key in keys]


def holders(runtime: LocalRuntime, keys: list[bytes], names: list[str]) -> list[int]:
    held = [
        runtime.stores()[name].call("lookup", {"keys": keys}, timeout_s=5.0).header["held"]
        for name in names
    ]
    return [sum(column) for column in zip(*held, strict=True)]


def test_a_drained_store_has_nothing_that_the_others_lack(
    client: Client, runtime: LocalRuntime
) -> None:
    keys = fill(runtime)
    updates = list(client.kv.drain("store-1", wait=True, timeout_s=40.0))
    assert updates[-1].drained
    assert updates[-1].to_move == 0
    assert holders(runtime, keys, ["store-0", "store-2"]) == [2] * N_PAGES
    assert [store.state for store in client.kv.stat().stores] == ["live", "draining", "live"]
    assert list(client.kv.drain("store-1"))[-1].drained  # again is nothing new
    with pytest.raises(NotFound):
        list(client.kv.drain("store-7"))
    list(client.kv.drain("store-0"))
    with pytest.raises(FailedPrecondition):
        list(client.kv.drain("store-2"))


def test_a_snapshot_is_restored_over_real_membership(
    client: Client, runtime: LocalRuntime, tmp_path: Path
) -> None:
    keys = fill(runtime)
    context_id = client.upload_context(DOCUMENT.encode()).context_id
    done = list(client.kv.snapshot(context_id, str(tmp_path / "snap")))[-1].done
    assert done.n_tokens == N_PAGES * PAGE_TOKENS
    client.kv.drop(everything=True)
    assert sum(client.kv.stat().stores[i].numbers["pages_held"] for i in range(3)) == 0
    list(client.kv.restore(str(tmp_path / "snap")))
    assert holders(runtime, keys, NAMES) == [2] * N_PAGES
    # where placement wants them: nothing is left for the repair to move
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        totals = client.kv.stat().totals
        if not totals["pages_pinned"]:
            break
        time.sleep(0.1)
    assert totals["repair_under_replicated"] == totals["pages_pinned"] == 0
    assert totals["repair_pages_pushed"] == 0
    updates = list(client.kv.verify())
    assert [(s.bad, s.error) for s in updates[-1].stores] == [(0, "")] * 3
    assert sum(s.checked for s in updates[-1].stores) == 2 * N_PAGES


def test_real_stores_give_every_number_of_the_metrics(
    client: Client, runtime: LocalRuntime
) -> None:
    """A renamed statistic would leave a metric empty without any error."""
    named = {stat.format(tier=tier) for _, _, stat in (*_METRICS, *_BYTES) for tier in TIERS}
    stats = client.kv.stat().stores[0].numbers
    assert named - set(stats) == {"repair_time_to_whole_s"}  # told once there was a loss


def test_a_store_that_was_ended_is_named_until_it_is_back(
    client: Client, runtime: LocalRuntime
) -> None:
    fill(runtime)
    runtime.restart("store-2")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        response = client.kv.stat()
        assert [store.store_id for store in response.stores] == NAMES
        if not any(store.error for store in response.stores):
            break
        time.sleep(0.05)
    assert {store.state for store in response.stores} == {"live"}
