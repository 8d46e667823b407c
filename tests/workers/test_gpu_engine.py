"""The GPU's path of the engine in Triton's interpreter: the same answers as the CPU's, resident or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.config import Config, load_config
from longreach.core.errors import ConfigError
from longreach.kvstore.page_client import PageClient
from longreach.workers.engine import Engine
from longreach.workers.gpu_executor import GpuExecutor
from longreach.workers.gpu_memory import always_reachable
from longreach.workers.gpu_steps import GpuDecodeStep
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_geometry, policies_of, recipe_for

from ..kernels.triton_attend_helpers import no_work
from .tiny import (
    engine_logits,
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

N_NEW = 3
SPARSE = """
attention:
  policies:
    - layers: "0"
      sink: 64
      window: 64
      select_rope: relative
      head_reduce: kv-group
      reduce: softmax
      stages:
        - {scorer: bounds, chunk: 64, keep: 192, refresh: 4, query_stride: 16, spread: 0.4}
        - {scorer: bounds, chunk: 8, keep: 64, refresh: 2, query_stride: 16}
    - layers: rest
      sink: 64
      window: 64
      stages:
        - {scorer: mean, chunk: 64, keep: 192, refresh: 4, query_stride: 16}
        - {scorer: search, chunk: 16, keep: 64, refresh: 2, query_stride: 16}
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small even for a tiny model: interpreted programs cost milliseconds, one for each KV head."""
    path = tmp_path_factory.mktemp("gpu-llama")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return make_tiny("llama", path, num_hidden_layers=2, **heads)


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policies") / "sparse.yaml"
    path.write_text(SPARSE)
    return str(path)


def config_of(llama: Path, *sets: str, files: tuple[str, ...] = ()) -> Config:
    small = ("model.max_context_tokens=2048", "gateway.max_new_tokens=64", "worker.max_rows=4")
    return tiny_config(llama, *small, "cache.device_pages=64", *sets, files=files)


def gpu_engine(config: Config, client: PageClient | None = None) -> Engine:
    model = ModelAdapter(Path(config.model.name), own_kernels=False)
    geometry = model_geometry(config)
    policies = policies_of(config, geometry.n_layers)
    recipe = recipe_for(config).fingerprint()
    executor = GpuExecutor(
        config,
        model,
        geometry,
        policies,
        recipe,
        client,
        torch.device("cpu"),
        always_reachable,
        precision="ieee",
    )
    return Engine(config, model, executor, recipe)


def answers(engine: Engine, prompts: list[np.ndarray], n_new: int = N_NEW) -> list[dict[str, Any]]:
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"row-{i}", prompt, n_new))
    done = run_all(engine)
    return [done[f"row-{i}"] for i in range(len(prompts))]


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["token_ids"] for row in rows]


def test_dense_answers_are_those_of_transformers(llama: Path) -> None:
    prompts = prompts_of(63, 130)
    found = tokens(answers(gpu_engine(config_of(llama)), prompts))
    assert found == hf_greedy(llama, prompts, N_NEW)


def test_sparse_logits_are_those_of_the_cpu(llama: Path, sparse: str) -> None:
    config = config_of(llama, files=(sparse,))
    (prompt,) = prompts_of(330)
    want_tokens, want = engine_logits(make_engine(config), prompt, N_NEW)
    found_tokens, found = engine_logits(gpu_engine(config), prompt, N_NEW)
    assert found_tokens == want_tokens
    torch.testing.assert_close(found, want, atol=2e-4 * float(want.std()), rtol=0)


def test_rows_together_and_alone(llama: Path, sparse: str) -> None:
    """A row that ends leaves an empty place, a row that comes takes it."""
    config = config_of(llama, files=(sparse,))
    prompts = prompts_of(130, 200)
    alone = [tokens(answers(gpu_engine(config), [p]))[0] for p in prompts]
    engine = gpu_engine(config)
    for i, (prompt, n_new) in enumerate(zip(prompts, (1, 3), strict=True)):
        engine.submit(request(f"row-{i}", prompt, n_new))
    done = run_all(engine)
    for i, n_new in enumerate((1, 3)):
        n = min(n_new, N_NEW)
        assert done[f"row-{i}"]["token_ids"][:n] == alone[i][:n]


def test_a_small_device_changes_nothing(llama: Path, sparse: str, tmp_path: Path) -> None:
    """Pages leave their places for the store; what is read from there, or copied back, is the same."""
    prompts = prompts_of(230, 200, shared=192)
    want = tokens(answers(gpu_engine(config_of(llama, files=(sparse,))), prompts))
    small = config_of(llama, "cache.device_pages=3", files=(sparse,))
    with store_pool(small, tmp_path) as pool, page_client(small, pool) as client:
        engine = gpu_engine(small, client)
        rows = answers(engine, prompts)
        assert tokens(rows) == want
        assert engine.flow.memory.n_used == 0
        # the same again: every page exists, in the store
        again = gpu_engine(small, client)
        rows = answers(again, prompts)
        assert tokens(rows) == want
        assert all(row["stats"]["tokens_reused"] >= 192 for row in rows)


def test_a_replayed_row_goes_on_where_it_was(llama: Path, sparse: str, tmp_path: Path) -> None:
    config = config_of(llama, files=(sparse,))
    (prompt,) = prompts_of(200)
    with store_pool(config, tmp_path) as pool, page_client(config, pool) as client:
        (want,) = tokens(answers(gpu_engine(config, client), [prompt], 4))
        engine = gpu_engine(config, client)
        engine.submit(request("again", prompt, 4, forced=want[:2]))
        assert run_all(engine)["again"]["token_ids"] == want


@pytest.mark.parametrize("kv_dtype", ["float8", "int4"])
def test_formats_of_kv(llama: Path, sparse: str, kv_dtype: str) -> None:
    config = config_of(llama, f"cache.kv_dtype={kv_dtype}", files=(sparse,))
    (prompt,) = prompts_of(220)
    want_tokens, want = engine_logits(make_engine(config), prompt, 2)
    found_tokens, found = engine_logits(gpu_engine(config), prompt, 2)
    assert found_tokens == want_tokens
    torch.testing.assert_close(found, want, atol=2e-3 * float(want.std()), rtol=0)


def test_keys_that_are_not_finite_fail_their_row(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longreach.kernels import gpu_ops

    append = gpu_ops.append_device

    def poison(pages: Any, position: Any, k: Any, v: Any, *rest: Any) -> None:
        k = k.clone()
        k[position == 71] = torch.nan
        append(pages, position, k, v, *rest)

    engine = gpu_engine(config_of(llama))
    monkeypatch.setattr(gpu_ops, "append_device", poison)
    prompts = prompts_of(70, 80)
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"row-{i}", prompt, 3))
    errors, done = {}, {}
    while engine.n_rows:
        for event in engine.step():
            if event.error is not None:
                errors[event.row_id] = event.error
            if event.kind == "done":
                done[event.row_id] = event.payload["token_ids"]
    # the other one never stands there while it decodes
    assert list(errors) == ["row-0"]
    assert errors["row-0"].reason == "NUMERICAL_ERROR"
    assert len(done["row-1"]) == 3


def test_attention_of_a_step_neither_waits_nor_allocates(
    llama: Path, sparse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = gpu_engine(config_of(llama, files=(sparse,)))
    (prompt,) = prompts_of(200)
    engine.submit(request("row", prompt, 3))
    while not (engine.rows and len(engine.rows[0].tokens) == 2):
        engine.step()
    executor = engine._executor
    assert isinstance(executor, GpuExecutor)
    executor.batch.load(engine.rows, 64)
    q, k, v = (torch.randn(n, 1, 16) for n in (2, 1, 1))
    step = GpuDecodeStep(executor.layers, executor.batch, 1)
    with no_work(monkeypatch):
        step.begin()
        for layer in range(2):
            out = step.attend(layer, q, k, v, 0.25)
    assert bool(torch.isfinite(out).all())


def test_what_a_gpu_does_not_do_is_refused(llama: Path, sparse: str) -> None:
    tail = load_config([sparse], [f"model.name={llama}"])
    policy = tail.attention.policies[0].model_copy(update={"tail": 64, "layers": "all"})
    attention = tail.attention.model_copy(update={"policies": (policy,)})
    config = tail.model_copy(update={"attention": attention})
    with pytest.raises(ConfigError, match="tail"):
        gpu_engine(config)


def test_a_missing_device_is_a_config_error(llama: Path) -> None:
    from longreach.workers.executors import load_model

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = config_of(llama, "model.device=cuda")
    with pytest.raises(ConfigError, match="no CUDA device"):
        load_model(config.model, llama)
