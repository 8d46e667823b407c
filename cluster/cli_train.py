"""`longreach train-retriever`: bookmarks for a model, from any text. No gateway, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.config import load_config
from ..core.errors import InvalidInput
from .cli_base import ConfigFiles, Sets, out
from .cli_train_options import (
    TASKS,
    CheckpointEvery,
    Contexts,
    ContextTokens,
    DataFiles,
    LearningRate,
    Packages,
    PerStep,
    Resume,
    Seed,
    Steps,
    Tasks,
    TextPaths,
    data_plan,
    sources_of,
)

LOSSES = ("kl", "contrastive", "both")


def train_retriever(
    out_file: Annotated[Path, typer.Option("--out", help="Where the weights go: .safetensors.")],
    data: DataFiles = [],  # noqa: B006
    text: TextPaths = [],  # noqa: B006
    packages: Packages = [],  # noqa: B006
    tasks: Tasks = TASKS,
    loss: Annotated[
        str,
        typer.Option(help="kl: the dense model's attention; contrastive: gold pages; or both."),
    ] = "kl",
    steps: Steps = 700,
    rank: Annotated[
        int, typer.Option(min=0, help="Of what is added to the projections; 0: whole matrices.")
    ] = 32,
    contexts: Contexts = 32,
    context_tokens: ContextTokens = 4096,
    held_out: Annotated[
        int, typer.Option(min=0, help="Contexts of other documents, to measure recall on.")
    ] = 8,
    per_step: PerStep = 1,
    learning_rate: LearningRate = 3e-3,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between recalls.")] = 100,
    checkpoint_every: CheckpointEvery = 100,
    work_dir: Annotated[
        Path, typer.Option(help="Captured contexts (about 100 MB each) and the checkpoint.")
    ] = Path(".longreach/train"),
    resume: Resume = False,
    curve: Annotated[
        Path | None, typer.Option(help="JSON file for losses and recall by step.")
    ] = None,
    seed: Seed = 0,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
) -> None:
    """Train the bookmarks (RetroLM) of a model, which stays as it is.

    The model reads each context once with dense attention; what it computed is kept in --work-dir, so the
    same data is read once however many runs there are. Needs a CPU only.
    """
    from ..workers.train_retriever import TrainingPlan
    from ..workers.train_run import Run, run_training
    from .train_view import summary, watched

    if loss not in LOSSES:
        raise InvalidInput(f"--loss is {loss!r}; it is one of {', '.join(LOSSES)}")
    if out_file.suffix != ".safetensors":
        raise InvalidInput(f"--out is {out_file}; its name must end with .safetensors")
    model = load_config(config, set_).model
    run = Run(
        out=out_file,
        work_dir=work_dir,
        model=model,
        sources=sources_of(packages, text, data),
        data=data_plan(contexts, held_out, context_tokens, tasks, seed),
        plan=TrainingPlan(
            n_steps=steps,
            n_contexts=per_step,
            loss=loss,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            seed=seed,
            evaluate_every=evaluate_every,
        ),
        rank=rank or None,
        resume=resume,
        checkpoint_every=checkpoint_every,
    )
    card, took_s = watched(lambda view: run_training(run, view), steps, curve)
    out.print(summary(run, card, took_s))
