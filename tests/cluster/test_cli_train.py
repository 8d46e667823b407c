"""`longreach train-retriever`: what a user sees when it works, and when the input is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from longreach.cluster.cli import app
from longreach.workers.bookmark_file import load_bookmarks

from ..workers.trained import make_tiny_reader, river_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_reader(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return river_texts(tmp_path / "text")


def train(model: Path, tmp_path: Path, *args: str) -> Result:
    fixed = ("--out", tmp_path / "w.safetensors", "--work-dir", tmp_path / "work", "--steps", "2")
    sized = ("--contexts", "2", "--held-out", "1", "--context-tokens", "1536", "--rank", "2")
    sets = ("--set", f"model.name={model}", "--set", "model.n_threads=1")
    return CliRunner().invoke(app, ["train-retriever", *map(str, (*fixed, *sized, *sets, *args))])


def test_weights_are_trained_and_said(model: Path, text: Path, tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    done = train(model, tmp_path, "--text", str(text), "--loss", "both", "--curve", str(curve))
    assert done.exit_code == 0, done.output
    assert "30 documents, 0 questions" in done.output
    assert "recall, held out" in done.output
    assert load_bookmarks(tmp_path / "w.safetensors", model).shape.rank == 2
    assert [row["step"] for row in json.loads(curve.read_text())] == [0, 1]
    again = train(model, tmp_path, "--text", str(text), "--loss", "both", "--resume")
    assert again.exit_code == 0, again.output
    assert "taken up at step 2" in again.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--loss", "mse"), "one of kl, contrastive, both"),
        (("--out", "w.bin"), "must end with .safetensors"),
        (("--tasks", "text,poems"), "no task poems; known: text, needle"),
        (("--text", "/no/such/file"), "/no/such/file does not exist"),
        (("--data", "/no/such.jsonl"), "/no/such.jsonl does not exist"),
        (("--package", "no_such_package"), "'no_such_package' is not installed"),
        (("--context-tokens", "9000"), "the model's window 4096"),
        (("--resume",), "there is no checkpoint"),
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
    assert not (tmp_path / "w.safetensors").exists()


def test_a_bad_line_of_data_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"context": "a", "question": "b", "answer": "a"}\n{"context": "a"}\n')
    failed = train(model, tmp_path, "--data", str(path))
    assert failed.exit_code == 1
    assert "line 2: has no 'question'" in failed.output


def test_no_step_is_a_usage_error(model: Path, tmp_path: Path) -> None:
    assert train(model, tmp_path, "--steps", "0").exit_code == 2
