"""kill -9 in the middle of a batch: it ends, every row once, with the undisturbed run's tokens."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from longreach.cluster.processes import process_alive
from longreach.cluster.proto import jobs_pb2
from longreach.core.config import Config
from longreach.core.errors import NotFound, Unavailable
from longreach.workers.prompt import PromptBuilder

from .serving import Batch, Serve, flip, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WORDS = (900, 1500)
N_ROWS = 4
N_TOKENS = 96
PAGE_TOKENS = 64


@pytest.fixture(scope="module")
def local(new_serve: Callable[..., Serve]) -> Serve:
    return new_serve("inprocess")


@pytest.fixture(scope="module")
def cluster(new_serve: Callable[..., Serve]) -> Iterator[Serve]:
    made = new_serve("ray")
    yield made
    if made.process is not None:
        made.stop()


both_wirings = pytest.mark.parametrize(
    "wiring", ["local", pytest.param("cluster", marks=pytest.mark.ray)]
)


def decoding(update: jobs_pb2.JobUpdate) -> bool:
    """Every row has made some tokens and none is done."""
    return len(update.active) == N_ROWS and all(row.decoded > 16 for row in update.active)


def prefilling(update: jobs_pb2.JobUpdate) -> bool:
    """A context is half computed."""
    return any(400 < row.prefilled < row.total - 400 for row in update.active)


def struck(
    serve: Serve,
    rows: list[dict[str, Any]],
    reached: Callable[[jobs_pb2.JobUpdate], bool],
    strike: Callable[[], None],
) -> Batch:
    """What a batch gives into the middle of which `strike` falls."""
    job_id = serve.submit(rows)
    serve.updates_until(job_id, reached)
    strike()
    return serve.finish(job_id)


def assert_undisturbed(batch: Batch, rows: list[dict[str, Any]], inprocess: Serve) -> None:
    assert Counter(line["custom_id"] for line in batch.lines) == Counter(
        row["custom_id"] for row in rows
    )
    assert batch.job.rows.done == len(rows)
    assert batch.job.decoded_tokens == sum(row["max_tokens"] for row in rows)
    assert batch.answers == inprocess.run(rows).answers


def kill_part(serve: Serve, *names: str) -> Callable[[], None]:
    pids = [int(serve.part(name)["pid"]) for name in names]

    def strike() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    return strike


@both_wirings
def test_gateway_killed(request: pytest.FixtureRequest, wiring: str, inprocess: Serve) -> None:
    serve: Serve = request.getfixturevalue(wiring)
    rows = rows_of(11 if wiring == "local" else 12, N_ROWS, N_TOKENS, WORDS)
    pids = [int(part.numbers["pid"]) for part in serve.client.stats().parts]
    epoch = serve.client.stats().epoch
    job_id = serve.submit(rows)
    seen: list[jobs_pb2.JobUpdate] = []
    watcher = threading.Thread(target=lambda: seen.extend(serve.client.watch(job_id)), daemon=True)
    watcher.start()
    serve.updates_until(job_id, decoding)
    serve.kill()
    if wiring == "cluster":
        assert all(process_alive(pid) for pid in pids)  # the gateway is not their parent
    serve.start("--port", serve.address.rpartition(":")[2])
    batch = serve.finish(job_id)
    assert_undisturbed(batch, rows, inprocess)
    assert serve.client.stats().epoch == epoch + 1
    # answers went on from the tokens that had reached the journal; prompts came from the stores
    # where those live on
    assert batch.total("tokens_replayed") > 0
    if wiring == "cluster":
        assert [int(part.numbers["pid"]) for part in serve.client.stats().parts] == pids
        assert batch.total("pages_recomputed") == 0
        assert batch.total("tokens_prefilled") < N_ROWS * 2 * PAGE_TOKENS
    else:
        n_pages = [n // PAGE_TOKENS for n in (s["tokens_prompt"] for s in batch.stats.values())]
        # of rows with a token in the journal; those that share a context compute it once
        assert 0 < batch.total("pages_recomputed") <= sum(n_pages)
    # a client that watched from before lived through it
    watcher.join(timeout=20)
    assert seen[-1].job.state == jobs_pb2.JOB_STATE_COMPLETED


@pytest.mark.ray
@pytest.mark.parametrize(("seed", "reached"), [(13, prefilling), (14, decoding)])
def test_worker_killed(cluster: Serve, inprocess: Serve, seed: int, reached: Any) -> None:
    rows = rows_of(seed, N_ROWS, N_TOKENS, WORDS)
    restarts = cluster.part("worker-0")["restarts"]
    batch = struck(cluster, rows, reached, kill_part(cluster, "worker-0"))
    assert_undisturbed(batch, rows, inprocess)
    assert cluster.part("worker-0")["restarts"] == restarts + 1
    # what had reached the stores was not computed again
    total = batch.total("tokens_prompt")
    if reached is decoding:
        assert batch.total("tokens_reused") > total - N_ROWS * 2 * PAGE_TOKENS
        assert batch.total("tokens_replayed") > 4 * N_ROWS
    assert batch.total("tokens_reused") > 400
    # what had not, was: at most the pages under way when it died
    assert batch.total("pages_recomputed") <= 2 * 8


@pytest.mark.ray
@pytest.mark.parametrize(("seed", "reached"), [(15, prefilling), (16, decoding)])
def test_store_killed(cluster: Serve, inprocess: Serve, seed: int, reached: Any) -> None:
    rows = rows_of(seed, N_ROWS, N_TOKENS, WORDS)
    restarts = cluster.part("store-1")["restarts"]
    batch = struck(cluster, rows, reached, kill_part(cluster, "store-1"))
    assert_undisturbed(batch, rows, inprocess)
    assert batch.total("pages_recomputed") == batch.total("restarts") == 0
    deadline = time.monotonic() + 30
    while cluster.part("worker-0")["store_stores_live"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert cluster.part("store-1")["restarts"] == restarts + 1
    # the pages are still there for a later question, from the store that lived
    (later,) = cluster.run([rows[0] | {"question": "And later?"}]).stats.values()
    assert later["tokens_reused"] > later["tokens_prompt"] - 2 * PAGE_TOKENS


@pytest.mark.ray
def test_worker_and_all_stores_killed_at_once(cluster: Serve, inprocess: Serve) -> None:
    rows = rows_of(17, N_ROWS, N_TOKENS, WORDS)
    strike = kill_part(cluster, "worker-0", "store-0", "store-1")
    batch = struck(cluster, rows, decoding, strike)
    assert_undisturbed(batch, rows, inprocess)
    # every context once, whichever of its rows came first
    contexts = sorted(s["tokens_prompt"] // PAGE_TOKENS for s in batch.stats.values())[::2]
    assert sum(contexts) - N_ROWS <= batch.total("pages_recomputed") <= sum(contexts) + N_ROWS


@pytest.mark.ray
def test_bits_flipped_in_a_store_while_rows_decode(
    cluster: Serve, inprocess: Serve, config: Config
) -> None:
    rows = rows_of(18, N_ROWS, N_TOKENS, WORDS)
    prompts = PromptBuilder.from_config(config)
    built = [prompts.build(row["context"], row["question"]) for row in rows[: len(WORDS)]]
    keys = [key for prompt in built for key in prompts.page_keys(prompt)]
    address = cluster.part_address("store-0")
    before = cluster.part("worker-0")
    flipped = []
    batch = struck(cluster, rows, decoding, lambda: flipped.append(flip(address, keys, 6, 3)))
    assert_undisturbed(batch, rows, inprocess)
    assert flipped[0] > len(keys) // 2  # some are found out and dropped meanwhile
    after = cluster.part("worker-0")
    assert after["store_corrupt_detected"] > before["store_corrupt_detected"]
    assert after["store_replica_reads"] > before["store_replica_reads"]
    assert batch.total("restarts") == 0


@both_wirings
def test_sigterm_drains(request: pytest.FixtureRequest, wiring: str, inprocess: Serve) -> None:
    """Rows that run are finished, the others wait in the journal; nothing is left running."""
    serve: Serve = request.getfixturevalue(wiring)
    rows = rows_of(19, 18, 40, (200,))
    job_id = serve.submit(rows)
    serve.updates_until(job_id, lambda update: update.decoded_tokens > 40)
    pids = [int(part.numbers["pid"]) for part in serve.client.stats().parts]
    assert serve.process is not None
    os.kill(serve.process.pid, signal.SIGTERM)
    assert refused_at_last(serve)
    assert serve.process.wait(60) == 0
    serve.process = None
    assert not [pid for pid in pids if pid and process_alive(pid)]
    assert not (serve.state_dir / "gateway.json").exists()
    assert not (serve.state_dir / "cluster.json").exists()
    if wiring == "local":  # the next start continues
        serve.start("--port", serve.address.rpartition(":")[2])
        done = serve.client.get(job_id).rows.done
        assert_undisturbed(serve.finish(job_id), rows, inprocess)
        assert 0 < done < len(rows)
        assert serve.stop() == 0


def refused_at_last(serve: Serve) -> bool:
    for _ in range(100):
        try:
            serve.client.get("job-none")
        except NotFound:
            time.sleep(0.05)
        except Unavailable:
            return True
        try:
            serve.submit(rows_of(20, 1, 1, (5,)))
        except Unavailable:  # Draining is one
            return True
    return False
