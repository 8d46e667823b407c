"""Asynchronous retrieval: which query chooses is a function of position, however late its answer comes."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from longreach.core.config import Config
from longreach.core.errors import ConfigError, DeadlineExceeded, InvalidInput
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.ops import whole_pages
from longreach.kvstore.transport import Reply, serve
from longreach.workers.ask_ahead import chosen_for
from longreach.workers.bookmark_index import BookmarkIndex
from longreach.workers.engine import Engine
from longreach.workers.retriever_service import RetrieverService
from longreach.workers.row import Row, RowState
from longreach.workers.scheduler import next_refresh, refresh_level

from .test_bookmark_engine import make_bookmarks, step_until
from .tiny import answers, make_engine, make_tiny, prompts_of, request, run_all, tiny_config
from .trained import save_for

N_NEW = 60
"""Past the end of a page, which gets a bookmark that may be chosen."""
PAGE, REFRESH = 64, 8
ASYNCHRONOUS = ("retriever.remote=true", "retriever.asynchronous=true")
PROMPTS = prompts_of(1000, 830, shared=500)
_names = itertools.count()

POLICIES = """
retriever: {{weights: {weights}}}
cache: {{page_tokens: 64}}
attention:
  policies:
    - layers: all
      sink: 64
      window: 128
      prefill_stages: []
      stages:
        - {{scorer: bookmark, chunk: 64, keep: 256, refresh: 8}}
        - {{scorer: bounds, chunk: 8, keep: 128, refresh: 4}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    directory = tmp_path_factory.mktemp("ahead")
    model = make_tiny("llama", directory / "model")
    weights = save_for(directory / "w.safetensors", make_bookmarks(page_tokens=PAGE), model)
    preset = directory / "preset.yaml"
    preset.write_text(POLICIES.format(weights=weights))

    def make(*sets: str) -> Config:
        return tiny_config(model, *sets, files=[str(preset)])

    return make


class Slow:
    """A retriever whose answers to `ask` wait for a gate, and then so many seconds."""

    def __init__(self, config: Config, delays_s: Sequence[float] = (0.0,)) -> None:
        self.service = RetrieverService(config, "retriever-0")
        self._delays_s = itertools.cycle(delays_s)
        self.gate = threading.Event()
        self.gate.set()
        self.n_asked = 0

    def handle(self, method: str, header: dict[str, Any], buffers: Any) -> Reply:
        if method == "ask" and header["asks"]:
            self.n_asked += 1
            self.gate.wait(20)
            time.sleep(next(self._delays_s))
        return self.service.handle(method, header, buffers)


@contextlib.contextmanager
def served(*services: Any, names: Sequence[str] = ()) -> Iterator[list[Any]]:
    names = names or [f"mem://ahead-{next(_names)}" for _ in services]
    servers = [serve(service, name) for service, name in zip(services, names, strict=True)]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(scope="module")
def alone(config: Any) -> list[list[int]]:
    """Each prompt's tokens, from a retriever that answers at once."""
    settings = config(*ASYNCHRONOUS)
    with served(RetrieverService(settings, "retriever-0")) as (server,):
        retrievers = {"retriever-0": server.address}
        return [
            answers(make_engine(settings, None, retrievers), [prompt], N_NEW)[0]
            for prompt in PROMPTS
        ]


def test_the_next_refresh_is_the_next_position_that_is_due() -> None:
    for layer, interval, position in itertools.product(range(3), (1, 4, 8, 48), range(60)):
        due = [
            at
            for at in range(position + 1, position + 49)
            if refresh_level([interval], at, layer, 3, first=False) == 0
        ]
        assert next_refresh(position, layer, 3, interval) == due[0]


@pytest.mark.parametrize("window", [64, 128, 192, 1024])
def test_candidates_are_complete_where_the_query_is_made(window: int) -> None:
    for refresh in (1, 8, 64, 1_000_000):
        stage = Stage(scorer="bookmark", chunk=PAGE, keep=PAGE, refresh=refresh)
        policy = LayerPolicy(layers="all", sink=PAGE, window=window, stages=(stage,))
        for asked in range(100, 400):
            used = asked + refresh
            chosen = chosen_for(used, asked, policy)
            assert asked <= chosen <= used
            assert whole_pages(chosen, policy).stop <= max(PAGE, asked // PAGE * PAGE)
            if window >= refresh + 2 * PAGE:
                assert chosen == used


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, list[int]]]:
    """(tokens of the prompt, layer, position, pages) that decode used."""
    seen: list[tuple[int, int, int, list[int]]] = []
    choose = BookmarkIndex.choose

    def note(self: Any, layer: int, row: Row, query: Any, q_start: int, policy: Any) -> Any:
        pages = choose(self, layer, row, query, q_start, policy)
        if q_start >= row.n_prompt:
            seen.append((row.n_prompt, layer, q_start, pages.flatten().tolist()))
        return pages

    monkeypatch.setattr(BookmarkIndex, "choose", note)
    return seen


