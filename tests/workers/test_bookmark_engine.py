"""Bookmarks in the engine: they choose pages, and change nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.config import Config
from longreach.core.errors import ConfigError
from longreach.kernels import attend, score, select
from longreach.kvstore.transport import serve
from longreach.workers.bookmark_index import BookmarkIndex
from longreach.workers.bookmarks import Bookmarks, BookmarkShape
from longreach.workers.cpu_executor import CpuExecutor
from longreach.workers.cpu_memory import CpuMemory
from longreach.workers.engine import Engine
from longreach.workers.layer_attention import LayerAttention
from longreach.workers.model_source import recipe_for
from longreach.workers.retriever_service import RetrieverService
from longreach.workers.row import Row, RowState

from .tiny import (
    KINDS,
    answers,
    hf_greedy,
    make_engine,
    make_tiny,
    page_client,
    prompts_of,
    request,
    run_all,
    store_pool,
    tiny_config,
)
from .trained import save_for

N_NEW = 24
PAGE = 128

# pages of 128 tokens, three kept of up to a dozen; layer 0 has nothing to tell pages apart by
POLICIES = """
retriever: {{weights: {weights}}}
cache: {{page_tokens: 128}}
attention:
  policies:
    - {{layers: "0", sink: 128, window: 256, stages: [{{scorer: mean, chunk: 128, keep: 384, refresh: 8}}]}}
    - layers: rest
      sink: 128
      window: 256
      stages:
        - {{scorer: bookmark, chunk: 128, keep: 384, refresh: 8}}
        - {{scorer: bounds, chunk: 8, keep: 256, refresh: 4}}
