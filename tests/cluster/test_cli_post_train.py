"""`longreach post-train`: what a user sees when it works, and when the input is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from longreach.cluster.cli import app
from longreach.workers.bookmark_file import shape_for, weights_fingerprint
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.model_source import load_model_config

from ..workers.tiny import make_tiny
from ..workers.trained import make_tiny_reader, river_texts, save_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its bookmarks beside it."""
    made = make_tiny_reader(tmp_path_factory.mktemp("tiny"), hidden_size=32)
    bookmarks = Bookmarks(shape_for(load_model_config(made), 128, 2))
    save_for(weights_of(made), bookmarks, made)
    return made


def weights_of(model: Path) -> Path:
    return model.with_name("bookmarks.safetensors")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return river_texts(tmp_path / "text")


def train(model: Path, tmp_path: Path, *args: str) -> Result:
    n_threads = torch.get_num_threads()
    fixed = ("--out", tmp_path / "new", "--work-dir", tmp_path / "work", "--steps", "2")
    sized = ("--contexts", "2", "--held-out", "1", "--context-tokens", "1280", "--rank", "2")
    small = ("--budget", "640", "--dense-layers", "0")
    sets = ("--set", f"model.name={model}", "--set", "model.n_threads=1")
    weights = ("--set", f"retriever.weights={weights_of(model)}")
    given = map(str, (*fixed, *sized, *small, *sets, *weights, *args))
    try:
        return CliRunner().invoke(app, ["post-train", *given])
    finally:
        torch.set_num_threads(n_threads)


def test_a_model_is_trained_and_said(model: Path, text: Path, tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    done = train(model, tmp_path, "--text", str(text), "--curve", str(curve))
    assert done.exit_code == 0, done.output
    assert "30 documents, 0 questions" in done.output
    assert "step 0 of 2: perplexity" in done.output
    for name in ("sparse before", "dense before", "sparse after", "dense after"):
        assert f"perplexity, held out: {name}" in done.output
    assert [row["step"] for row in json.loads(curve.read_text())] == [0, 1, 2]
    card = json.loads((tmp_path / "new" / "post_training.json").read_text())
    assert card["fingerprint"] == weights_fingerprint(tmp_path / "new")
    shown = CliRunner().invoke(
        app, ["config", "show", "--config", str(tmp_path / "new/longreach.yaml")]
    )
    assert shown.exit_code == 0, shown.output
    refused = train(model, tmp_path, "--text", str(text))
    assert refused.exit_code == 1
    assert "ALREADY_EXISTS" in refused.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--budget", "511"), "budget is 511: the first page (128), the window (256)"),
        (("--window", "100"), "window is 100, at least a page of 128"),
        (("--dense-layers", "0-9"), "dense-layers names all 3 layers"),
        (("--dense-layers", "low"), "dense-layers is 'low'"),
        (("--context-tokens", "9000"), "the model's window 4096"),
        (("--tasks", "text,poems"), "no task poems; known: text, needle"),
        (("--text", "/no/such/file"), "/no/such/file does not exist"),
        (("--resume",), "there is no checkpoint"),
        (("--set", "retriever.weights=/no/such"), "/no/such: no such file"),
        (("--set", "retriever.weights=null"), "give the bookmarks of this model"),
        (("--set", "model.name=/no/such/model"), "no/such/model"),
    ],
)
def test_bad_input_is_one_clear_line(
    model: Path, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    failed = train(model, tmp_path, *args)
    assert failed.exit_code == 1
    assert said in " ".join(failed.output.split())
    assert "Traceback" not in failed.output
    assert not (tmp_path / "new").exists()


def test_bookmarks_of_another_model_are_refused(
    model: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    other = make_tiny("llama", tmp_path_factory.mktemp("other"), hidden_size=48)
    failed = train(other, tmp_path, "--set", f"retriever.weights={weights_of(model)}")
    assert failed.exit_code == 1
    assert "made for tiny with 3 layers, hidden 32" in " ".join(failed.output.split())
