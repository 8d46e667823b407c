"""The worker behind the transport: one contract for whoever routes rows to it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.core.errors import (
    Cancelled,
    Draining,
    EmptyContext,
    InvalidInput,
    SamplingError,
    StaleEpoch,
)
from longreach.kvstore.transport import Channel, Reply, connect, serve
from longreach.workers.decode_service import DecodeService

from .tiny import hf_greedy, make_tiny, prompts_of, store_pool, tiny_config

N_NEW = 10
IDLE_S = 30.0
_names = itertools.count()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("service-llama"))


@pytest.fixture(scope="module")
def service(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecodeService]:
    config = tiny_config(llama, "worker.prefill_chunk_tokens=64")
    with store_pool(config, tmp_path_factory.mktemp("arena")) as pool:
        service = DecodeService(config, pool.addresses, {}, "worker-0", "node-0")
        yield service
        service.close()


@pytest.fixture(params=["mem", "tcp"])
def channel(service: DecodeService, request: pytest.FixtureRequest) -> Iterator[Channel]:
    name = f"mem://decode-{next(_names)}"
    server = serve(service, name if request.param == "mem" else "tcp://127.0.0.1:0")
    channel = connect(server.address)
    yield channel
    channel.close()
    server.stop()


def ask(
    channel: Channel, prompt: np.ndarray, forced: list[int] | None = None, **header: Any
) -> Any:
    full = {
        "row_id": "row",
        "epoch": 1,
        "n_context_tokens": len(prompt),
        "sampling": {"max_tokens": N_NEW},
        **header,
    }
    tokens = np.asarray(forced or [], dtype="<u4")
    buffers = [prompt.astype("<u4").tobytes(), tokens.tobytes()]
    return channel.stream("generate", full, buffers, idle_timeout_s=IDLE_S)


def wait_until_idle(channel: Channel) -> None:
    for _ in range(200):
        if channel.call("stats", timeout_s=5).header["rows"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError("rows are still running after 10 s")


def test_a_row_streams_progress_tokens_and_its_end(channel: Channel, llama: Path) -> None:
    (prompt,) = prompts_of(200)
    replies: list[Reply] = list(ask(channel, prompt))
    events = [r.header["event"] for r in replies]
    assert events[0] == "progress"
    assert events[-1] == "done"
    tokens = [r.header for r in replies if r.header["event"] == "token"]
    assert [t["index"] for t in tokens] == list(range(N_NEW))
    done = replies[-1].header
    assert [t["token_id"] for t in tokens] == done["token_ids"]
    assert done["token_ids"] == hf_greedy(llama, [prompt], N_NEW)[0]
    assert done["finish_reason"] == "length"
    assert done["stats"]["tokens_prompt"] == 200
    prefilled = [r.header["prefilled"] for r in replies if r.header["event"] == "progress"]
    assert prefilled == sorted(prefilled)
    assert prefilled[-1] == 200


def test_a_row_with_tokens_already_made_goes_on_after_them(channel: Channel, llama: Path) -> None:
    (prompt,) = prompts_of(200)
    expected = hf_greedy(llama, [prompt], N_NEW)[0]
    replies = list(ask(channel, prompt, expected[:4]))
    indexes = [r.header["index"] for r in replies if r.header["event"] == "token"]
    assert indexes == list(range(4, N_NEW))
    assert replies[-1].header["token_ids"] == expected


def test_closing_the_stream_cancels_the_row(channel: Channel) -> None:
    (prompt,) = prompts_of(3000)
    stream = ask(channel, prompt, sampling={"max_tokens": 4000})
    next(stream)
    stream.close()
    wait_until_idle(channel)


def test_cancel_by_name_ends_the_stream_with_cancelled(channel: Channel) -> None:
    (prompt,) = prompts_of(3000)
    stream = ask(channel, prompt, row_id="to-cancel", sampling={"max_tokens": 1000})
    next(stream)
    assert channel.call("cancel", {"row_id": "to-cancel"}, timeout_s=20).header["cancelled"] == 1
    with pytest.raises(Cancelled):
        list(stream)


def test_the_same_row_routed_twice_runs_twice_without_harm(channel: Channel, llama: Path) -> None:
    (prompt,) = prompts_of(200)
    expected = hf_greedy(llama, [prompt], N_NEW)[0]
    first, second = ask(channel, prompt), ask(channel, prompt)
    assert list(first)[-1].header["token_ids"] == expected
    assert list(second)[-1].header["token_ids"] == expected


def test_an_older_epoch_is_refused_and_a_newer_one_drops_older_rows(
    llama: Path, tmp_path: Path
) -> None:
    config = tiny_config(llama, "worker.prefill_chunk_tokens=64")
    (prompt,) = prompts_of(3000)
    with store_pool(config, tmp_path) as pool:
        service = DecodeService(config, pool.addresses, {}, "worker-2", "node-0")
        server = serve(service, "mem://epochs")
        channel = connect("mem://epochs")
        stream = ask(channel, prompt, sampling={"max_tokens": 1000})
        next(stream)
        channel.call("epoch", {"epoch": 2}, timeout_s=20)
        with pytest.raises(Cancelled):
            list(stream)
        with pytest.raises(StaleEpoch):
            list(ask(channel, prompt))
        server.stop()
        service.close()


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ({"sampling": {"temperature": -1}}, SamplingError),
        ({"sampling": {"max_tokens": 0}}, SamplingError),
        ({"sampling": {"best_of": 3}}, SamplingError),
    ],
)
def test_bad_sampling_is_refused(
    channel: Channel, header: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        list(ask(channel, prompts_of(64)[0], **header))


def test_an_empty_prompt_and_an_unknown_method_are_refused(channel: Channel) -> None:
    with pytest.raises(EmptyContext):
        list(ask(channel, np.zeros(0, dtype=np.uint32)))
    with pytest.raises(InvalidInput, match="no method"):
        channel.call("explode", {}, timeout_s=5)


def test_lookup_counts_leading_pages_held_now(channel: Channel, service: DecodeService) -> None:
    (prompt,) = prompts_of(640)
    stream = ask(channel, prompt, sampling={"max_tokens": 400})
    for reply in stream:
        if reply.header["event"] == "token":
            break
    from longreach.core.page_key import page_keys

    keys = page_keys(prompt, service._recipe, 64)
    held = channel.call("lookup", {"keys": [bytes(k) for k in keys]}, timeout_s=5).header["held"]
    assert held == 10
    stream.close()
    wait_until_idle(channel)


def test_rows_leave_nothing_behind(channel: Channel, service: DecodeService) -> None:
    wait_until_idle(channel)
    flow = service._engine.flow
    assert flow.flush(10.0)
    assert len(flow.pages) == 0
    assert flow.memory.n_used == 0
    assert service._client.stats()["rows"] == 0


def test_a_draining_worker_takes_no_new_rows(llama: Path, tmp_path: Path) -> None:
    config = tiny_config(llama)
    with store_pool(config, tmp_path) as pool:
        service = DecodeService(config, pool.addresses, {}, "worker-1", "node-0")
        server = serve(service, "mem://draining")
        channel = connect("mem://draining")
        channel.call("drain", {}, timeout_s=5)
        with pytest.raises(Draining):
            list(ask(channel, prompts_of(64)[0]))
        server.stop()
        service.close()
