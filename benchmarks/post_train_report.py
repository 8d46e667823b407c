"""What `benchmarks.post_train` found, as tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import harness

TEXTS, TASKS = ("documentation", "worlds"), ("needles", "facts")
SIDES = (("before", "dense"), ("before", "sparse"), ("after", "dense"), ("after", "sparse"))

Row = dict[str, Any]


def perplexities(result: Row) -> dict[tuple[str, int], dict[tuple[str, str], float]]:
    """(kind, length) -> (when, how) -> perplexity."""
    found: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in result["rows"]:
        for n, nats in row.get("nats", {}).items():
            side = found.setdefault((row["kind"], int(n)), {})
            side[row["when"], row["how"]] = math.exp(nats)
    return dict(sorted(found.items()))


def hits(result: Row) -> dict[tuple[str, int], dict[tuple[str, str], tuple[int, int, float]]]:
    """(kind, length) -> (when, how) -> found, asked, mean nats per token of the values."""
    values: dict[tuple[str, int], dict[tuple[str, str], list[Row]]] = {}
    for row in result["rows"]:
        if "values" in row:
            length = min(n for n in result["lengths"] if n >= row["tokens"])
            side = values.setdefault((row["kind"], length), {})
            side.setdefault((row["when"], row["how"]), []).extend(row["values"])
    return {
        at: {
            side: (sum(v["hit"] for v in all_), len(all_), sum(v["nats"] for v in all_) / len(all_))
            for side, all_ in sides.items()
        }
        for at, sides in sorted(values.items())
    }


def tables(result: Row) -> Iterator[Table]:
    columns = [f"{when}, {how}" for when, how in SIDES]
    made = Table("text", "tokens", *columns, title="Perplexity")
    for (kind, n), by_side in perplexities(result).items():
        made.add_row(kind, f"{n:,}", *(_number(by_side.get(side)) for side in SIDES))
    yield made
    made = Table("tasks", "tokens", *columns, title="Values found, nats per token")
    for (kind, n), found in hits(result).items():
        cells = [found.get(side) for side in SIDES]
        said = ("-" if cell is None else f"{cell[0]}/{cell[1]}, {cell[2]:.2f}" for cell in cells)
        made.add_row(kind, f"{n:,}", *said)
    yield made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def lines(result: Row) -> Iterator[str]:
    """What sparsity costs, before and after: the part that is not the text's."""
    for (kind, n), by_side in perplexities(result).items():
        costs = [
            f"{by_side[when, 'sparse'] / by_side[when, 'dense'] - 1:+.2%} {when}"
            for when in ("before", "after")
            if (when, "sparse") in by_side and (when, "dense") in by_side
        ]
        yield f"{kind}, {n:,} tokens: the budget costs {', '.join(costs)}"


def draw(result: Row, path: Path) -> Path | None:
    """Loss by step, perplexity and values found. None without matplotlib."""
    plot = harness.pyplot()
    if plot is None:
        return None
    figure, (left, middle, right) = plot.subplots(1, 3, figsize=(14, 4))
    curve = [row for row in result.get("curve", []) if "loss" in row]
    left.plot([row["step"] for row in curve], [row["loss"] for row in curve], "-o", markersize=3)
    left.set(title="training loss, a context each", xlabel="step", ylabel="nats per token")
    texts = perplexities(result)
    _bars(middle, {f"{kind}\n{n // 1024}K": by_side for (kind, n), by_side in texts.items()})
    lowest = min((v for by_side in texts.values() for v in by_side.values()), default=1.0)
    middle.set(title=f"perplexity, budget {result['budget']:,}", ylim=(0.7 * lowest, None))
    shares = {
        f"{kind}\n{n // 1024}K": {side: cell[0] / cell[1] for side, cell in found.items()}
        for (kind, n), found in hits(result).items()
    }
    _bars(right, shares)
    right.set(title="values found", ylim=(0, 1.05))
    middle.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plot.close(figure)
    return path


def _bars(axes: Any, groups: dict[str, dict[tuple[str, str], float]]) -> None:
    colours = ("#9ecae1", "#3182bd", "#fdae6b", "#e6550d")
    for i, side in enumerate(SIDES):
        places = [group + 0.2 * (i - 1.5) for group in range(len(groups))]
        heights = [by_side.get(side, 0.0) for by_side in groups.values()]
        axes.bar(places, heights, 0.19, color=colours[i], label=", ".join(side))
    axes.set_xticks(range(len(groups)), list(groups))
