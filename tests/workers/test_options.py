"""Options beyond the published method keep its promises: a row's tokens never depend on chunking,
company, bank, restart or format of the pages' home (DESIGN 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longreach.core.config import Config

from .test_sparse import N_NEW, SMALLEST_BANK, run, tokens
from .tiny import make_engine, make_tiny, page_client, prompts_of, request, run_all, store_pool
from .tiny import tiny_config as configured

OPTIONS = {
    "summaries": """
      select_rope: relative
      stages:
        - {scorer: mean, chunk: 128, keep: 512, refresh: 8, query_stride: 4}
        - {scorer: bounds, chunk: 8, keep: 128, refresh: 2}
""",
    "softmax-groups": """
      select_rope: clamped
      select_span: 500
      head_reduce: kv-group
      reduce: softmax
      stages:
        - {scorer: mean, chunk: 64, keep: 512, refresh: 8}
        - {scorer: bounds, chunk: 16, keep: 128, refresh: 2, query_stride: 4}
""",
    "top-p-and-tail": """
      select_rope: clamped
      attend_rope: none
      tail: 32
      stages:
        - {scorer: search, chunk: 64, keep: 512, refresh: 8}
        - {scorer: bounds, chunk: 8, keep: 256, refresh: 2, top_p: 0.3}
""",
    "streaming-tail": """
      select_rope: relative
      tail: 64
      stages:
        - {scorer: mean, chunk: 64, keep: 640, refresh: 8}
        - {scorer: bounds, chunk: 8, keep: 128, refresh: 2}
""",
    "delta": """
      select_rope: relative
      delta: true
      stages:
        - {scorer: mean, chunk: 64, keep: 512, refresh: 8}
        - {scorer: bounds, chunk: 8, keep: 128, refresh: 2}
""",
}
HEAD = "attention:\n  policies:\n    - layers: all\n      sink: 128\n      window: 192\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("options-llama"))


@pytest.fixture(params=list(OPTIONS))
def config(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Any:
    path = tmp_path / "options.yaml"
    path.write_text(HEAD + OPTIONS[request.param])

    def make(*sets: str) -> Config:
        return configured(llama, *sets, files=[str(path)])

    return make


def test_nothing_outside_a_row_changes_its_tokens(config: Any, llama: Path, tmp_path: Path) -> None:
    prompts = prompts_of(1500, 1300, shared=1100)
    base = [tokens(run(config(), [p], tmp_path))[0] for p in prompts]
    assert base != [tokens(run(configured(llama), [p], tmp_path))[0] for p in prompts]
    assert tokens(run(config(), prompts, tmp_path)) == base
    chunks = config("worker.prefill_chunk_tokens=64")
    assert [tokens(run(chunks, [p], tmp_path))[0] for p in prompts] == base
    small = config(f"cache.device_pages={max(SMALLEST_BANK, 2 + 3 + 8)}")
    rows = run(small, prompts, tmp_path)
    assert tokens(rows) == base
    assert rows[0]["stats"]["bank_misses"] > 0


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8", "float8", "int4"])
def test_a_restart_and_a_replay_change_nothing(config: Any, tmp_path: Path, kv_dtype: str) -> None:
    (prompt,) = prompts_of(1500)
    settings = config(f"cache.kv_dtype={kv_dtype}", "cache.device_pages=24")
    with store_pool(settings, tmp_path) as pool, page_client(settings, pool) as client:
        engine = make_engine(settings, client)
        engine.submit(request("first", prompt, N_NEW))
        whole = run_all(engine)["first"]["token_ids"]
        assert engine.flow.flush(10)
        # another worker, which has only what the stores hold
        with page_client(settings, pool) as other:
            again = make_engine(settings, other)
            again.submit(request("second", prompt, N_NEW, forced=whole[:5]))
            done = run_all(again)["second"]
    assert done["token_ids"] == whole
    assert done["stats"]["tokens_reused"] >= 1408


@pytest.mark.parametrize(
    "n_tokens",
    # one token; page, query block and block edges; sink + window; the candidates' first block
    [1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 192, 193, 319, 320, 321, 327, 328, 329, 400],
)
def test_contexts_at_every_edge_equal_dense(config: Any, llama: Path, n_tokens: int) -> None:
    """Budgets larger than the context: nothing is pruned, and nothing may differ."""
    everything = [f"attention.policies.0.stages.{stage}.keep=4096" for stage in range(2)] + [
        "attention.policies.0.stages.1.top_p=null"
    ]
    prompts = prompts_of(n_tokens)
    want = tokens_without_store(configured(llama), prompts)
    assert tokens_without_store(config(*everything), prompts) == want


def tokens_without_store(settings: Config, prompts: list[Any]) -> list[list[int]]:
    engine = make_engine(settings)
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"row-{i}", prompt, 6))
    done = run_all(engine)
    return [done[f"row-{i}"]["token_ids"] for i in range(len(prompts))]
