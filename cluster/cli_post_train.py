"""`longreach post-train`: a model that was trained on retrieved pages, from any text. No gateway, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..core.config import Config, load_config
from ..core.errors import ConfigError
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


def post_train(
    out_folder: Annotated[Path, typer.Option("--out", help="Where the new model goes: a folder.")],
    data: DataFiles = [],  # noqa: B006
    text: TextPaths = [],  # noqa: B006
    packages: Packages = [],  # noqa: B006
    tasks: Tasks = TASKS,
    budget: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens a layer reads: the first page, the window, the pages retrieved."
        ),
    ] = 2048,
    window: Annotated[int, typer.Option(min=1, help="Latest tokens that are always read.")] = 256,
    dense_layers: Annotated[
        str, typer.Option(help="Layers that read everything, like 0-1 or 0,5; empty for none.")
    ] = "0-1",
    full: Annotated[
        bool, typer.Option("--full", help="Train every weight instead of adapters (LoRA).")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    alpha: Annotated[
        float, typer.Option(min=0.0, help="Of the adapters, whose part is scaled by alpha / rank.")
    ] = 32.0,
    steps: Steps = 20,
    contexts: Contexts = 20,
    context_tokens: ContextTokens = 4096,
    held_out: Annotated[
        int, typer.Option(min=0, help="Contexts of other documents, to measure perplexity on.")
    ] = 2,
    per_step: PerStep = 1,
    learning_rate: LearningRate = 1e-3,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between perplexities.")] = 10,
    checkpoint_every: CheckpointEvery = 5,
    work_dir: Annotated[Path, typer.Option(help="For the checkpoint.")] = Path(".longreach/train"),
    resume: Resume = False,
    curve: Annotated[
        Path | None, typer.Option(help="JSON file for losses and perplexity by step.")
    ] = None,
    seed: Seed = 0,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
) -> None:
    """Train a model on what its bookmarks retrieve (RetroLM, stage 2), with the loss of plain text.

    Needs bookmarks that were trained for the model (retriever.weights; the embedded model has some). What
    comes out is a folder for model.name, with the bookmarks and a configuration that serves both.
    """
    from ..workers.post_run import PostRun, run_post_training
    from ..workers.post_training import PostPlan
    from .train_view import watched

    settings = load_config(config, set_)
    run = PostRun(
        out=out_folder,
        work_dir=work_dir,
        bookmarks=_bookmarks_of(settings),
        model=settings.model,
        sources=sources_of(packages, text, data),
        data=data_plan(contexts, held_out, context_tokens, tasks, seed),
        plan=PostPlan(
            n_steps=steps,
            n_contexts=per_step,
            learning_rate=learning_rate,
            budget=budget,
            window=window,
            dense_layers=dense_layers.strip(),
            rank=None if full else rank,
            alpha=alpha,
            seed=seed,
            evaluate_every=evaluate_every,
        ),
        resume=resume,
        checkpoint_every=checkpoint_every,
    )
    card, took_s = watched(lambda view: run_post_training(run, view), steps, curve)
    out.print(_summary(out_folder, card, took_s))


def _bookmarks_of(config: Config) -> str:
    if config.retriever.weights is not None:
        return config.retriever.weights
    if config.model.name == "embedded":
        return "embedded"
    raise ConfigError(
        "retriever.weights: give the bookmarks of this model: make them with `longreach train-retriever` and "
        "--set retriever.weights=FILE",
        path="retriever.weights",
    )


def _summary(folder: Path, card: dict[str, Any], took_s: float) -> Table:
    """What was saved."""
    table = Table("", "", show_header=False, title="Post-trained model")
    table.add_row("model", f"{folder}, weights {card['fingerprint'][:12]}")
    table.add_row("from", f"{card['base']}, weights {card['base_fingerprint'][:12]}")
    table.add_row("trained", f"{card['plan']['n_steps']} steps in {took_s / 60:.1f} minutes")
    for name, value in card["perplexity"].items():
        table.add_row(f"perplexity, held out: {name}", f"{value:.3f}")
    table.add_row("serve it", f"longreach serve --config {folder / 'longreach.yaml'}")
    return table
