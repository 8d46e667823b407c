"""Sparse invariance (DESIGN 6.2, 6.3): selection and tokens depend on the row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.config import Config
from longreach.workers import cpu_memory, decode_step, decoder_blocks, layer_attention

from .tiny import (
    VOCAB,
    make_engine,
    make_tiny,
    page_client,
    prompts_of,
    request,
    run_all,
    store_pool,
    tiny_config,
)

N_NEW = 12

# the 3K preset scaled down: chunks 64/16/8, keep 512/384/256 and 512/256/128, sink 64, window 128
PRESET = """
attention:
  policies:
    - layers: "0"
      sink: 64
      window: 128
      select_rope: chunk-indexed
      stages:
        - {chunk: 64, keep: 512, refresh: 8, query_stride: 4}
        - {chunk: 16, keep: 384, refresh: 4, query_stride: 4}
        - {chunk: 8, keep: 256, refresh: 2}
    - layers: rest
      sink: 64
      window: 128
      select_rope: relative
      stages:
        - {chunk: 64, keep: 512, refresh: 8, query_stride: 4}
        - {chunk: 16, keep: 256, refresh: 4, query_stride: 4}
        - {chunk: 8, keep: 128, refresh: 2}
"""
SMALLEST_BANK = 1 + 2 + 8


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("sparse-llama"))


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("preset") / "small-3k.yaml"
    path.write_text(PRESET)
    return str(path)


@pytest.fixture
def config(llama: Path, preset: str) -> Any:
    def make(*sets: str) -> Config:
        return tiny_config(llama, *sets, files=[preset])

    return make


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], list[bytes]]:
    """Every selection made: blocks by (queries' fingerprint), so that runs can be compared."""
    seen: dict[tuple[int, ...], list[bytes]] = {}
    select = layer_attention.LayerAttention.select

    def spy(self: Any, layer: int, row: Any, q: Any, q_start: int, *rest: Any, **more: Any) -> Any:
        selection = select(self, layer, row, q, q_start, *rest, **more)
        name = (hash(row.request.prompt.tobytes()), layer, q_start)
        if selection is not None:
            seen.setdefault(name, []).append(selection.blocks.numpy().tobytes())
        return selection

    monkeypatch.setattr(layer_attention.LayerAttention, "select", spy)
    return seen


def run(
    config: Config,
    prompts: list[np.ndarray],
    tmp_path: Path,
    stores: int = 2,
    n_question: int = 0,
) -> list[Any]:
    with store_pool(config, tmp_path, count=stores) as pool, page_client(config, pool) as client:
        engine = make_engine(config, client)
        for i, prompt in enumerate(prompts):
            n_context = len(prompt) - n_question
            engine.submit(request(f"row-{i}", prompt, N_NEW, n_context=n_context))
        done = run_all(engine)
        return [done[f"row-{i}"] for i in range(len(prompts))]


def tokens(rows: list[Any]) -> list[list[int]]:
    return [row["token_ids"] for row in rows]


def test_the_preset_really_prunes(config: Any, llama: Path, tmp_path: Path) -> None:
    prompts = prompts_of(1500)
    sparse = tokens(run(config(), prompts, tmp_path))
    dense = tokens(run(tiny_config(llama), prompts, tmp_path))
    assert sparse != dense


@pytest.mark.parametrize("chunk_tokens", [64, 256, 4096])
@pytest.mark.parametrize("stores", [1, 3])
def test_chunking_and_store_count_change_nothing(
    config: Any, watched: dict[Any, list[bytes]], tmp_path: Path, chunk_tokens: int, stores: int
) -> None:
    prompts = prompts_of(1500)
    base = tokens(run(config(), prompts, tmp_path))
    other = config(f"worker.prefill_chunk_tokens={chunk_tokens}")
    assert tokens(run(other, prompts, tmp_path, stores)) == base
    assert len(watched) > 60
    for name, blocks in watched.items():
        assert len(blocks) == 2, name
        assert len(set(blocks)) == 1, name


def test_a_question_has_finer_blocks_and_is_as_invariant(
    config: Any, watched: dict[Any, list[bytes]], tmp_path: Path
) -> None:
    """In any chunking, company and bank; and its pages never pass for a context's."""
    fine = "attention.question_block=16"
    prompts = prompts_of(1130, 1100, 1075, shared=1000)
    coarse = [tokens(run(config(), [p], tmp_path, n_question=100))[0] for p in prompts]
    plain = {name[2] for name in watched}
    watched.clear()
    alone = [tokens(run(config(fine), [p], tmp_path, n_question=100))[0] for p in prompts]
    assert alone != coarse
    starts = {name[2] for name in watched}
    # the longest begins its question at 1030, inside the block of 1024
    assert {1024, 1040, 1056, 1072, 1088, 1104, 1120} <= starts
    assert {q for q in starts if q < 960} == {q for q in plain if q < 960}
    together = run(config(fine), prompts, tmp_path, n_question=100)
    assert tokens(together) == alone
    for sets in (("worker.prefill_chunk_tokens=64",), (f"cache.device_pages={SMALLEST_BANK}",)):
        assert [
            tokens(run(config(fine, *sets), [p], tmp_path, n_question=100))[0] for p in prompts
        ] == alone
    assert all(len(set(blocks)) == 1 for blocks in watched.values())


def test_a_finer_block_is_scored_by_as_many_averages(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """query_stride 4 of 64 queries is 1 of 16: see Stage.query_stride."""
    seen: dict[int, tuple[int, int]] = {}
    select = layer_attention.select_blocks

    def spy(q: Any, q_start: int, *rest: Any) -> Any:
        seen[q_start] = (q.shape[1], rest[-1])
        return select(q, q_start, *rest)

    monkeypatch.setattr(layer_attention, "select_blocks", spy)
    (prompt,) = prompts_of(1130)
    run(config("attention.question_block=16"), [prompt], tmp_path, n_question=100)
    assert {of for start, (_, of) in seen.items() if start < 1024} == {64}
    assert {start: seen[start] for start in range(1024, 1130, 16)} == {
        1024: (16, 16),
        1040: (16, 16),
        1056: (16, 16),
        1072: (16, 16),
        1088: (16, 16),
        1104: (16, 16),
        1120: (10, 16),
    }


def test_the_same_tokens_as_context_and_as_question_do_not_share_pages(
    config: Any, tmp_path: Path
) -> None:
    small = config("attention.question_block=16")
    (prompt,) = prompts_of(1216)
    with store_pool(small, tmp_path) as pool, page_client(small, pool) as client:
        engine = make_engine(small, client)
        answers = []
        for i, n_context in enumerate((1216, 1090, 1080, 1216, 1090)):
            engine.submit(request(f"row-{i}", prompt, N_NEW, n_context=n_context))
            done = run_all(engine)[f"row-{i}"]
            answers.append((done["stats"]["tokens_reused"], done["token_ids"]))
            assert engine.flow.flush(10)
    # 1090 and 1080 begin their questions in the same block, at 1088 and 1024 + 56
    assert [reused for reused, _ in answers] == [0, 1088, 1024, 1152, 1152]
    assert answers[3][1] == answers[0][1]
    assert answers[4][1] == answers[1][1]


def test_companions_change_nothing(
    config: Any, watched: dict[Any, list[bytes]], tmp_path: Path
) -> None:
    prompts = prompts_of(900, 1100, 1300, 700, shared=640)
    alone = [tokens(run(config(), [p], tmp_path))[0] for p in prompts]
    assert tokens(run(config(), prompts, tmp_path)) == alone
    assert all(len(set(blocks)) == 1 for blocks in watched.values())


@pytest.mark.parametrize("device_pages", [SMALLEST_BANK, 16, 24])
def test_the_device_bank_changes_nothing(
    config: Any, watched: dict[Any, list[bytes]], tmp_path: Path, device_pages: int
) -> None:
    prompts = prompts_of(2300)
    (whole,) = run(config("cache.device_pages=64"), prompts, tmp_path)
    (small,) = run(config(f"cache.device_pages={device_pages}"), prompts, tmp_path)
    assert small["token_ids"] == whole["token_ids"]
    assert whole["stats"]["bank_misses"] == 0
    assert small["stats"]["bank_misses"] > 0
    assert all(len(set(blocks)) == 1 for blocks in watched.values())
    if device_pages == SMALLEST_BANK:
        assert small["stats"]["attend_passes"] > whole["stats"]["attend_passes"]


def test_a_smaller_bank_than_that_is_refused_with_the_numbers(config: Any, tmp_path: Path) -> None:
    from longreach.core.errors import ConfigError

    with pytest.raises(ConfigError, match=f"less than the {SMALLEST_BANK} pages"):
        run(config(f"cache.device_pages={SMALLEST_BANK - 1}"), prompts_of(100), tmp_path)


def test_cached_masks_with_refresh_1_equal_uncached_ones(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = prompts_of(1500)
    refresh_1 = [
        f"attention.policies.{p}.stages.{s}.refresh=1" for p in range(2) for s in (2, 1, 0)
    ]
    cached = tokens(run(config(*refresh_1), prompts, tmp_path))
    monkeypatch.setattr(decode_step, "refresh_level", lambda *a, **k: 0)
    uncached = tokens(run(config(), prompts, tmp_path))
    assert cached == uncached


def test_cached_masks_are_reused_between_refreshes(config: Any, tmp_path: Path) -> None:
    """The other half of the former test: with the preset's own intervals masks do get old."""
    prompts = prompts_of(1500)
    levels: list[int] = []
    level = decode_step.DecodeStep._level

    def spy(self: Any, layer: int, row: Any) -> int:
        levels.append(level(self, layer, row))
        return levels[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_step.DecodeStep, "_level", spy)
        run(config(), prompts, tmp_path)
    assert set(levels) == {0, 1, 2, 3}
    assert levels.count(3) > levels.count(0)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_layers_run_together_or_one_by_one(config: Any, tmp_path: Path, n_rows: int) -> None:
    """In one launch where nothing is to be decided, in a launch each, or by the calls of `attend`."""
    prompts = prompts_of(1500, 900, 1700)[:n_rows]
    ran: list[int] = []
    found, hits = [], []
    for way in ("together", "one by one", "attend"):
        with pytest.MonkeyPatch.context() as patch:
            if way == "one by one":
                patch.setattr(decode_step.DecodeStep, "ready", lambda self, layer: None)
            if way == "attend":
                patch.setattr(decoder_blocks, "PlannedAttention", int)
            else:
                original = decode_step.DecodeStep.ran

                def spy(
                    self: Any, first: int, n_layers: int, *rest: Any, o: Any = original
                ) -> None:
                    ran.append(n_layers)
                    o(self, first, n_layers, *rest)

                patch.setattr(decode_step.DecodeStep, "ran", spy)
            done = run(config(), prompts, tmp_path)
            found.append(tokens(done))
            hits.append([payload["stats"]["bank_hits"] for payload in done])
        if way == "together":
            assert max(ran) > 1
            ran.clear()
        elif way == "one by one":
            assert set(ran) == {1}
            ran.clear()
        else:
            assert not ran
    assert found[0] == found[1] == found[2]
    if n_rows == 1:  # what is used once counts once
        assert hits[0] == hits[1] == hits[2]


def test_a_replay_gives_the_tokens_of_the_undisturbed_run(config: Any, tmp_path: Path) -> None:
    prompts = prompts_of(1500)
    (whole,) = tokens(run(config(), prompts, tmp_path))
    settings = config("cache.device_pages=16")
    with store_pool(settings, tmp_path) as pool, page_client(settings, pool) as client:
        engine = make_engine(settings, client)
        engine.submit(request("row", prompts[0], N_NEW, forced=whole[:7]))
        assert run_all(engine)["row"]["token_ids"] == whole


def test_rows_that_share_a_context_prefill_it_once(config: Any, tmp_path: Path) -> None:
    prompts = prompts_of(1000, 1010, 1020, shared=960)
    rows = run(config(), prompts, tmp_path)
    assert rows[0]["stats"]["tokens_prefilled"] == 1000
    for i, row in enumerate(rows[1:], start=1):
        assert row["stats"]["tokens_reused"] == 960
        assert row["stats"]["tokens_prefilled"] == len(prompts[i]) - 960


@pytest.mark.parametrize("scorer", ["bounds", "mean"])
@pytest.mark.parametrize("remote", [False, True])
def test_summaries_scored_here_or_at_a_retriever_select_the_same(
    config: Any,
    watched: dict[Any, list[bytes]],
    tmp_path: Path,
    scorer: str,
    remote: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longreach.kvstore.transport import serve
    from longreach.workers.retriever_service import RetrieverService
    from longreach.workers.summary_index import SummaryIndex

    sets = [f"attention.policies.{p}.stages.0.scorer={scorer}" for p in range(2)]
    sets += [f"attention.policies.{p}.stages.0.keep=384" for p in range(2)]
    prompts = prompts_of(1500, 1400, shared=1300)
    plain = config(*sets)
    with monkeypatch.context() as patch:
        # the reference: no index at all, summaries made from the keys every time
        patch.setattr(SummaryIndex, "summaries", lambda *a, **k: (None, range(0)))
        patch.setattr(SummaryIndex, "coarse", lambda *a, **k: None)
        base = tokens(run(plain, prompts, tmp_path))
    settings = config(*sets, f"retriever.remote={str(remote).lower()}")
    service = RetrieverService(settings, "retriever-0")
    server = serve(service, f"mem://retriever-{scorer}-{remote}")
    try:
        with store_pool(settings, tmp_path) as pool, page_client(settings, pool) as client:
            engine = make_engine(settings, client, {"retriever-0": server.address})
            for i, prompt in enumerate(prompts):
                engine.submit(request(f"row-{i}", prompt, N_NEW))
            done = run_all(engine)
            assert [done[f"row-{i}"]["token_ids"] for i in range(2)] == base
    finally:
        server.stop()
    assert all(len(set(blocks)) == 1 for blocks in watched.values())
    assert service._retriever.stats()["contexts"] == 0


def test_prompt_tokens_outside_the_vocabulary_are_refused(config: Any) -> None:
    from longreach.core.errors import InvalidInput

    engine = make_engine(config())
    with pytest.raises(InvalidInput, match="outside the vocabulary"):
        engine.submit(request("row", np.array([VOCAB], dtype=np.uint32), 4))


def test_a_row_whose_keys_are_not_finite_fails_and_the_others_go_on(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = prompts_of(200, 300)
    settings = config()
    expected = tokens(run(settings, prompts[1:], tmp_path))[0]
    append = cpu_memory.CpuMemory.append

    def poison(self: Any, layer: int, row: Any, start: int, k: Any, v: Any) -> None:
        if row.row_id == "row-0" and layer == 1:
            k = torch.full_like(k, torch.nan)
        append(self, layer, row, start, k, v)

    monkeypatch.setattr(cpu_memory.CpuMemory, "append", poison)
    engine = make_engine(settings)
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"row-{i}", prompt, N_NEW))
    errors, done = {}, {}
    while engine.n_rows:
        for event in engine.step():
            if event.error is not None:
                errors[event.row_id] = event.error.reason
            if event.kind == "done":
                done[event.row_id] = event.payload["token_ids"]
    assert errors == {"row-0": "NUMERICAL_ERROR"}
    assert done == {"row-1": expected}