"""


def make_bookmarks(
    rank: int | None = 4, seed: int = 3, page_tokens: int = PAGE, head_dim: int = 16
) -> Bookmarks:
    """Random ones for a tiny model, far enough from its own projections to be told apart."""
    torch.manual_seed(seed)
    bookmarks = Bookmarks(BookmarkShape(3, 64, 4, 2, head_dim, page_tokens, rank))
    for parameter in bookmarks.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return bookmarks


def preset_for(model: Path, directory: Path, head_dim: int = 16) -> str:
    """A configuration that selects by bookmarks of this model."""
    weights = save_for(directory / "weights.safetensors", make_bookmarks(head_dim=head_dim), model)
    path = directory / "preset.yaml"
    path.write_text(POLICIES.format(weights=weights))
    return str(path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("bookmark-llama"))


@pytest.fixture(scope="session")
def preset(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return preset_for(llama, tmp_path_factory.mktemp("bookmarks"))


@pytest.fixture
def config(llama: Path, preset: str) -> Any:
    def make(*sets: str) -> Config:
        return tiny_config(llama, *sets, files=[preset])

    return make


DECODE_ONLY = tuple(f"attention.policies.{i}.prefill_stages=[]" for i in range(2))
"""Dense prefill: bookmarks select in decode alone."""
KEEP_ALL = (
    "attention.policies.0.stages=[]",
    "attention.policies.1.stages=[{scorer: bookmark, chunk: 128, keep: 65536, refresh: 8}]",
    "attention.policies.1.attend_rope=none",
)


@dataclass
class Watched:
    """What layers wrote and selected: by prompt, layer and position."""

    kv: dict[tuple[int, int, int], list[bytes]] = field(default_factory=dict)
    blocks: dict[tuple[int, int, int], list[bytes]] = field(default_factory=dict)

    def alike(self, times: int) -> bool:
        """Whether everything was seen so many times, always the same."""
        return all(
            len(found) == times and len(set(found)) == 1
            for seen in (self.kv, self.blocks)
            for found in seen.values()
        )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()
    append, select = CpuMemory.append, LayerAttention.select

    def note_kv(self: Any, layer: int, row: Row, start: int, k: Any, v: Any) -> None:
        both = torch.stack((k, v)).transpose(0, 2).contiguous()  # [T, Hkv, 2, D]
        for i, token in enumerate(both):
            name = (hash(row.request.prompt.tobytes()), layer, start + i)
            seen.kv.setdefault(name, []).append(token.numpy().tobytes())
        append(self, layer, row, start, k, v)

    def note_blocks(
        self: Any, layer: int, row: Row, q: Any, q_start: int, *rest: Any, **more: Any
    ) -> Any:
        selection = select(self, layer, row, q, q_start, *rest, **more)
        name = (hash(row.request.prompt.tobytes()), layer, q_start)
        if selection is not None:
            seen.blocks.setdefault(name, []).append(selection.blocks.numpy().tobytes())
        return selection

    monkeypatch.setattr(CpuMemory, "append", note_kv)
    monkeypatch.setattr(LayerAttention, "select", note_blocks)
    return seen


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """(layer, position, page starts) of every choice by a bookmark."""
    seen: list[tuple[int, int, list[int]]] = []
    choose = BookmarkIndex.choose

    def note(self: Any, layer: int, row: Row, query: Any, q_start: int, policy: Any) -> Any:
        pages = choose(self, layer, row, query, q_start, policy)
        seen.append((layer, q_start, pages.flatten().tolist()))
        return pages

    monkeypatch.setattr(BookmarkIndex, "choose", note)
    return seen


def ask(engine: Engine, *prompts: np.ndarray, n_new: int = N_NEW) -> list[list[int]]:
    return answers(engine, prompts, n_new)


def index_of(engine: Engine) -> BookmarkIndex:
    executor = engine._executor
    assert isinstance(executor, CpuExecutor)
    assert executor.bookmarks is not None
    return executor.bookmarks


def step_until(engine: Engine, name: str, state: RowState, n_tokens: int = 0) -> Row:
    """The row, once it is that far."""
    while True:
        engine.step()
        row = next(row for row in engine.rows if row.row_id == name)
        if row.state is state and len(row.tokens) >= n_tokens:
            return row


def keys_of(index: BookmarkIndex, row: Row, n_pages: int) -> torch.Tensor:
    """What the tables hold: [layers that select, n, Hkv, D]."""
    slots = row.page_ids.array[:n_pages]
    tables = [
        index._pool.summaries(layer, slots, n_pages).tables[index._name] for layer in index.layers
    ]
    return torch.stack([table[slots][:, :, 0, 0] for table in tables])


@pytest.mark.parametrize("decode_only", [False, True])
def test_bookmarks_really_choose(config: Any, llama: Path, decode_only: bool) -> None:
    sets = DECODE_ONLY if decode_only else ()
    prompts = prompts_of(1500)
    assert ask(make_engine(config(*sets)), *prompts) != hf_greedy(llama, prompts, N_NEW)


def test_pages_are_the_same_with_and_without_bookmarks_that_only_decode(
    config: Any, watched: Watched
) -> None:
    """And bear the same names, so that other bookmarks find them again."""
    prompts = prompts_of(1100)
    plain = config(*DECODE_ONLY, "attention.policies.1.stages.0.scorer=mean")
    beside = config(*DECODE_ONLY)
    assert recipe_for(plain).fingerprint() == recipe_for(beside).fingerprint()
    ask(make_engine(plain), *prompts, n_new=1)
    ask(make_engine(beside), *prompts, n_new=1)
    assert len(watched.kv) == 3 * 1100
    assert watched.alike(times=2)


def test_where_they_select_in_prefill_pages_bear_the_names_of_the_weights(
    config: Any, llama: Path, tmp_path: Path
) -> None:
    other = save_for(tmp_path / "other.safetensors", make_bookmarks(seed=4), llama)
    sets = [(), (f"retriever.weights={other}",)]
    names = {recipe_for(config(*s, *m)).fingerprint() for s in sets for m in ((), DECODE_ONLY)}
    assert len(names) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_pages_as_there_are_give_the_dense_result(kind: str, tmp_path: Path) -> None:
    model = make_tiny(kind, tmp_path / kind)
    preset = preset_for(model, tmp_path)
    prompts = prompts_of(900, 470)
    dense = hf_greedy(model, prompts, N_NEW)
    assert ask(make_engine(tiny_config(model, *KEEP_ALL, files=[preset])), *prompts) == dense


@pytest.mark.parametrize(
    "sets",
    [
        ("worker.prefill_chunk_tokens=64",),
        ("worker.prefill_chunk_tokens=192",),
        ("cache.device_pages=12",),
        ("attention.policies.1.head_reduce=kv-group",),
        ("attention.policies.1.stages.0.top_p=0.5",),
        ("retriever.weights={whole}",),
        DECODE_ONLY,
        ("attention.question_block=16", "worker.prefill_chunk_tokens=128"),
    ],
    ids=[
        "chunks of 64",
        "of 192",
        "small bank",
        "kv-group",
        "top_p",
        "whole",
        "decode only",
        "fine",
    ],
)
def test_chunks_bank_and_companions_change_nothing(
    config: Any, llama: Path, watched: Watched, sets: tuple[str, ...], tmp_path: Path
) -> None:
    prompts = prompts_of(1500, 1210, shared=700)
    whole = save_for(tmp_path / "whole.safetensors", make_bookmarks(rank=None), llama)
    sets = tuple(one.format(whole=whole) if "{" in one else one for one in sets)
    form = [s for s in sets if s.startswith(("attention", "retriever"))]
    alone = [ask(make_engine(config(*form)), prompt)[0] for prompt in prompts]
    settings = config(*sets, "store.capacity_bytes=67108864")
    with store_pool(settings, tmp_path) as pool, page_client(settings, pool) as client:
        assert ask(make_engine(settings, client), *prompts) == alone
    assert all(len(set(blocks)) == 1 for blocks in watched.blocks.values())
    assert len(watched.blocks) > 40


def test_where_pages_lie_changes_nothing(config: Any, watched: Watched) -> None:
    (prompt,) = prompts_of(1500)
    first = make_engine(config())
    tokens = ask(first, prompt)
    other = make_engine(config())
    # rows that end in another order leave page numbers in disorder
    for i, length in enumerate((400, 900, 200, 650)):
        other.submit(request(f"before-{i}", prompts_of(length, seed=i + 1)[0], 1 + 7 * (i % 2)))
    run_all(other)
    other.submit(request("row", prompt, N_NEW))
    row = step_until(other, "row", RowState.DECODE)
    assert np.any(np.diff(row.page_ids.array) != 1)
    assert run_all(other)["row"]["token_ids"] == tokens[0]
    mine = [b for name, b in watched.blocks.items() if name[0] == hash(prompt.tobytes())]
    assert all(len(b) == 2 and len(set(b)) == 1 for b in mine)


def test_what_comes_later_changes_nothing(config: Any, watched: Watched) -> None:
    prompts = prompts_of(1500, 1400, shared=1024)
    for prompt in prompts:
        ask(make_engine(config()), prompt, n_new=1)
    one, other = (hash(prompt.tobytes()) for prompt in prompts)
    compared = 0
    for seen in (watched.kv, watched.blocks):
        for (name, layer, position), found in seen.items():
            if name == one and position < 1024:
                assert found == seen[other, layer, position]
                compared += 1
    assert compared > 3 * 1024


@pytest.mark.parametrize(
    ("kind", "kv_dtype", "sets"),
    [
        *((kind, "float16", ()) for kind in KINDS),
        ("llama", "float16", DECODE_ONLY),
        ("llama", "int4c", ("attention.question_block=16",)),
        ("llama", "int4c", DECODE_ONLY),
    ],
)
def test_stored_pages_give_the_bookmarks_of_the_pass_that_made_them(
    kind: str, kv_dtype: str, sets: tuple[str, ...], tmp_path: Path
) -> None:
    """Bit by bit: keys of all pages, and the query of the prompt's last token."""
    head_dim = 32 if kv_dtype == "int4c" else 16
    model = make_tiny(kind, tmp_path / kind, head_dim=head_dim)
    preset = preset_for(model, tmp_path, head_dim)
    config = tiny_config(model, *sets, f"cache.kv_dtype={kv_dtype}", files=[preset])
    engine = make_engine(config)
    engine.submit(request("row", prompts_of(1413)[0], N_NEW, n_context=1370))
    row = step_until(engine, "row", RowState.DECODE)
    index, n_pages = index_of(engine), 1413 // PAGE
    assert row.bookmark is not None
    made, query = keys_of(index, row, n_pages), row.bookmark[1].clone()
    assert made.abs().max() > 0.1
    index._pool.forget(index.layers[-1], row.page_ids.array)
    with torch.inference_mode():
        for layer in index.layers:
            index._pool._tables[layer][index._name].fill_(torch.nan)
    index.bring_up(row, n_pages)
    assert torch.equal(keys_of(index, row, n_pages), made)
    row.bookmark = None
    index.refresh([row])
    assert torch.equal(row.bookmark[1], query)
    run_all(engine)


