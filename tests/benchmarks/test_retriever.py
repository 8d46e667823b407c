"""The retriever's benchmark in short, with real processes: it counts queries, and kill -9 changes nothing."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longreach.core.config import load_config
from longreach.kvstore.transport import serve
from longreach.workers.bookmark_file import shape_for
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.model_source import load_model_config
from longreach.workers.retriever_service import RetrieverService

from ..workers.trained import save_for

PRESET = """
model: {{name: {model}}}
cache: {{page_tokens: 128}}
store: {{capacity_bytes: 67108864}}
retriever: {{weights: {weights}}}
attention:
  policies:
    - layers: "0"
      sink: 128
      window: 256
      stages: [{{scorer: mean, chunk: 128, keep: 256, refresh: 8}}]
    - layers: rest
      sink: 128
      window: 256
      stages:
        - {{scorer: bookmark, chunk: 128, keep: 256, refresh: 8}}
        - {{scorer: bounds, chunk: 8, keep: 128, refresh: 4}}
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = importlib.import_module("benchmarks.retriever")
    monkeypatch.setattr(made, "SMALLER", ())
    return made


@pytest.fixture(scope="module")
def preset(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retriever")
    torch.manual_seed(0)
    bookmarks = Bookmarks(shape_for(load_model_config(tiny), rank=2))
    for parameter in bookmarks.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    weights = save_for(directory / "weights.safetensors", bookmarks, tiny)
    path = directory / "preset.yaml"
    path.write_text(PRESET.format(model=tiny, weights=weights))
    return path


@pytest.fixture
def worker(bench: ModuleType, preset: Path) -> Iterator[Any]:
    harness = importlib.import_module("benchmarks.harness")
    config = load_config([str(preset)])
    model, prompts = harness.load_model(config)
    model.eos_token_ids = frozenset()
    with harness.open_session(config, model, prompts) as session:
        yield bench.Worker(Namespace(config=str(preset), set=[]), session, model, prompts)


def test_killed_in_decode_it_changes_no_token(bench: ModuleType, worker: Any) -> None:
    texts = importlib.import_module("benchmarks.texts")
    text = texts.build_text(worker.prompts.count, 5, 1500)
    prompts = [worker.prompts.build(text, question) for question in bench.QUESTIONS[:2]]
    server = serve(RetrieverService(worker.config(bench.AHEAD), "retriever-0"))
    try:
        engine = worker.engine(bench.AHEAD, server.address)
        quiet = bench.decode(engine, prompts, 40, "quiet")
    finally:
        server.stop()
    assert len(quiet.step_ms) > 20
    struck = bench.decode_and_kill(worker, bench.AHEAD, prompts, 40, 15)
    assert struck.tokens == quiet.tokens
    assert struck.n_submitted_again > 0


def test_queries_of_many_contexts_are_counted(bench: ModuleType, preset: Path) -> None:
    config = load_config([str(preset)], list(bench.REMOTE))
    row = bench.queries(config, 300, 2, seconds=0.2)
    assert row["queries"] >= 6
    assert row["queries_per_s"] > 0
    assert row["table_bytes"] >= 2 * 300 * 2 * 16 * 4
