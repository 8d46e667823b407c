"""A whole training run: data, captures, steps, checkpoints, the file at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.config import Config, ModelConfig
from ..core.errors import InvalidInput
from .bookmark_file import Card, save_bookmarks, shape_for, weights_fingerprint
from .bookmarks import Bookmarks
from .model import ModelAdapter
from .model_source import load_model_config, model_dir
from .prompt import PromptBuilder
from .threads import use_threads
from .train_capture import Capture, CaptureFolder
from .train_checkpoint import load_checkpoint, save_checkpoint
from .train_data import (
    PACKAGES,
    Document,
    Example,
    file_documents,
    licences,
    package_documents,
    read_jsonl,
)
from .train_forward import Frozen
from .train_prompt import StreamBuilder
from .train_retriever import Training, TrainingPlan, evaluate, prepare
from .train_streams import DataPlan, streams


@dataclass(frozen=True)
class Sources:
    """Where text comes from; with nothing given, the documentation of `PACKAGES`."""

    packages: tuple[str, ...] = ()
    text: tuple[Path, ...] = ()
    jsonl: tuple[Path, ...] = ()

    def read(self) -> tuple[list[Document], list[Example], dict[str, str]]:
        """Documents, rows with questions, and what is to be said of their origin."""
        packages = self.packages
        if not (packages or self.text or self.jsonl):
            packages = PACKAGES
        documents = package_documents(packages) if packages else []
        documents += file_documents(self.text)
        rows = [row for path in self.jsonl for row in read_jsonl(path)]
        origin = licences(packages)
        origin |= {str(path.name): "given by the user" for path in (*self.text, *self.jsonl)}
        return documents, rows, origin


@dataclass(frozen=True)
class Run:
    """Everything a run is made of."""

    out: Path
    work_dir: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    sources: Sources = field(default_factory=Sources)
    data: DataPlan = field(default_factory=DataPlan)
    plan: TrainingPlan = field(default_factory=TrainingPlan)
    rank: int | None = 32
    page_tokens: int = 128
    resume: bool = False
    checkpoint_every: int = 100


@dataclass
class Progress:
    """What a run tells while it goes on; every method may be overridden."""

    log: list[dict[str, float]] = field(default_factory=list)

    def say(self, line: str) -> None:
        """One step of the preparation."""

    def captured(self, done: int, total: int) -> None:
        """A context has been read by the dense model."""

    def stepped(self, step: int, row: dict[str, float]) -> None:
        """A training step is over; the row has its losses and, where it was measured, recall."""


def run_training(run: Run, progress: Progress) -> Card:
    """Train, save, and return the card of what was saved.

    Raises InvalidInput and its kind for data and settings that cannot be used, UnsupportedModel.
    """
    run.data.check()
    directory = model_dir(run.model)
    window = int(load_model_config(directory).max_position_embeddings)
    if run.data.context_tokens > window:
        raise InvalidInput(
            f"context-tokens is {run.data.context_tokens}, the model's window {window}: dense attention "
            "beyond it would teach nothing"
        )
    use_threads(run.model.n_threads)
    fingerprint = weights_fingerprint(directory)
    checkpoint = run.work_dir / "checkpoint.safetensors"
    if run.resume and not checkpoint.is_file():
        raise InvalidInput(f"there is no checkpoint in {run.work_dir}; start without --resume")

    documents, rows, origin = run.sources.read()
    progress.say(f"{len(documents):,} documents, {len(rows):,} questions")
    model = ModelAdapter(directory, own_kernels=False)
    captures, held_out = _captures(run, model, documents, rows, fingerprint, progress)

    frozen = frozen_of(model)
    torch.manual_seed(run.plan.seed)
    bookmarks = Bookmarks(shape_for(model.config, run.page_tokens, run.rank))
    training = Training(bookmarks, frozen, run.plan)
    about = {
        "model": fingerprint,
        "shape": asdict(bookmarks.shape),
        "data": asdict(run.data),
        "contexts": [capture.path.stem for capture in (*captures, *held_out)],
    }
    if run.resume:
        progress.log[:] = load_checkpoint(checkpoint, training, about)
        progress.say(f"taken up at step {training.step}")
    else:
        prepare(bookmarks, end_embedding(model), frozen, captures)
    recall = _steps(run, training, captures, held_out, checkpoint, about, progress)
    return save_bookmarks(
        run.out,
        bookmarks,
        model=run.model.name,
        model_fingerprint=fingerprint,
        training={
            "plan": asdict(run.plan),
            "data": asdict(run.data),
            "text": origin,
            "contexts": len(captures),
            "tokens": sum(capture.n_tokens for capture in captures),
        },
        recall=recall,
    )


def _captures(
    run: Run,
    model: ModelAdapter,
    documents: Sequence[Document],
    rows: Sequence[Example],
    fingerprint: str,
    progress: Progress,
) -> tuple[list[Capture], list[Capture]]:
    """Contexts to train on, contexts held out."""
    builder = StreamBuilder(PromptBuilder(Config(model=run.model)))
    wanted = [
        streams(run.data, documents, rows, builder, held_out=held_out) for held_out in (False, True)
    ]
    folder = CaptureFolder(run.work_dir / "captures", fingerprint, lambda: model)
    total, found = sum(map(len, wanted)), []
    for i, stream in enumerate((*wanted[0], *wanted[1])):
        progress.captured(i, total)
        found.append(folder.get(stream, progress.say))
    progress.captured(total, total)
    return found[: len(wanted[0])], found[len(wanted[0]) :]


def _steps(
    run: Run,
    training: Training,
    captures: Sequence[Capture],
    held_out: Sequence[Capture],
    checkpoint: Path,
    about: dict[str, Any],
    progress: Progress,
) -> dict[str, float]:
    plan = run.plan
    while training.step < plan.n_steps:
        row = {"step": training.step, "rate": plan.rate(training.step)}
        row |= training.train_step(captures)
        last = training.step == plan.n_steps
        if last or training.step % plan.evaluate_every == 0:
            row |= evaluate(training.bookmarks, training.frozen, held_out)
        progress.log.append(row)
        if last or training.step % run.checkpoint_every == 0:
            save_checkpoint(checkpoint, training, about, progress.log)
        progress.stepped(training.step, row)
    last_row = progress.log[-1] if progress.log else {}
    return {name: value for name, value in last_row.items() if name.startswith("recall")}


def frozen_of(model: ModelAdapter) -> Frozen:
    return Frozen(model.layers, model.rope)


def end_embedding(model: ModelAdapter) -> torch.Tensor:
    """Of the token with which texts end, if the model has one: where a bookmark's embedding starts."""
    embeddings = model.embeddings.detach().float()
    ends = sorted(model.eos_token_ids)
    return embeddings[ends[0]] if ends else embeddings.mean(dim=0)