def test_a_bookmark_does_not_depend_on_those_beside_it(config: Any) -> None:
    engine = make_engine(config())
    engine.submit(request("row", prompts_of(1413)[0], 2))
    row = step_until(engine, "row", RowState.DECODE)
    index = index_of(engine)
    positions = [127, 40, 0, 1412, 700, 701, *range(200, 220)]
    together = index.run([(row, p) for p in positions])
    for i, position in enumerate(positions[:8]):
        alone = index.run([(row, position)])
        assert torch.equal(alone.keys[:, 0], together.keys[:, i])
        assert torch.equal(alone.queries[:, 0], together.queries[:, i])
    run_all(engine)


@pytest.mark.parametrize("decode_only", [False, True])
def test_a_restarted_worker_makes_the_keys_of_stored_pages_again(
    config: Any, watched: Watched, tmp_path: Path, decode_only: bool
) -> None:
    settings = config(*(DECODE_ONLY if decode_only else ()))
    (prompt,) = prompts_of(1500)
    with store_pool(settings, tmp_path) as pool:
        with page_client(settings, pool, owner="before") as client:
            engine = make_engine(settings, client)
            whole = ask(engine, prompt)[0]
            assert engine.flow.flush(10.0)
        with page_client(settings, pool, owner="after") as client:
            engine = make_engine(settings, client)
            engine.submit(request("again", prompt, N_NEW, forced=whole[:13]))
            done = run_all(engine)["again"]
    assert done["token_ids"] == whole
    assert done["stats"]["tokens_reused"] == 1408
    assert all(len(set(blocks)) == 1 for blocks in watched.blocks.values())


