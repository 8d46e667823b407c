"""Options that the two kinds of training share: what is read, how much of it, where a run stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..workers.train_streams import DataPlan
    from ..workers.training_run import Sources

DataFiles = Annotated[
    list[Path],
    typer.Option("--data", help="JSONL of context, question, and answer or gold; may be repeated."),
]
TextPaths = Annotated[
    list[Path], typer.Option("--text", help="Text file, or folder of them; may be repeated.")
]
Packages = Annotated[
    list[str],
    typer.Option(
        "--package",
        help="Installed package whose documentation is read, 'python' for its own library; may be "
        "repeated. Without any data, text and package: a fixed few.",
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        help="What is done with text, in turn: text, needle, needles, key-value, sentences."
    ),
]
Contexts = Annotated[int, typer.Option(min=1, help="Contexts to train on.")]
ContextTokens = Annotated[
    int, typer.Option(min=1024, help="Tokens of a context, at most the model's window.")
]
PerStep = Annotated[int, typer.Option(min=1, help="Contexts per step.")]
LearningRate = Annotated[float, typer.Option(min=0.0, help="At its highest.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --work-dir.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]

TASKS = "text,needles,text,key-value,text,sentences"


def sources_of(packages: Sequence[str], text: Sequence[Path], data: Sequence[Path]) -> Sources:
    from ..workers.training_run import Sources

    return Sources(tuple(packages), tuple(text), tuple(data))


def data_plan(contexts: int, held_out: int, context_tokens: int, tasks: str, seed: int) -> DataPlan:
    """tasks: names with commas between."""
    from ..workers.train_streams import DataPlan

    return DataPlan(
        n_contexts=contexts,
        n_held_out=held_out,
        context_tokens=context_tokens,
        tasks=tuple(name.strip() for name in tasks.split(",")),
        seed=seed,
    )
