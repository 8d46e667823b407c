"""The benchmark of post-training: values found as greedy decoding would, rows kept, both models measured."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from longreach.workers.bookmark_file import shape_for
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.model_source import load_model_config
from longreach.workers.post_training import PostPlan

from ..workers.tiny import hf_greedy, hf_logits
from ..workers.trained import save_for


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.post_train")


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = Bookmarks(shape_for(load_model_config(tiny), rank=2))
    made.embedding.data.normal_()
    return save_for(tmp_path / "tiny.safetensors", made, tiny)


def test_a_value_is_found_where_greedy_decoding_says_it(
    bench: ModuleType, tiny: Path, weights: Path
) -> None:
    prompt = np.random.default_rng(0).integers(100, 400, 300)
    (said,) = hf_greedy(tiny, [prompt], 6)
    wrong = [*said[:4], said[4] + 1, said[5]]
    values = (bench.Value("right", 300, 306), bench.Value("short", 300, 304))
    forwards = bench.forwards(tiny, str(weights), PostPlan(budget=512))
    for tail, hits in ((said, [True, True]), (wrong, [False, True])):
        token_ids = np.concatenate([prompt, tail])
        context = bench.Context("facts", "made up", token_ids, (300,), values)
        found = bench.measure(forwards["dense"], context, ())["values"]
        assert [value["hit"] for value in found] == hits
        nats = -hf_logits(tiny, token_ids.tolist()).log_softmax(dim=-1)
        wanted = [float(nats[at - 1, token_ids[at]]) for at in range(300, 306)]
        assert found[0]["nats"] == pytest.approx(sum(wanted) / 6, abs=1e-3)


def test_both_models_are_measured_and_rows_kept(
    bench: ModuleType,
    tiny: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "ensure_embedded_model", lambda: tiny)
    out = tmp_path / "post-train.json"
    given = ("--quick", "--out", str(out), "--bookmarks", str(weights))
    sets = ("--set", f"model.name={tiny}", "--set", "model.n_threads=1")
    bench.main([*given, *sets])
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert {row["kind"] for row in rows} == {"worlds", "documentation", "needles", "facts"}
    assert [row["how"] for row in rows] == ["sparse", "dense"] * (len(rows) // 2)
    assert {len(row["values"]) for row in rows if row["kind"] == "facts"} == {5}
    assert {len(row["values"]) for row in rows if row["kind"] == "needles"} == {4}
    for (kind, n), by_side in bench_report().perplexities(result).items():
        assert n in (1024, 1536)
        assert kind in ("worlds", "documentation")
        assert math.log(by_side["before", "sparse"]) < 20
    assert "before, dense" in capsys.readouterr().out

    monkeypatch.setattr(bench, "measure", None)  # nothing is measured twice
    bench.main([*given, *sets])
    assert json.loads(out.read_text())["rows"] == rows


def bench_report() -> ModuleType:
    return importlib.import_module("benchmarks.post_train_report")


def test_the_part_that_sparsity_costs_is_told() -> None:
    report = bench_report()
    rows = [
        {"when": when, "how": how, "kind": "worlds", "nats": {"4096": math.log(value)}}
        for when, how, value in (
            ("before", "dense", 10.0),
            ("before", "sparse", 11.0),
            ("after", "dense", 8.0),
            ("after", "sparse", 8.4),
        )
    ]
    (line,) = report.lines({"rows": rows})
    assert line == "worlds, 4,096 tokens: the budget costs +10.00% before, +5.00% after"
