"""A whole training run: data, captures, steps, checkpoints, the file at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from .bookmark_file import Card, save_bookmarks, shape_for, weights_fingerprint
from .bookmarks import Bookmarks
from .model import ModelAdapter
from .model_source import model_dir
from .threads import use_threads
from .train_capture import Capture, CaptureFolder
from .train_checkpoint import load_checkpoint
from .train_forward import Frozen
from .train_retriever import Training, TrainingPlan, evaluate, prepare
from .training_run import Contexts, Progress, TrainingRun


@dataclass(frozen=True, kw_only=True)
class Run(TrainingRun):
    """A run that makes bookmarks."""

    CHECKPOINT = "checkpoint.safetensors"

    plan: TrainingPlan = field(default_factory=TrainingPlan)
    rank: int | None = 32
    page_tokens: int = 128
    checkpoint_every: int = 100


def run_training(run: Run, progress: Progress) -> Card:
    """Train, save, and return the card of what was saved.

    Raises InvalidInput and its kind for data and settings that cannot be used, UnsupportedModel.
    """
    directory = model_dir(run.model)
    run.check(directory, "dense attention beyond it would teach nothing")
    use_threads(run.model.n_threads)
    fingerprint = weights_fingerprint(directory)
    contexts = run.contexts(progress)
    model = ModelAdapter(directory, own_kernels=False)
    captures, held_out = _captures(run, model, contexts, fingerprint, progress)

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
        progress.log[:] = load_checkpoint(run.checkpoint, training, about)
        progress.say(f"taken up at step {training.step}")
    else:
        prepare(bookmarks, end_embedding(model), frozen, captures)
    run.take_steps(
        training,
        lambda: training.train_step(captures),
        lambda: evaluate(bookmarks, frozen, held_out),
        about,
        progress,
        first=0,
    )
    last_row = progress.log[-1] if progress.log else {}
    return save_bookmarks(
        run.out,
        bookmarks,
        model=run.model.name,
        model_fingerprint=fingerprint,
        training={
            "plan": asdict(run.plan),
            "data": asdict(run.data),
            "text": contexts.origin,
            "contexts": len(captures),
            "tokens": sum(capture.n_tokens for capture in captures),
        },
        recall={name: value for name, value in last_row.items() if name.startswith("recall")},
    )


def _captures(
    run: Run, model: ModelAdapter, contexts: Contexts, fingerprint: str, progress: Progress
) -> tuple[list[Capture], list[Capture]]:
    """Contexts to train on, contexts held out."""
    wanted = [*contexts.own, *contexts.held_out]
    folder = CaptureFolder(run.work_dir / "captures", fingerprint, lambda: model)
    total, found = len(wanted), []
    for i, stream in enumerate(wanted):
        progress.captured(i, total)
        found.append(folder.get(stream, progress.say))
    progress.captured(total, total)
    return found[: len(contexts.own)], found[len(contexts.own) :]


def frozen_of(model: ModelAdapter) -> Frozen:
    return Frozen(model.layers, model.rope)


def end_embedding(model: ModelAdapter) -> torch.Tensor:
    """Of the token with which texts end, if the model has one: where a bookmark's embedding starts."""
    embeddings = model.embeddings.detach().float()
    ends = sorted(model.eos_token_ids)
    return embeddings[ends[0]] if ends else embeddings.mean(dim=0)