def test_answers_longer_than_pages_choose_among_their_own(
    config: Any, chosen: list[tuple[int, int, list[int]]]
) -> None:
    """Pages that decode completes get bookmarks, whether a row decodes alone, with others or again."""
    prompts = prompts_of(900, 870)
    sets = ("attention.policies.1.stages.0.keep=768",)
    alone = [ask(make_engine(config(*sets)), p, n_new=180)[0] for p in prompts]
    first = sorted(chosen)
    assert any(max(pages) >= 896 for _, at, pages in first if at > 1024)
    chosen.clear()
    assert ask(make_engine(config(*sets)), *prompts, n_new=180) == alone
    assert sorted(chosen) == first
    engine = make_engine(config(*sets))
    engine.submit(request("row", prompts[0], 180, forced=alone[0][:150]))
    assert run_all(engine)["row"]["token_ids"] == alone[0]


def test_retrolm_selects_once_for_an_answer(
    config: Any, chosen: list[tuple[int, int, list[int]]]
) -> None:
    once = "[{scorer: bookmark, chunk: 128, keep: 384, refresh: 1000000}]"
    settings = config(*(f"attention.policies.{i}.stages={once}" for i in range(2)))
    ask(make_engine(settings), prompts_of(1100)[0], n_new=150)
    assert [at[:2] for at in chosen if at[1] >= 1100] == [(0, 1100), (1, 1100), (2, 1100)]


