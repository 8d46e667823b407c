"""What `benchmarks.recall` found, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import harness
from .recall_measure import PAGES, THIRD

Row = dict[str, Any]
FAMILIES = ("oracle", "bookmark", "bookmark, untrained", "mean", "bounds of 256", "bounds", "search", "BM25",
            "recency", "random")  # fmt: skip


def best(methods: dict[str, Row], family: str, window: str = "all") -> str | None:
    """The variant of a family that keeps most at a third of the pages: it is given every advantage."""
    names = [n for n in methods if n == family or n.startswith(f"{family} (")]
    return max(names, key=lambda n: methods[n][window]["recall"][THIRD], default=None)


def tables(result: Row) -> Iterator[Table]:
    for row in result["rows"]:
        title = f"{row['kind']}, {row['tokens']:,} tokens, {row['role']}: recall of page mass"
        made = Table(title=title)
        made.add_column("index")
        for name in ("bytes", *map(str, PAGES), THIRD, "p5", "worst head", "far, 4", "far, third"):
            made.add_column(name, justify="right")
        for family in FAMILIES:
            name = best(row["methods"], family)
            if name is None:
                continue
            found = row["methods"][name]
            every, far = found["all"], found["far"]
            cells = [every["recall"][str(n)] for n in PAGES] + [every["recall"][THIRD], every["p5"]]
            cells += [found["worst_head"]["recall"], far["recall"]["4"], far["recall"][THIRD]]
            made.add_row(
                name, f"{found['bytes']:,}" if found["bytes"] else "", *map(_percent, cells)
            )
        yield made


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def draw(result: Row, path: Path) -> Path | None:
    """Recall by pages, and by layer at a third of them. None without matplotlib."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return None
    rows = result["rows"]
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(13, 3.8 * len(rows)), squeeze=False)
    for (left, right), row in zip(axes, rows, strict=True):
        title = f"{row['kind']}, {row['tokens']:,} tokens, {row['role']}"
        for family in FAMILIES:
            name = best(row["methods"], family)
            if name is None:
                continue
            every = row["methods"][name]["all"]
            points = [(n, every["recall"][str(n)]) for n in PAGES]
            known = [(n, value) for n, value in points if value is not None]
            style = {"linewidth": 2.5} if family == "bookmark" else {"linewidth": 1.2}
            left.plot(*zip(*known, strict=True), "-o", label=name, markersize=3, **style)
            right.plot(every["by_layer"], label=name, **style)
        left.set(title=title, xlabel="pages of 128 tokens", ylabel="recall of mass")
        right.set(title="at a third of the pages", xlabel="layer")
        left.set_xscale("log", base=2)
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
