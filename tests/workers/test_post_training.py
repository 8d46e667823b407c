"""Post-training: it learns, goes on after a stop with the same bits, and ends with a model that serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longreach.core.config import ModelConfig, load_config
from longreach.core.errors import AlreadyExists, ConfigError, FailedPrecondition, InvalidInput
from longreach.workers.bookmark_file import (
    load_bookmarks,
    shape_for,
    weights_fingerprint,
)
from longreach.workers.bookmark_source import bookmarks_of
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.lora import merge_lora
from longreach.workers.model_source import load_model_config, policies_of
from longreach.workers.post_run import (
    BOOKMARKS,
    SERVE,
    PostRun,
    decoder_of,
    learned_of,
    run_post_training,
)
from longreach.workers.post_training import PostPlan, PostTraining, by_layer, policies_for
from longreach.workers.sparse_forward import SparseForward, groups_of
from longreach.workers.train_prompt import Ask, Stream
from longreach.workers.train_streams import DataPlan
from longreach.workers.training_run import Progress, Sources

from .test_train_data import sentences
from .tiny import VOCAB, answers, hf_greedy, hf_logits, make_engine, make_tiny, prompts_of
from .trained import Stop, StopAfter, make_tiny_reader, save_for

PAGE = 64
PLAN = PostPlan(n_steps=4, budget=384, window=128, dense_layers="0", rank=4, evaluate_every=2)


def bookmarks_for(directory: Path, path: Path) -> Path:
    torch.manual_seed(0)
    made = Bookmarks(shape_for(load_model_config(directory), PAGE, 4))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.2)
    return save_for(path, made, directory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of few words."""
    return make_tiny("llama", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded one's tokenizer."""
    return make_tiny_reader(tmp_path_factory.mktemp("tiny"), hidden_size=32)


def training_of(directory: Path, folder: Path, plan: PostPlan) -> PostTraining:
    decoder = decoder_of(directory)
    loaded = load_bookmarks(bookmarks_for(directory, folder / "b.safetensors"), directory)
    policies = by_layer(policies_for(plan, PAGE), len(decoder.layers))
    forward = SparseForward(decoder, loaded, policies)
    return PostTraining(forward, learned_of(decoder, plan), plan)


def repeating(seed: int) -> Stream:
    """A line of 40 tokens again and again, with a question's end at 500."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.randint(VOCAB, (40,), generator=generator)
    return Stream(f"line {seed}", line.repeat(16).numpy(), (Ask(500, ()),))


@pytest.mark.parametrize("rank", [4, None])
def test_the_loss_falls_and_only_what_learns_changes(
    plain: Path, tmp_path: Path, rank: int | None
) -> None:
    plan = dataclasses.replace(PLAN, n_steps=12, learning_rate=1e-2, rank=rank)
    training = training_of(plain, tmp_path, plan)
    model = training.forward.decoder.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = [training.train_step([repeating(0)]) for _ in range(12)]
    assert found[-1]["loss"] < found[0]["loss"] - 0.3
    learned = {id(parameter) for parameter in training.learned.values()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (id(parameter) in learned), name
    assert all(p.grad is None for p in training.forward.bookmarks.parameters())


def test_merged_adapters_are_the_model(plain: Path, tmp_path: Path) -> None:
    training = training_of(plain, tmp_path, PLAN)
    forward, layers = training.forward, training.forward.decoder.layers
    token_ids = torch.from_numpy(repeating(1).token_ids)
    groups = groups_of(len(token_ids), PAGE)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return forward.logits(forward.hidden(token_ids, groups, {}))

    plainly = logits()
    for parameter in training.learned.values():
        parameter.data.normal_(std=0.1)
    apart = logits()
    assert float((apart - plainly).abs().max()) > 0.01
    merge_lora(layers)
    assert all(type(layer.mlp.up_proj) is torch.nn.Linear for layer in layers)
    torch.testing.assert_close(logits(), apart, rtol=1e-4, atol=1e-4)


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture
def small(directory: Path, tmp_path: Path) -> Iterator[PostRun]:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(sentences(40, i))
    n_threads = torch.get_num_threads()
    yield PostRun(
        out=tmp_path / "out" / "model",
        work_dir=tmp_path / "work",
        bookmarks=str(bookmarks_for(directory, tmp_path / "b.safetensors")),
        model=ModelConfig(name=str(directory), n_threads=1),
        sources=Sources(text=(folder,)),
        data=DataPlan(n_contexts=3, n_held_out=1, context_tokens=1024, tasks=("text", "needle")),
        plan=PLAN,
        checkpoint_every=2,
    )
    torch.set_num_threads(n_threads)


def test_a_run_that_stops_goes_on_with_the_same_bits(small: PostRun) -> None:
    progress = Progress()
    card = run_post_training(small, progress)
    assert [row["step"] for row in progress.log] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in progress.log if "perplexity" in row] == [0, 2, 4]
    assert card["perplexity"]["sparse after"] == progress.log[-1]["perplexity"]
    assert card["perplexity"]["dense before"] == progress.log[0]["perplexity dense"]

    again = dataclasses.replace(small, out=small.out.with_name("again"))
    with pytest.raises(Stop):
        run_post_training(again, StopAfter(3))
    assert not again.out.exists()
    second = Progress()
    found = run_post_training(dataclasses.replace(again, resume=True), second)
    assert second.log == progress.log  # the third step was made twice, from the checkpoint at two
    assert found["fingerprint"] == card["fingerprint"]


def test_the_folder_is_a_model_with_its_bookmarks(small: PostRun, directory: Path) -> None:
    card = run_post_training(small, Progress())
    assert card["fingerprint"] != card["base_fingerprint"] == weights_fingerprint(directory)
    assert weights_fingerprint(small.out) == card["fingerprint"]
    token_ids = list(range(100, 160))
    difference = hf_logits(small.out, token_ids) - hf_logits(directory, token_ids)
    assert float(difference.abs().max()) > 1e-4
    loaded = load_bookmarks(small.out / BOOKMARKS, small.out)
    base = load_bookmarks(small.bookmarks, directory)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), name
    with pytest.raises(ConfigError, match="made for tiny with weights"):
        load_bookmarks(small.bookmarks, small.out)

    config = load_config([small.out / SERVE], [])
    assert bookmarks_of(config) is not None
    assert policies_of(config, 3) == by_layer(policies_for(PLAN, PAGE), 3)
    prompts = prompts_of(300, 130)  # within the budget: what dense attention says
    assert answers(make_engine(config), prompts, 4) == hf_greedy(small.out, prompts, 4)
    with pytest.raises(AlreadyExists, match="exists"):
        run_post_training(small, Progress())


def test_a_checkpoint_of_another_run_is_refused(small: PostRun) -> None:
    with pytest.raises(InvalidInput, match=r"no checkpoint .* start without --resume"):
        run_post_training(dataclasses.replace(small, resume=True), Progress())
    with pytest.raises(Stop):
        run_post_training(small, StopAfter(2))
    other = dataclasses.replace(small.plan, budget=448)
    with pytest.raises(FailedPrecondition, match="made with other plan; give the same"):
        run_post_training(dataclasses.replace(small, plan=other, resume=True), Progress())


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"budget": 255}, r"budget is 255: the first page \(64\), the window \(128\).* need 256"),
        ({"window": 63}, "window is 63, at least a page of 64"),
        ({"dense_layers": "first"}, "dense-layers is 'first': give 0-1"),
        ({"dense_layers": "0-2"}, "dense-layers names all 3 layers"),
    ],
)
def test_plans_that_cannot_be(plan: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        by_layer(policies_for(dataclasses.replace(PLAN, **plan), PAGE), 3)  # type: ignore[arg-type]
