"""Trained bookmarks beside those that are shipped, and the curve of their training as a picture.

    python -m benchmarks.training WEIGHTS CURVE.json [--picture docs/training.png]

Exits with 1 where a recall on held-out contexts is more than two points below the shipped weights'.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from longreach.workers.bookmark_file import read_card
from longreach.workers.bookmark_source import EMBEDDED

from .harness import console, pyplot

WORSE = 0.02
SMOOTHED = 25
"""Steps that a point of the drawn loss is the mean of."""

Row = dict[str, Any]


def compared(found: dict[str, float], shipped: dict[str, float]) -> list[Row]:
    rows = []
    for name, wanted in shipped.items():
        value = found.get(name)
        met = value is not None and value >= wanted - WORSE
        rows.append({"name": name, "found": value, "shipped": wanted, "met": met})
    return rows


def table(rows: Sequence[Row]) -> Table:
    made = Table("held-out contexts", "trained", "shipped", "", title="Recall of page mass")
    for row in rows:
        found = "-" if row["found"] is None else f"{row['found']:.1%}"
        said = "met" if row["met"] else "missed"
        made.add_row(row["name"], found, f"{row['shipped']:.1%}", said)
    return made


def draw(log: Sequence[Row], path: Path) -> Path | None:
    """Losses by step, and recall where it was measured. None without matplotlib."""
    plot = pyplot()
    if plot is None:
        return None
    figure, (left, right) = plot.subplots(1, 2, figsize=(11, 3.8))
    for name in ("kl", "contrastive"):
        values = [row[name] for row in log if name in row]
        means = [
            sum(values[max(0, i - SMOOTHED) : i + 1]) / len(values[max(0, i - SMOOTHED) : i + 1])
            for i in range(len(values))
        ]
        if means:
            left.plot(means, label=f"{name}, mean of {SMOOTHED} steps")
    left.set(title="loss", xlabel="step")
    left.legend()
    for name in [n for n in log[-1] if n.startswith("recall")]:
        points = [(row["step"] + 1, row[name]) for row in log if name in row]
        right.plot(*zip(*points, strict=True), "-o", markersize=3, label=name)
    right.set(title="recall on held-out contexts", xlabel="step")
    right.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plot.close(figure)
    return path


def main(argv: Sequence[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("weights", type=Path)
    made.add_argument("curve", type=Path)
    made.add_argument("--picture", type=Path, help="default: beside the curve")
    given = made.parse_args(argv)
    rows = compared(read_card(given.weights).recall, read_card(EMBEDDED).recall)
    console().print(table(rows))
    log = json.loads(given.curve.read_text())
    draw(log, given.picture or given.curve.with_suffix(".png"))
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
