"""A whole run of post-training: data, steps, checkpoints, the model folder at its end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.config import config_text
from ..core.errors import AlreadyExists
from ..core.stage import DENSE, LayerPolicy
from .bookmark_file import fingerprint, load_bookmarks, save_bookmarks, weights_fingerprint
from .bookmark_source import weights_file
from .bookmarks import Bookmarks
from .lora import add_lora, merge_lora
from .model import ModelAdapter, load_model
from .model_source import model_dir
from .post_training import PostPlan, PostTraining, by_layer, perplexity, policies_for
from .sparse_forward import Decoder, SparseForward
from .threads import use_threads
from .train_checkpoint import load_checkpoint
from .train_prompt import Stream
from .training_run import Contexts, Progress, TrainingRun

CARD = "post_training.json"
BOOKMARKS = Path("retriever") / "bookmarks.safetensors"
"""In a folder of its own: all safetensors beside config.json are the model's."""
SERVE = "longreach.yaml"
_OF_THE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class PostRun(TrainingRun):
    """A run that makes a model. out: its folder; bookmarks: weights, or "embedded"."""

    CHECKPOINT = "post-training.safetensors"

    bookmarks: str
    plan: PostPlan = field(default_factory=PostPlan)
    checkpoint_every: int = 5


def run_post_training(run: PostRun, progress: Progress) -> dict[str, Any]:
    """Train, save, and return the card of what was saved.

    Raises InvalidInput and its kind for data and settings that cannot be used (bookmarks of another model
    among them), AlreadyExists for a folder that is there, UnsupportedModel.
    """
    if run.out.exists():
        raise AlreadyExists(f"{run.out} exists; give a folder that does not")
    directory = model_dir(run.model)
    run.check(directory, "it was not trained beyond it")
    use_threads(run.model.n_threads, keep_blocks=False)
    bookmarks = load_bookmarks(run.bookmarks, directory)
    policies = policies_for(run.plan, bookmarks.shape.page_tokens)
    layers = by_layer(policies, bookmarks.shape.n_layers)
    if run.data.context_tokens <= run.plan.budget:
        progress.say("contexts are within the budget: every page is read, training is dense")

    contexts = run.contexts(progress)
    decoder = decoder_of(directory)
    forward = SparseForward(decoder, bookmarks, layers)
    training = PostTraining(forward, learned_of(decoder, run.plan), run.plan)
    made_of = {
        "model": weights_fingerprint(directory),
        "bookmarks": fingerprint(bookmarks).hex(),
        "data": asdict(run.data),
    }
    _train(run, training, contexts, made_of, progress)

    merge_lora(decoder.layers)
    card = {
        "base": run.model.name,
        "base_fingerprint": made_of["model"],
        "bookmarks_fingerprint": made_of["bookmarks"],
        "plan": asdict(run.plan),
        "data": asdict(run.data),
        "text": contexts.origin,
        "contexts": len(contexts.own),
        "tokens": sum(stream.n_tokens for stream in contexts.own),
        "perplexity": _perplexities(progress.log),
    }
    return save_model(run, decoder, directory, bookmarks, policies, card)


def decoder_of(directory: Path) -> Decoder:
    """A model in float32 whose rotary module is an identity; nothing learns yet."""
    model = load_model(directory, torch.float32)
    return Decoder(model, ModelAdapter(model, own_kernels=False).rope)


def learned_of(decoder: Decoder, plan: PostPlan) -> dict[str, torch.nn.Parameter]:
    """LoRA's adapters, put in here, or every weight; by name."""
    if plan.rank is not None:
        torch.manual_seed(plan.seed)
        return add_lora(decoder.layers, plan.rank, plan.alpha)
    decoder.model.requires_grad_(True)
    return dict(decoder.model.named_parameters())


def _train(
    run: PostRun,
    training: PostTraining,
    contexts: Contexts,
    made_of: dict[str, Any],
    progress: Progress,
) -> None:
    """The first row of the log is the model as it was."""
    digest = hashlib.sha256()
    for stream in (*contexts.own, *contexts.held_out):
        digest.update(stream.token_ids.tobytes())
    about = made_of | {"contexts": digest.hexdigest()}

    def measure() -> dict[str, float]:
        return _measured(training.forward, contexts.held_out) if contexts.held_out else {}

    if run.resume:
        progress.log[:] = load_checkpoint(run.checkpoint, training, about)
        progress.say(f"taken up at step {training.step}")
    elif measured := measure():
        row = {"step": 0, **measured}
        progress.log.append(row)
        progress.stepped(0, row)
    run.take_steps(
        training, lambda: training.train_step(contexts.own), measure, about, progress, first=1
    )


def _measured(forward: SparseForward, held_out: Sequence[Stream]) -> dict[str, float]:
    """Perplexity within the budget, and with every key read in every layer."""
    dense = SparseForward(forward.decoder, forward.bookmarks, [DENSE] * len(forward.policies))
    return {
        "perplexity": perplexity(forward, held_out),
        "perplexity dense": perplexity(dense, held_out),
    }


def _perplexities(log: Sequence[dict[str, float]]) -> dict[str, float]:
    """On the held-out contexts, at the beginning and at the end."""
    rows = [row for row in log if "perplexity" in row]
    if not rows:
        return {}
    return {
        f"{name} {when}": row[f"perplexity{suffix}"]
        for when, row in (("before", rows[0]), ("after", rows[-1]))
        for name, suffix in (("sparse", ""), ("dense", " dense"))
    }


# --- the folder at the end ------------------------------------------------------------------------


def save_model(
    run: PostRun,
    decoder: Decoder,
    directory: Path,
    bookmarks: Bookmarks,
    policies: Sequence[LayerPolicy],
    card: dict[str, Any],
) -> dict[str, Any]:
    """Weights in float32, tokenizer, card, the bookmarks under the new model's name, and a configuration
    that serves all of it. The folder is there whole or not at all."""
    part = run.out.with_name(run.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    decoder.model.save_pretrained(part)
    for path in directory.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in _OF_THE_MODEL:
            shutil.copy(path, part)
    card = card | {"fingerprint": weights_fingerprint(part)}
    (part / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    _relabel(part / BOOKMARKS, bookmarks, run, card)
    (part / SERVE).write_text(_serving(run.out.absolute(), policies, bookmarks), encoding="utf-8")
    os.rename(part, run.out)
    return card


def _relabel(path: Path, bookmarks: Bookmarks, run: PostRun, card: dict[str, Any]) -> None:
    """The numbers as they are. How well they do was measured on the model before, so that is not said."""
    save_bookmarks(
        path,
        bookmarks,
        model=str(run.out),
        model_fingerprint=card["fingerprint"],
        training={
            "trained_for": card["base_fingerprint"],
            "weights": weights_file(run.bookmarks).name,
        },
        recall={},
    )


def _serving(folder: Path, policies: Sequence[LayerPolicy], bookmarks: Bookmarks) -> str:
    """YAML for `--config`, with the policies that the model was trained with."""
    tree = {
        "model": {"name": str(folder)},
        "cache": {"page_tokens": bookmarks.shape.page_tokens},
        "retriever": {"weights": str(folder / BOOKMARKS)},
        "attention": {
            "policies": [p.model_dump(mode="json", exclude_defaults=True) for p in policies]
        },
    }
    return config_text(tree)
