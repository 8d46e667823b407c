"""Fault shells on real stores and both transports: what is lost is late or gone, never a wrong page."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.core.errors import DeadlineExceeded, LongreachError, Unavailable
from longreach.core.fault_config import FaultsConfig
from longreach.kvstore.fault_plan import FaultPlan
from longreach.kvstore.faults import (
    DiskFaults,
    FaultCounts,
    FaultyService,
    flipped,
    with_faults,
)
from longreach.kvstore.link_faults import FaultyChannel, link_faults
from longreach.kvstore.page import checksums_to_wire, page_checksums
from longreach.kvstore.transport import Channel, Reply, Server, Unanswered, connect, serve

from .echo_service import EchoService
from .kv_helpers import GEOMETRY, RECIPE, ROOT, Stores, check, key_of, page_of, put, take

pytestmark = pytest.mark.timeout(60)
_names = itertools.count()


def plan_of(**values: Any) -> FaultPlan:
    return FaultPlan(FaultsConfig.model_validate(values))


class FaultyStores(Stores):
    """Stores behind fault shells."""

    def __init__(self, arena_dir: Path, scheme: str) -> None:
        super().__init__(arena_dir, scheme)
        self.shells: dict[str, FaultyService] = {}

    def start_faulty(self, name: str, n_slots: int = 64, **faults: Any) -> None:
        self.start(name, n_slots)
        self.servers[name].stop(0.5)
        shell = FaultyService(self.services[name], plan_of(**faults), name, store=True)
        mem = f"mem://faulty-store-{next(_names)}"
        address = mem if self.scheme == "mem" else "tcp://127.0.0.1:0"
        self.shells[name], self.servers[name] = shell, serve(shell, address, n_threads=4)

    def done(self, kind: str) -> int:
        """How often a fault struck, of all stores."""
        return sum(
            shell.counts.snapshot().get(f"faults_{kind}", 0) for shell in self.shells.values()
        )


@pytest.fixture(params=["mem", "tcp"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FaultyStores]:
    made = FaultyStores(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def echo() -> Iterator[Server]:
    server = serve(EchoService(), f"mem://faulty-echo-{next(_names)}")
    yield server
    server.stop(0.5)


def write_header(i: int) -> dict[str, Any]:
    return {
        "key": key_of(i),
        "parent": ROOT,
        "recipe": RECIPE,
        "checksums": checksums_to_wire(page_checksums(page_of(i), GEOMETRY)),
        "owner": "me",
        "lease_s": 60.0,
    }


def write(channel: Channel, i: int, timeout_s: float = 0.3) -> Reply:
    return channel.call("write", write_header(i), [page_of(i).data], timeout_s=timeout_s)


def test_a_dropped_request_has_no_effect_and_a_lost_answer_has(stores: FaultyStores) -> None:
    stores.start_faulty("dropping", drop=0.5)
    stores.start_faulty("losing", lose_answer=0.5)
    for name, kind in (("dropping", "dropped"), ("losing", "answers_lost")):
        channel = connect(stores.servers[name].address)
        answered = []
        for i in range(12):
            try:
                write(channel, i, 0.15)
                answered.append(i)
            except DeadlineExceeded:
                pass
        channel.close()
        held = stores.services[name].stats()["pages_held"]
        assert 0 < len(answered) < 12
        assert held == (len(answered) if name == "dropping" else 12)
        assert stores.done(kind) == 12 - len(answered)


def test_faults_come_in_the_same_order_for_the_same_seed(tmp_path: Path) -> None:
    def outcomes(seed: int) -> list[str]:
        stores = FaultyStores(tmp_path, "mem")
        faults = {"drop": 0.1, "lose_answer": 0.1, "corrupt": 0.3, "delay": "0.2:1ms"}
        stores.start_faulty("store", seed=seed, **faults)
        found = []
        for i in range(60):
            try:
                # without a deadline between them, so that a busy machine changes nothing
                reply = stores.shells["store"].handle(
                    "write", write_header(i % 20), [page_of(i % 20).data]
                )
                found.append(str(reply.header["duplicate"]))
            except (LongreachError, Unanswered) as exc:
                found.append(type(exc).__name__)
            found.append(str(stores.shells["store"].counts.snapshot()))
        stores.close()
        return found

    first = outcomes(3)
    assert {"Unanswered", "PageCorrupt", "True", "False"} <= set(first)
    assert outcomes(3) == first
    assert outcomes(4) != first


@pytest.mark.parametrize("force_wire", [False, True])
def test_every_damaged_page_is_found_out_and_counted(
    stores: FaultyStores, force_wire: bool
) -> None:
    for i in range(2):
        stores.start_faulty(f"store-{i}", seed=1, corrupt=0.05)
    client = stores.client(force_wire=force_wire, replicas=2)
    put(client, range(40))
    written = stores.done("corrupt_write")
    client.release("row")
    n_missing = 0
    for _ in range(10):
        handles = take(client, range(40))
        found = [i for i, handle in enumerate(handles) if handle is not None]
        for i in found:
            check(client, [handles[i]], i)
        gone = [i for i in range(40) if i not in found]
        n_missing += len(gone)
        put(client, gone)  # what a worker does: compute and store again
        client.release("row")
    sent, held, mapped = (stores.done(f"corrupt_{how}") for how in ("sent", "held", "mapped"))
    written = stores.done("corrupt_write")
    if force_wire:
        assert mapped == 0
        assert min(sent, held, written) > 0
    else:
        assert sent == held == written == 0
        assert mapped > 0
    assert client.stats()["corrupt_detected"] == sent + mapped + written
    by_stores = sum(stores.stat(name, "corrupt_detected") for name in stores.services)
    assert by_stores == held + mapped + written
    assert n_missing < held + mapped + sent, "replicas answered for most of them"
    client.close()


def test_a_stream_whose_answers_are_lost_falls_silent(stores: FaultyStores) -> None:
    stores.start_faulty("store", lose_answer=0.5)
    service = stores.services["store"]
    stores.servers["clean"] = serve(service, f"mem://clean-{next(_names)}")
    stores.services["clean"] = service
    put(stores.client(channels={"store": stores.servers["clean"].address}, replicas=1), range(40))
    channel = connect(stores.servers["store"].address)
    n_replies = []
    for i in range(8):
        header = {"keys": [key_of(k) for k in range(40)], "owner": f"r{i}", "lease_s": 60.0}
        n_replies.append(0)
        with channel.stream("read", header, idle_timeout_s=0.3) as stream:
            try:
                for k, reply in enumerate(stream):
                    # what comes, comes in order
                    assert (np.frombuffer(reply.buffers[0], np.uint8) == page_of(k)).all()
                    n_replies[-1] += 1
            except Unavailable:
                assert n_replies[-1] < 40
    assert 40 in n_replies
    assert min(n_replies) < 40
    channel.close()


def test_delays_are_as_long_as_the_plan_says(echo: Server) -> None:
    shell = FaultyService(EchoService(), plan_of(delay="0.5:80ms"), "echo", store=False)
    server = serve(shell, f"mem://late-{next(_names)}")
    channel = connect(server.address)
    times_s = []
    for _ in range(12):
        start_s = time.monotonic()
        channel.call("echo", {}, timeout_s=5.0)
        times_s.append(time.monotonic() - start_s)
    n_late = shell.counts.snapshot()["faults_delayed"]
    assert 0 < n_late < 12
    assert sum(t >= 0.08 for t in times_s) >= n_late
    assert sum(t < 0.08 for t in times_s) > 0
    server.stop(0.5)


def test_a_paused_service_stands_still_and_goes_on(echo: Server) -> None:
    shell = FaultyService(EchoService(), plan_of(pause="store:9s/1s"), "echo", store=False)
    server = serve(shell, f"mem://paused-{next(_names)}")
    channel = connect(server.address)
    channel.call("echo", {}, timeout_s=5.0)
    shell.pause(0.4)
    with pytest.raises(DeadlineExceeded):
        channel.call("echo", {}, timeout_s=0.1)
    channel.call("echo", {}, timeout_s=5.0)
    server.stop(0.5)


def test_a_cut_link_is_whole_again_and_ends_streams(echo: Server) -> None:
    now_s = [100.0]
    channel = FaultyChannel(
        connect(echo.address), FaultCounts(plan_of(cut="0.2:3s"), "a>b"), lambda: now_s[0]
    )
    stream, n_calls = None, 0
    while True:
        n_calls += 1
        try:
            channel.call("echo", {}, timeout_s=5.0)
        except Unavailable:
            break
        if stream is None:
            stream = channel.stream("count", {"n": 1000}, idle_timeout_s=5.0)
            next(iter(stream))
    assert stream is not None
    with pytest.raises(Unavailable):
        next(stream)
    now_s[0] += 2.0
    with pytest.raises(Unavailable, match=r"a>b is cut for 1\.0 s more"):
        channel.call("echo", {}, timeout_s=5.0)
    now_s[0] += 1.1
    n_whole = 0
    for _ in range(20):
        try:
            channel.call("echo", {}, timeout_s=5.0)
            n_whole += 1
        except Unavailable:
            now_s[0] += 3.1
    assert n_whole > 8
    channel.close()


def test_rows_live_through_cut_links_lost_and_late_messages(stores: FaultyStores) -> None:
    for i in range(3):
        stores.start_faulty(
            f"store-{i}", seed=2, drop=0.02, lose_answer=0.02, corrupt=0.02, delay="0.05:5ms"
        )
    plan = FaultsConfig.model_validate({"seed": 2, "cut": "0.02:100ms"})
    client = stores.client(wrap_channel=link_faults(plan, "worker-0"), timeout_s=0.2)
    n_read = 0
    for number in range(3):
        row = f"row-{number}"
        for i in range(24):
            try:
                put(client, [i], row)
            except LongreachError:
                continue
        handles = take(client, range(24), row)
        for i, handle in enumerate(handles):
            if handle is not None:
                check(client, [handle], i)
                n_read += 1
        client.release(row)
    assert n_read > 24
    client.close()


def test_a_disk_is_full_broken_or_slow_at_the_planned_rate() -> None:
    disk = DiskFaults(plan_of(disk_full=0.2, disk_error=0.1), "store-0")

    def errors(act: Any, n: int = 500) -> list[int]:
        found = []
        for slot in range(n):
            try:
                act(slot)
            except OSError as exc:
                found.append(exc.errno or 0)
        return found

    writes, reads = errors(disk.before_write), errors(disk.before_read)
    assert set(writes) == {errno.ENOSPC, errno.EIO}
    assert 60 < writes.count(errno.ENOSPC) < 130
    assert set(reads) == {errno.EIO}
    assert 25 < len(reads) < 80
    assert disk.counts.snapshot()["faults_disk_full"] == writes.count(errno.ENOSPC)
    slow = DiskFaults(plan_of(slow_disk="0.5:50ms"), "store-0")
    start_s = time.monotonic()
    assert not errors(slow.before_read, 8)
    assert time.monotonic() - start_s >= 0.05 * slow.counts.snapshot()["faults_disk_slow"] > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999999, 1.0])
def test_one_bit_is_flipped_in_a_copy(share: float) -> None:
    page = page_of(1)
    copy = np.frombuffer(flipped(page.data, share), np.uint8)
    assert np.unpackbits(copy ^ page).sum() == 1
    assert (page == page_of(1)).all()


def test_shells_are_only_there_if_the_plan_says_so_and_stats_tell(
    stores: FaultyStores, caplog: pytest.LogCaptureFixture
) -> None:
    service = EchoService()
    assert with_faults(service, FaultsConfig(seed=3), "store-0") is service
    assert link_faults(FaultsConfig(drop=0.1), "worker-0") is None
    assert not caplog.records
    stores.start_faulty("store-0", drop=0.1)
    assert any("FAULTS ARE INJECTED at store-0" in record.message for record in caplog.records)
    assert stores.call("store-0", "stats")["faults_injected"] == 0
    assert isinstance(with_faults(service, FaultsConfig(drop=0.1), "x"), FaultyService)


def test_a_service_gets_the_buffers_it_was_promised() -> None:
    seen: list[Sequence[memoryview]] = []

    class Keeper:
        def handle(
            self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
        ) -> Reply:
            seen.append(buffers)
            return Reply({})

    shell = FaultyService(Keeper(), plan_of(corrupt=0.999), "store-0", store=True)
    data = memoryview(page_of(2)).toreadonly()
    shell.handle("write", {}, [data, data])
    assert len(seen[0]) == 2
    assert seen[0][0] != data
    assert seen[0][1] == data