def simulated(engine: Engine) -> None:
    """Make a synchronous engine follow the rule, with nothing but what it has seen by then."""
    executor: Any = engine._executor
    index: BookmarkIndex = executor.bookmarks
    queries: dict[tuple[str, int, int], Any] = {}
    choose = index.choose

    def late(layer: int, row: Row, query: Any, q_start: int, policy: LayerPolicy) -> Any:
        queries[row.row_id, layer, q_start] = query
        asked = max(row.n_prompt, q_start - policy.stages[0].refresh)
        q_for = chosen_for(q_start, asked, policy)
        return choose(layer, row, queries[row.row_id, layer, asked], q_for, policy)

    index.choose = late  # type: ignore[method-assign]


def test_the_rule_is_that_of_a_synchronous_simulation(
    config: Any, choices: list[Any], alone: list[list[int]]
) -> None:
    simulation = make_engine(config())
    simulated(simulation)
    assert [answers(simulation, [prompt], N_NEW)[0] for prompt in PROMPTS] == alone
    # noted for the position that was asked for: order and pages are what counts
    expected = [(n, layer, pages) for n, layer, _, pages in choices]
    choices.clear()
    settings = config(*ASYNCHRONOUS)
    with served(RetrieverService(settings, "retriever-0")) as (server,):
        engine = make_engine(settings, None, {"retriever-0": server.address})
        assert [answers(engine, [prompt], N_NEW)[0] for prompt in PROMPTS] == alone
    assert [(n, layer, pages) for n, layer, _, pages in choices] == expected
    choices.clear()
    answers(make_engine(config()), PROMPTS[:1], N_NEW)
    mine = [(n, layer, pages) for n, layer, _, pages in choices]
    assert mine != [one for one in expected if one[0] == len(PROMPTS[0])]


def test_a_worker_without_retrievers_follows_the_same_rule(
    config: Any, alone: list[list[int]]
) -> None:
    assert answers(make_engine(config(*ASYNCHRONOUS)), PROMPTS, N_NEW) == alone


@pytest.mark.parametrize(
    ("delays_s", "n_retrievers"),
    [((0.004,), 1), ((0.0, 0.05, 0.0, 0.0, 0.02), 1), ((0.03, 0.0), 2)],
    ids=["steady", "now and then", "two"],
)
def test_late_answers_and_companions_change_nothing(
    config: Any, alone: list[list[int]], delays_s: Sequence[float], n_retrievers: int
) -> None:
    settings = config(*ASYNCHRONOUS)
    slow = [Slow(settings, delays_s) for _ in range(n_retrievers)]
    with served(*slow) as servers:
        retrievers = {f"retriever-{i}": server.address for i, server in enumerate(servers)}
        engine = make_engine(settings, None, retrievers)
        assert answers(engine, PROMPTS, N_NEW) == alone
        resumed = make_engine(settings, None, retrievers)
        resumed.submit(request("row", PROMPTS[0], N_NEW, forced=alone[0][:21]))
        assert run_all(resumed)["row"]["token_ids"] == alone[0]
        assert sum(one.n_asked for one in slow) > N_NEW // REFRESH
        deadline = time.monotonic() + 5
        while n_contexts(slow) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert n_contexts(slow) == 0


