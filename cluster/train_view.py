"""A training run on the terminal: a bar for the contexts, a line per step, a table at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..workers.bookmark_file import Card
from ..workers.train_run import Run
from ..workers.training_run import Progress as RunProgress
from .cli_base import out

Result = TypeVar("Result")
SPOKEN_EVERY_S = 20.0
"""Between lines where there is no terminal to draw a bar on."""


class TrainView(RunProgress):
    """Bars on a terminal; in a pipe a line now and then, and one for each measurement."""

    def __init__(self, console: Console, n_steps: int) -> None:
        super().__init__()
        self._console, self._n_steps = console, n_steps
        self._spoken_s = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._contexts = self._bar.add_task("contexts", total=None)
        self._steps = self._bar.add_task("steps", total=n_steps)

    @contextmanager
    def shown(self) -> Iterator[TrainView]:
        with self._bar:
            yield self

    def say(self, line: str) -> None:
        self._print(line)

    def captured(self, done: int, total: int) -> None:
        self._bar.update(self._contexts, completed=done, total=total)
        if not self._console.is_terminal and self._due():
            self._print(f"{done} of {total} contexts read")

    def stepped(self, step: int, row: dict[str, float]) -> None:
        losses = ", ".join(
            f"{name} {row[name]:.3f}" for name in ("kl", "contrastive", "loss") if name in row
        )
        self._bar.update(self._steps, completed=step, description=f"steps ({losses})")
        measured = ("recall", "perplexity")
        found = [f"{name} {value:.3f}" for name, value in row.items() if name.startswith(measured)]
        if found or self._due():
            self._print(
                f"step {step} of {self._n_steps}: {', '.join(filter(None, (losses, *found)))}"
            )

    def _due(self) -> bool:
        now_s = time.monotonic()
        if self._console.is_terminal or now_s - self._spoken_s < SPOKEN_EVERY_S:
            return False
        self._spoken_s = now_s
        return True

    def _print(self, line: str) -> None:
        self._bar.console.print(line, markup=False, soft_wrap=True)


def watched(
    train: Callable[[TrainView], Result], n_steps: int, curve: Path | None
) -> tuple[Result, float]:
    """What a run gives, and the seconds it took; losses by step go to a file if one is named."""
    view = TrainView(out, n_steps)
    started_s = time.monotonic()
    with view.shown():
        found = train(view)
    if curve is not None:
        write_curve(curve, view.log)
    return found, time.monotonic() - started_s


def summary(run: Run, card: Card, took_s: float) -> Table:
    """What was saved."""
    table = Table("", "", show_header=False, title="Bookmarks")
    table.add_row("weights", f"{run.out}, {run.out.stat().st_size / 1e6:.1f} MB")
    table.add_row("model", f"{card.model}, weights {card.model_fingerprint[:12]}")
    table.add_row("trained", f"{run.plan.n_steps} steps in {took_s / 60:.1f} minutes")
    for name, value in card.recall.items():
        _, pages, share = name.split()
        where = "all earlier pages" if pages == "all" else "pages beyond the window"
        table.add_row(f"recall, held out: {where}, best {float(share):.0%}", f"{value:.1%}")
    return table


def write_curve(path: Path, log: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = [{name: round(value, 5) for name, value in row.items()} for row in log]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rounded) + "\n]\n")
