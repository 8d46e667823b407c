"""Training: it learns what it is asked to, goes on after a stop with the same bits, ends with a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from longreach.core.config import Config, ModelConfig
from longreach.core.errors import FailedPrecondition, InvalidInput
from longreach.workers.bookmark_file import load_bookmarks, read_card, shape_for
from longreach.workers.bookmarks import Bookmarks, run_bookmarks
from longreach.workers.model import ModelAdapter
from longreach.workers.prompt import PromptBuilder
from longreach.workers.train_capture import Capture, CaptureFolder
from longreach.workers.train_data import Document
from longreach.workers.train_forward import Frozen, states_of
from longreach.workers.train_prompt import StreamBuilder
from longreach.workers.train_retriever import (
    Training,
    TrainingPlan,
    evaluate,
    gold_pages,
    grid_of,
    prepare,
)
from longreach.workers.train_run import Run, end_embedding, run_training
from longreach.workers.train_streams import DataPlan, streams
from longreach.workers.training_run import Progress, Sources

from .test_train_data import sentences
from .trained import Stop, StopAfter, make_tiny_reader

PAGE = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded one's tokenizer."""
    return make_tiny_reader(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelAdapter:
    return ModelAdapter(directory, own_kernels=False)


@pytest.fixture(scope="module")
def captures(
    directory: Path, model: ModelAdapter, tmp_path_factory: pytest.TempPathFactory
) -> list[Capture]:
    builder = StreamBuilder(PromptBuilder(Config(model=ModelConfig(name=str(directory)))))
    documents = [Document(f"book {i}", sentences(40, i)) for i in range(20)]
    plan = DataPlan(n_contexts=3, context_tokens=1024, tasks=("text", "needles", "sentences"))
    folder = CaptureFolder(tmp_path_factory.mktemp("captures"), "tiny", lambda: model)
    made = streams(plan, documents, [], builder, held_out=False)
    return [folder.get(stream, lambda _: None) for stream in made]


def begin(model: ModelAdapter, captures: list[Capture], plan: TrainingPlan) -> Training:
    torch.manual_seed(0)
    bookmarks = Bookmarks(shape_for(model.config, PAGE, 8))
    frozen = Frozen(model.layers, model.rope)
    prepare(bookmarks, end_embedding(model), frozen, captures)
    return Training(bookmarks, frozen, plan)


@pytest.mark.parametrize("loss", ["kl", "contrastive", "both"])
def test_the_loss_falls(model: ModelAdapter, captures: list[Capture], loss: str) -> None:
    plan = TrainingPlan(n_steps=30, n_contexts=3, n_queries=4, learning_rate=1e-2, loss=loss)  # type: ignore[arg-type]
    training = begin(model, captures, plan)
    before = {n: p.detach().clone() for n, p in training.bookmarks.named_parameters()}
    found = [training.train_step(captures) for _ in range(30)]
    assert set(found[0]) == {"norm", *({"kl", "contrastive"} if loss == "both" else {loss})}
    for name in set(found[0]) - {"norm"}:
        first, last = (sum(row[name] for row in part) for part in (found[:5], found[-5:]))
        assert last < 0.97 * first, name
    same = {n for n, p in training.bookmarks.named_parameters() if torch.equal(p, before[n])}
    assert same == ({"nearness"} if loss == "contrastive" else set())  # an answer stands anywhere
    assert all(p.grad is None for layer in model.layers for p in layer.parameters())


def test_recall_rises_on_what_was_trained(model: ModelAdapter, captures: list[Capture]) -> None:
    plan = TrainingPlan(n_steps=60, n_contexts=3, n_queries=8, learning_rate=1e-2)
    training = begin(model, captures, plan)
    before = evaluate(training.bookmarks, training.frozen, captures)
    for _ in range(60):
        training.train_step(captures)
    after = evaluate(training.bookmarks, training.frozen, captures)
    assert after["kl"] < before["kl"]
    assert after["recall all 0.333"] > before["recall all 0.333"] + 0.02


def test_gold_pages_are_those_that_hold_the_answer(captures: list[Capture]) -> None:
    capture = captures[1]
    for offset in (0, 16):
        grid = grid_of(capture, PAGE, offset, [100, 200])
        gold = gold_pages(capture, grid, PAGE)
        assert len(grid.positions) == len(grid.page_ends) + 2 + len(capture.asks)
        assert not gold[: -len(capture.asks)].any()
        for row, ask in zip(gold[-len(capture.asks) :], capture.asks, strict=True):
            wanted = {
                (token - offset) // PAGE
                for start, end in ask.gold
                for token in range(start, end)
                if token >= offset
            }
            assert set(row.nonzero()[:, 0].tolist()) == wanted


def test_the_rate_rises_then_falls() -> None:
    plan = TrainingPlan(n_steps=100, learning_rate=1.0)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


def test_training_runs_the_bookmarks_as_they_are(
    model: ModelAdapter, captures: list[Capture]
) -> None:
    """The forward of training and `run_bookmarks` over unrotated keys give the same, at a start too."""
    torch.manual_seed(0)
    bookmarks = Bookmarks(shape_for(model.config, PAGE, 8))
    for parameter in bookmarks.parameters():
        parameter.data.normal_(std=0.2)
    frozen = Frozen(model.layers, model.rope)
    placed = [(captures[0], torch.tensor([5, 62, 63, 64, 500])), (captures[1], torch.tensor([900]))]
    with torch.no_grad():
        found = states_of(bookmarks, frozen, placed)
        row = 0
        for capture, positions in placed:
            kv = capture.rotated_keys_values().float()
            where = torch.arange(capture.n_tokens)
            for position in positions.tolist():
                first = max(0, position + 1 - PAGE)
                cut = kv[:, :, :, first : position + 1]
                cut = torch.nn.functional.pad(cut, (0, 0, PAGE - cut.shape[3], 0))[:, :, None]
                plain = model.rope.rotate(cut[:, 0], -(position + 1 - PAGE + where[:PAGE]))
                wanted = run_bookmarks(
                    bookmarks,
                    model.layers,
                    model.rope,
                    lambda layer, plain=plain, cut=cut: (plain[layer], cut[layer, 1]),
                    torch.tensor([min(PAGE, position + 1)]),
                )
                torch.testing.assert_close(
                    found.keys[:, row], wanted.keys[:, 0], rtol=1e-3, atol=1e-3
                )
                torch.testing.assert_close(
                    found.queries[:, row], wanted.queries[:, 0], rtol=1e-3, atol=1e-3
                )
                row += 1


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture
def small(directory: Path, tmp_path: Path) -> Run:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(sentences(40, i))
    return Run(
        out=tmp_path / "out" / "weights.safetensors",
        work_dir=tmp_path / "work",
        model=ModelConfig(name=str(directory), n_threads=1),
        sources=Sources(text=(folder,)),
        data=DataPlan(n_contexts=3, n_held_out=1, context_tokens=1280, tasks=("text", "needles")),
        plan=TrainingPlan(n_steps=6, n_queries=4, loss="both", evaluate_every=3),
        rank=4,
        page_tokens=PAGE,
        checkpoint_every=2,
    )


def test_a_run_that_stops_goes_on_with_the_same_bits(small: Run, directory: Path) -> None:
    progress = Progress()
    card = run_training(small, progress)
    whole = load_bookmarks(small.out, directory)
    assert [row["step"] for row in progress.log] == list(range(6))
    assert [step for step, row in enumerate(progress.log, 1) if "recall all 0.333" in row] == [3, 6]
    assert json.loads(card.model_dump_json()) == json.loads(read_card(small.out).model_dump_json())
    assert card.recall == {k: v for k, v in progress.log[-1].items() if k.startswith("recall")}
    assert card.training["contexts"] == 3

    with pytest.raises(Stop):
        run_training(
            dataclasses.replace(small, out=small.out.with_name("b.safetensors")), StopAfter(5)
        )
    again = Progress()
    second = dataclasses.replace(small, out=small.out.with_name("b.safetensors"), resume=True)
    run_training(second, again)
    assert again.log == progress.log  # the fifth step was made twice, from the checkpoint at four
    for name, tensor in load_bookmarks(second.out, directory).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(small: Run) -> None:
    with pytest.raises(InvalidInput, match=r"no checkpoint .* start without --resume"):
        run_training(dataclasses.replace(small, resume=True), Progress())
    with pytest.raises(Stop):
        run_training(small, StopAfter(2))
    other = dataclasses.replace(small.plan, learning_rate=0.5)
    with pytest.raises(FailedPrecondition, match="made with other plan; give the same"):
        run_training(dataclasses.replace(small, plan=other, resume=True), Progress())
    (small.work_dir / "checkpoint.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InvalidInput, match="cannot be read"):
        run_training(dataclasses.replace(small, resume=True), Progress())


def test_contexts_beyond_the_window_are_refused(small: Run) -> None:
    data = dataclasses.replace(small.data, context_tokens=4112)
    with pytest.raises(InvalidInput, match="4112, the model's window 4096"):
        run_training(dataclasses.replace(small, data=data), Progress())