def n_contexts(slow: Sequence[Slow]) -> int:
    return sum(one.service._retriever.stats()["contexts"] for one in slow)


def test_no_step_waits_for_an_answer_that_is_used_later(
    config: Any, alone: list[list[int]]
) -> None:
    settings = config(*ASYNCHRONOUS)
    slow = Slow(settings)
    with served(slow) as (server,):
        engine = make_engine(settings, None, {"retriever-0": server.address})
        engine.submit(request("row", PROMPTS[0], N_NEW))
        row = step_until(engine, "row", RowState.DECODE, n_tokens=12)
        deadline = time.monotonic() + 5
        while any(not f.done() for f in pending(engine)) and time.monotonic() < deadline:
            time.sleep(0.01)
        slow.gate.clear()
        n_tokens = len(row.tokens)
        for _ in range(REFRESH):
            engine.step()
        assert len(row.tokens) == n_tokens + REFRESH
        assert any(not f.done() for f in pending(engine))
        threading.Timer(0.2, slow.gate.set).start()
        assert run_all(engine)["row"]["token_ids"] == alone[0]


def pending(engine: Engine) -> list[Any]:
    executor: Any = engine._executor
    contexts = executor.index.retrievers._contexts.values()
    return [future for context in contexts for future in context.asked]


def test_an_answer_that_never_comes_ends_the_row_at_the_deadline(config: Any) -> None:
    settings = config(*ASYNCHRONOUS, "retriever.timeout_s=0.3")
    slow = Slow(settings)
    with served(slow) as (server,):
        engine = make_engine(settings, None, {"retriever-0": server.address})
        engine.submit(request("row", PROMPTS[0], N_NEW))
        step_until(engine, "row", RowState.DECODE, n_tokens=4)
        slow.gate.clear()
        with pytest.raises(DeadlineExceeded):
            run_all(engine)
        slow.gate.set()


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("same_address", [False, True])
def test_a_retriever_that_was_lost_and_came_back_changes_nothing(
    config: Any, alone: list[list[int]], n_rows: int, same_address: bool
) -> None:
    settings = config(*ASYNCHRONOUS)
    names = [f"mem://ahead-{next(_names)}"] * 2
    if not same_address:
        names[1] = f"mem://ahead-{next(_names)}"
    first, second = (RetrieverService(settings, "retriever-0") for _ in range(2))
    server = serve(first, names[0])
    engine = make_engine(settings, None, {"retriever-0": server.address})
    for i in range(n_rows):
        engine.submit(request(f"row-{i}", PROMPTS[i], N_NEW))
    row = step_until(engine, f"row-{n_rows - 1}", RowState.DECODE, n_tokens=20)
    restarts = [r.stats.restarts for r in engine.rows]
    assert len(row.tokens) < N_NEW
    server.stop()
    with served(second, names=names[1:]):
        engine.update_retrievers({"retriever-0": names[1]})
        rows = list(engine.rows)
        done = run_all(engine)
    assert [done[f"row-{i}"]["token_ids"] for i in range(n_rows)] == alone[:n_rows]
    # what was under way is asked again: no row starts anew
    assert [r.stats.restarts for r in rows] == restarts == [0] * n_rows
    assert second._retriever.stats()["bytes"] > 0


def test_what_it_needs_is_said(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs retriever\.remote"):
        config("retriever.asynchronous=true")
    mean = "attention.policies.0.stages.0.scorer=mean"
    with pytest.raises(ConfigError, match="scorer bookmark"):
        config(*ASYNCHRONOUS, mean)


def test_a_retriever_refuses_pages_that_leave_a_gap(config: Any) -> None:
    retriever = RetrieverService(config(*ASYNCHRONOUS), "retriever-0")._retriever
    import torch

    retriever.open("row", [])
    rows = torch.from_numpy(np.zeros((2, 2, 1, 1, 16), dtype=np.float32))
    retriever.add("row", 0, 0, 2, rows)
    with pytest.raises(InvalidInput, match="gap"):
        retriever.add("row", 0, 3, 5, rows)
    retriever.add("row", 0, 1, 3, rows)
