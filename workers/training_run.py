"""What every training run shares: its data, its checks, its steps and checkpoints, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..core.config import Config, ModelConfig
from ..core.errors import InvalidInput
from .model_source import load_model_config
from .prompt import PromptBuilder
from .train_checkpoint import Learning, save_checkpoint
from .train_data import (
    PACKAGES,
    Document,
    Example,
    file_documents,
    licences,
    package_documents,
    read_jsonl,
)
from .train_prompt import Stream, StreamBuilder
from .train_streams import DataPlan, streams

Row = dict[str, float]


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


@dataclass
class Progress:
    """What a run tells while it goes on; every method may be overridden."""

    log: list[Row] = field(default_factory=list)

    def say(self, line: str) -> None:
        """One step of the preparation."""

    def captured(self, done: int, total: int) -> None:
        """A context has been read by the dense model."""

    def stepped(self, step: int, row: Row) -> None:
        """A training step is over; the row has its losses and what was measured after it."""


@dataclass(frozen=True)
class Contexts:
    """What a run reads, and what is to be said of its origin."""

    own: list[Stream]
    held_out: list[Stream]
    origin: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Everything a run is made of, but its plan. out: what it makes."""

    CHECKPOINT: ClassVar[str]
    """Name of the file in the working folder."""

    out: Path
    work_dir: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    sources: Sources = field(default_factory=Sources)
    data: DataPlan = field(default_factory=DataPlan)
    resume: bool = False
    checkpoint_every: int

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / self.CHECKPOINT

    def check(self, model_directory: Path, why: str) -> None:
        """Raises InvalidInput for data that cannot be used, or a checkpoint that is not there. why: contexts
        beyond the model's window are of no use."""
        self.data.check()
        window = int(load_model_config(model_directory).max_position_embeddings)
        if self.data.context_tokens > window:
            raise InvalidInput(
                f"context-tokens is {self.data.context_tokens}, the model's window {window}: {why}"
            )
        if self.resume and not self.checkpoint.is_file():
            raise InvalidInput(f"there is no checkpoint in {self.work_dir}; start without --resume")

    def contexts(self, progress: Progress) -> Contexts:
        """Raises InvalidInput and its kind for sources that cannot be read."""
        documents, rows, origin = self.sources.read()
        progress.say(f"{len(documents):,} documents, {len(rows):,} questions")
        builder = StreamBuilder(PromptBuilder(Config(model=self.model)))
        own, held_out = (
            streams(self.data, documents, rows, builder, held_out=side) for side in (False, True)
        )
        return Contexts(own, held_out, origin)

    def take_steps(
        self,
        training: Learning,
        step: Callable[[], Row],
        measure: Callable[[], Row],
        about: dict[str, Any],
        progress: Progress,
        *,
        first: int,
    ) -> None:
        """All steps that are left. step: takes one; measure: called now and then, and after the last; about:
        of the checkpoints; first: number of a run's first row in the log."""
        plan = training.plan
        while training.step < plan.n_steps:
            row: Row = {"step": training.step + first, "rate": plan.rate(training.step)}
            row |= step()
            last = training.step == plan.n_steps
            if last or training.step % plan.evaluate_every == 0:
                row |= measure()
            progress.log.append(row)
            if last or training.step % self.checkpoint_every == 0:
                save_checkpoint(self.checkpoint, training, about, progress.log)
            progress.stepped(training.step, row)