def test_a_cancelled_row_leaves_the_shared_pages_to_the_others(config: Any) -> None:
    prompts = prompts_of(1500, 1450, shared=1280)
    alone = [ask(make_engine(config()), prompt)[0] for prompt in prompts]
    engine = make_engine(config())
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"row-{i}", prompt, N_NEW))
    step_until(engine, "row-1", RowState.DECODE)
    engine.cancel("row-0")
    done = {}
    while engine.n_rows:
        for event in engine.step():
            if event.kind == "done":
                done[event.row_id] = event.payload["token_ids"]
    assert done == {"row-1": alone[1]}


@pytest.mark.parametrize("sets", [(), ("attention.policies.1.head_reduce=kv-group",), DECODE_ONLY])
def test_pages_chosen_here_or_at_a_retriever_are_the_same(
    config: Any, watched: Watched, sets: tuple[str, ...]
) -> None:
    """And after it was lost: what it knew is sent again."""
    prompts = prompts_of(1300, 1200, shared=1100)
    alone = [ask(make_engine(config(*sets)), prompt)[0] for prompt in prompts]
    settings = config(*sets, "retriever.remote=true")
    names = iter("abcdef")
    services = [RetrieverService(settings, "retriever-0") for _ in range(2)]
    servers = [
        serve(service, f"mem://bookmarks-{len(sets)}-{sets[:1]}-{next(names)}")
        for service in services
    ]
    try:
        engine = make_engine(settings, None, {"retriever-0": servers[0].address})
        engine.submit(request("row-0", prompts[0], N_NEW))
        step_until(engine, "row-0", RowState.DECODE, n_tokens=4)
        assert services[0]._retriever.stats()["contexts"] == 1
        engine.update_retrievers({"retriever-0": servers[1].address})
        engine.submit(request("row-1", prompts[1], N_NEW))
        done = run_all(engine)
        assert [done[f"row-{i}"]["token_ids"] for i in range(2)] == alone
        assert services[1]._retriever.stats()["contexts"] == 0
    finally:
        for server in servers:
            server.stop()
    assert all(len(set(blocks)) == 1 for blocks in watched.blocks.values())


def test_plain_torch_gives_the_kernels_tokens(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel applies, selection is the same but for rounding: here nothing is near a tie."""
    prompts = prompts_of(1100)
    ours = ask(make_engine(config()), *prompts, n_new=8)
    for module, name in ((attend, "cpu_attend"), (score, "cpu_summaries"), (select, "cpu_top")):
        monkeypatch.setattr(module, name, None)
    assert ask(make_engine(config()), *prompts, n_new=8) == ours


def test_weights_that_do_not_fit_are_refused_at_the_start(
    config: Any, llama: Path, tmp_path: Path
) -> None:
    for_64 = save_for(tmp_path / "64.safetensors", make_bookmarks(page_tokens=64), llama)
    other = make_tiny("mistral", tmp_path / "mistral")
    of_other = save_for(tmp_path / "other.safetensors", make_bookmarks(), other)
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    for path, words in (
        (for_64, "for pages of 64 tokens, cache.page_tokens is 128"),
        (of_other, "made for tiny with weights"),
        (text, "damaged|holds no bookmarks"),
        (tmp_path / "missing", "is no file"),
        ("embedded", "not of '/"),
    ):
        for sets in ((), DECODE_ONLY):
            with pytest.raises(ConfigError, match=words):
                make_engine(config(f"retriever.weights={path}", *sets))
