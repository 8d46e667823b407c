"""The benchmark of page indexes: recall as a loop would count it, every method measured and kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longreach.workers.bookmark_file import shape_for
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.model_source import load_model_config

from ..workers.trained import save_for


@pytest.fixture
def measure() -> ModuleType:
    return importlib.import_module("benchmarks.recall_measure")


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = Bookmarks(shape_for(load_model_config(tiny), rank=2))
    made.embedding.data.normal_()
    recall = {"recall all 0.333": 0.5, "recall far 0.333": 0.4}
    return save_for(tmp_path / "tiny.safetensors", made, tiny, recall)


def test_recall_is_counted_page_by_page(measure: ModuleType) -> None:
    torch.manual_seed(1)
    scores, mass = torch.rand(3, 12).round(decimals=1), torch.rand(2, 3, 12)
    allowed = torch.ones(3, 12, dtype=torch.bool)
    allowed[:, 0], allowed[1, 6:], allowed[2] = False, False, False
    found = measure.shares_kept(scores.expand(2, 3, 12), mass, allowed)
    for head in range(2):
        for row in range(3):
            pages = allowed[row].nonzero()[:, 0].tolist()
            ranked = sorted(pages, key=lambda p, row=row: (-float(scores[row, p]), p))
            total = sum(float(mass[head, row, p]) for p in pages)
            third = -(-len(pages) // 3)
            for column, k in enumerate((third, *measure.PAGES)):
                value = found[head, row, column]
                if k > third or not pages:
                    assert value.isnan()
                else:
                    kept = sum(float(mass[head, row, p]) for p in ranked[:k])
                    assert float(value) == pytest.approx(kept / total, rel=1e-5)


def test_every_index_is_measured_and_kept(
    tiny: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recall = importlib.import_module("benchmarks.recall")
    out = tmp_path / "recall.json"
    paths = ("--out", str(out), "--bookmarks", str(weights), "--captures", str(tmp_path))
    sets = ("--set", f"model.name={tiny}", "--set", "model.n_threads=1")
    recall.main(["--quick", *paths, *sets])
    result = json.loads(out.read_text())
    assert [(r["kind"], r["role"]) for r in result["rows"]] == [
        ("text", "prefill"),
        ("text", "decode"),
        ("tasks", "prefill"),
        ("tasks", "decode"),
    ]
    for row in result["rows"]:
        methods = row["methods"]
        assert methods["bookmark"]["bytes"] == 2 * 16 * 2
        assert methods["bounds (softmax)"]["bytes"] == 2 * 2 * 16 * 2
        best = methods["oracle"]["all"]["recall"]["third"]
        for name, found in methods.items():
            of_third = found["all"]["recall"]["third"]
            assert 0 < of_third <= best, name
            assert len(found["all"]["by_layer"]) == 4
            assert found["worst_head"]["recall"] <= of_third + 1e-3 or name == "oracle"
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "recall of page mass" in capsys.readouterr().out


def test_training_is_compared_with_what_is_shipped(weights: Path, tmp_path: Path) -> None:
    training = importlib.import_module("benchmarks.training")
    shipped = {"recall all 0.333": 0.5, "recall far 0.333": 0.4}
    rows = training.compared({"recall all 0.333": 0.485}, shipped)
    assert [row["met"] for row in rows] == [True, False]
    log = [{"step": i, "kl": 1 / (i + 1)} for i in range(9)]
    log.append({"step": 9, "kl": 0.1, "recall all 0.333": 0.6})
    assert training.draw(log, tmp_path / "curve.png").stat().st_size > 5_000
