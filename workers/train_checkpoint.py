"""Checkpoints of a training run: what learns, the optimizer's moments, the step, the losses so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.errors import FailedPrecondition, InvalidInput
from .tensor_file import save_tensors
from .train_schedule import Schedule

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
WEIGHT = "weight"


class Learning(Protocol):
    """A run as far as a checkpoint knows it."""

    step: int

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def plan(self) -> Schedule: ...

    @property
    def learned(self) -> Mapping[str, nn.Parameter]:
        """By name."""
        ...


def save_checkpoint(
    path: Path, training: Learning, about: dict[str, Any], log: list[dict[str, float]]
) -> None:
    """about: data and model of the run, which a later run has to share."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in training.learned.items():
        tensors[f"{WEIGHT}/{name}"] = parameter.data
        for moment, value in training.optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = torch.as_tensor(value)
    made = {"step": training.step, "log": log, "run": run_of(training, about)}
    save_tensors(path, tensors, {"run": json.dumps(made)})


def load_checkpoint(
    path: Path, training: Learning, about: dict[str, Any]
) -> list[dict[str, float]]:
    """Put a run back to where it was saved. Returns its log.

    Raises InvalidInput for a file that cannot be read, FailedPrecondition where the run differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads((file.metadata() or {})["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as exc:
        raise InvalidInput(
            f"checkpoint {path} cannot be read: {exc}; start without --resume"
        ) from exc
    wanted = json.loads(json.dumps(run_of(training, about)))
    if made["run"] != wanted:
        differing = [key for key in wanted if made["run"].get(key) != wanted[key]]
        raise FailedPrecondition(
            f"checkpoint {path} was made with other {', '.join(differing)}; give the same ones, or "
            "start without --resume"
        )
    for name, parameter in training.learned.items():
        parameter.data.copy_(tensors[f"{WEIGHT}/{name}"])
        kept = {
            moment: tensors[f"{moment}/{name}"]
            for moment in MOMENTS
            if f"{moment}/{name}" in tensors
        }
        if kept:
            training.optimizer.state[parameter] = kept
    training.step = int(made["step"])
    return list(made["log"])


def run_of(training: Learning, about: dict[str, Any]) -> dict[str, Any]:
    """What two halves of a run must have in common."""
    return {"plan": asdict(training.plan), **about}
