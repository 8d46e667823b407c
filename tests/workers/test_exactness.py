"""Dense when asked (DESIGN 6.1): tokens and logits of Hugging Face, in every way of computing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.config import Config
from longreach.workers import layer_attention
from longreach.workers.cpu_memory import CpuMemory

from .tiny import (
    KINDS,
    answers,
    engine_logits,
    hf_greedy,
    hf_logits,
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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="session")
def dense(models: dict[str, Path]) -> Any:
    """Greedy answers of transformers, remembered per model and prompt."""
    known: dict[tuple[str, bytes], list[int]] = {}

    def ask(kind: str, prompts: list[np.ndarray]) -> list[list[int]]:
        missing = [p for p in prompts if (kind, p.tobytes()) not in known]
        for prompt, tokens in zip(
            missing, hf_greedy(models[kind], missing, N_NEW) if missing else [], strict=True
        ):
            known[kind, prompt.tobytes()] = tokens
        return [known[kind, p.tobytes()] for p in prompts]

    return ask


GRID = [("llama", chunk, page) for chunk in (64, 192, 4096) for page in (16, 32, 64)]
GRID += [(kind, *at) for kind in KINDS[1:] for at in ((64, 16), (192, 32), (4096, 64))]


@pytest.mark.parametrize(("kind", "chunk_tokens", "page_tokens"), GRID)
def test_greedy_tokens_equal_dense_generate(
    models: dict[str, Path], dense: Any, kind: str, chunk_tokens: int, page_tokens: int
) -> None:
    prompts = prompts_of(1, 64, 65, 257)
    config = tiny_config(
        models[kind],
        f"cache.page_tokens={page_tokens}",
        f"worker.prefill_chunk_tokens={chunk_tokens}",
    )
    assert answers(make_engine(config), prompts, N_NEW) == dense(kind, prompts)


@pytest.mark.parametrize("n_rows", range(1, 9))
def test_any_batch_of_rows_gives_each_row_its_own_tokens(
    models: dict[str, Path], dense: Any, n_rows: int
) -> None:
    prompts = prompts_of(*[90 + 37 * i for i in range(8)], shared=70)[:n_rows]
    engine = make_engine(tiny_config(models["llama"], "worker.prefill_chunk_tokens=64"))
    assert answers(engine, prompts, N_NEW) == dense("llama", prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_fetched_back_from_the_store_give_the_same_tokens(
    models: dict[str, Path], dense: Any, kind: str, tmp_path: Path
) -> None:
    prompts = prompts_of(500, 700)
    config = tiny_config(
        models[kind],
        "cache.page_tokens=16",
        "cache.device_pages=13",
        "worker.prefill_chunk_tokens=64",
    )
    with store_pool(config, tmp_path) as pool, page_client(config, pool) as client:
        engine = make_engine(config, client)
        assert answers(engine, prompts[:1], N_NEW) == dense(kind, prompts[:1])
        engine.submit(request("second", prompts[1], N_NEW))
        done = run_all(engine)["second"]
        assert done["token_ids"] == dense(kind, prompts[1:])[0]
        assert done["stats"]["bank_misses"] > 100
        assert done["stats"]["bytes_store_to_device"] > 0
        assert done["stats"]["attend_passes"] > done["stats"]["tokens_prefilled"] // 64 * 3


def test_a_restarted_worker_reuses_the_pages_and_gives_the_same_tokens(
    models: dict[str, Path], dense: Any, tmp_path: Path
) -> None:
    (prompt,) = prompts_of(700)
    config = tiny_config(models["llama"])
    with store_pool(config, tmp_path) as pool:
        with page_client(config, pool, owner="before") as client:
            engine = make_engine(config, client)
            assert answers(engine, [prompt], N_NEW) == dense("llama", [prompt])
            assert engine.flow.flush(10.0)
        with page_client(config, pool, owner="after") as client:
            engine = make_engine(config, client)
            engine.submit(request("again", prompt, N_NEW))
            done = run_all(engine)["again"]
            assert done["token_ids"] == dense("llama", [prompt])[0]
            assert done["stats"]["tokens_reused"] == 640
            assert done["stats"]["tokens_prefilled"] == 60


def test_a_prompt_whose_pages_all_exist_recomputes_its_last_block_only(
    models: dict[str, Path], dense: Any, tmp_path: Path
) -> None:
    (prompt,) = prompts_of(640)
    config = tiny_config(models["llama"])
    with store_pool(config, tmp_path) as pool, page_client(config, pool) as client:
        engine = make_engine(config, client)
        for name in ("first", "second"):
            engine.submit(request(name, prompt, N_NEW))
            done = run_all(engine)[name]
            assert done["token_ids"] == dense("llama", [prompt])[0]
            engine.flow.flush(10.0)
        assert done["stats"]["tokens_prefilled"] == 64
        assert client.stats()["mismatched_duplicates"] == 0


@pytest.mark.parametrize("n_forced", [1, 5, N_NEW])
def test_a_resumed_row_replays_its_tokens_and_goes_on(
    models: dict[str, Path], dense: Any, n_forced: int
) -> None:
    (prompt,) = prompts_of(300)
    expected = dense("llama", [prompt])[0]
    engine = make_engine(tiny_config(models["llama"]))
    engine.submit(request("row", prompt, N_NEW, forced=expected[:n_forced]))
    emitted: list[int] = []
    while engine.n_rows:
        for event in engine.step():
            if event.kind == "token":
                emitted.append(event.payload["index"])
            elif event.kind == "done":
                assert event.payload["token_ids"] == expected
    assert emitted == list(range(n_forced, N_NEW))


def worst_error(config: Config, prompt: np.ndarray) -> float:
    """Largest logit difference to dense, in standard deviations of the dense logits."""
    tokens, logits = engine_logits(make_engine(config), prompt, N_NEW)
    sequence = [*prompt.tolist(), *tokens]
    reference = hf_logits(Path(config.model.name), sequence)[len(prompt) - 1 : -1]
    return float((logits - reference).abs().max() / reference.std())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_within_a_ten_thousandth_of_their_deviation(
    models: dict[str, Path], kind: str
) -> None:
    (prompt,) = prompts_of(333)
    assert worst_error(tiny_config(models[kind]), prompt) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_notices_positions_that_are_off_by_one(
    models: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts_of(333)
    attend = layer_attention.attend_segments

    def shifted(q: torch.Tensor, q_start: int, *rest: Any) -> Any:
        # rotations add up: queries turned by one position more stand one position too far
        rope = rest[-2]
        return attend(rope.rotate(q, torch.ones(q.shape[:-1], dtype=torch.int64)), q_start, *rest)

    monkeypatch.setattr(layer_attention, "attend_segments", shifted)
    config = tiny_config(models[kind])
    tokens, _ = engine_logits(make_engine(config), prompt, N_NEW)
    assert worst_error(config, prompt) > 1e-2
    assert tokens != hf_greedy(models[kind], [prompt], N_NEW)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_notices_one_dropped_page(
    models: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts_of(333)
    append = CpuMemory.append

    def lossy(self: CpuMemory, layer: int, row: Any, start: int, k: Any, v: Any) -> None:
        k, v = k.clone(), v.clone()
        for position in range(start, start + k.shape[1]):
            if position // 64 == 2:
                k[:, position - start] = 0
                v[:, position - start] = 0
        append(self, layer, row, start, k, v)

    monkeypatch.setattr(CpuMemory, "append", lossy)
    config = tiny_config(models[kind])
    tokens, _ = engine_logits(make_engine(config), prompt, N_NEW)
    assert worst_error(config, prompt) > 1e-2
    assert tokens != hf_greedy(models[kind], [prompt], N_NEW)[0]
