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


def costs(result: Row) -> dict[tuple[str, int], dict[str, float]]:
    """(kind, length) -> when -> the share by which the budget raises the dense perplexity: the part that is
    not the text's."""
    return {
        at: {
            when: by_side[when, "sparse"] / by_side[when, "dense"] - 1
            for when in ("before", "after")
            if {(when, "sparse"), (when, "dense")} <= by_side.keys()
        }
        for at, by_side in perplexities(result).items()
    }


def lines(result: Row) -> Iterator[str]:
    for (kind, n), found in costs(result).items():
        said = ", ".join(f"{cost:+.2%} {when}" for when, cost in found.items())
        yield f"{kind}, {n:,} tokens: the budget costs {said}"


def draw(result: Row, path: Path) -> Path | None:
    """Loss by step, perplexity, what the budget costs, values found. None without matplotlib."""
    plot = harness.pyplot()
    if plot is None:
        return None
    figure, ((loss, text), (cost, tasks)) = plot.subplots(2, 2, figsize=(12, 7.5))
    curve = [row for row in result.get("curve", []) if "loss" in row]
    loss.plot([row["step"] for row in curve], [row["loss"] for row in curve], "-o", markersize=3)
    loss.set(title="training loss, a context each", xlabel="step", ylabel="nats per token")
    colours = dict(zip(SIDES, ("#9ecae1", "#3182bd", "#fdae6b", "#e6550d"), strict=True))
    _bars(text, {_name(at): by_side for at, by_side in perplexities(result).items()}, colours)
    text.set(title=f"perplexity, budget {result['budget']:,}")
    shares = {
        _name(at): {side: cell[0] / cell[1] for side, cell in found.items()}
        for at, found in hits(result).items()
    }
    _bars(tasks, shares, colours)
    tasks.set(title="values found", ylim=(0, 1.05))
    percent = {
        _name(at): {(when, "sparse"): 100 * value for when, value in found.items()}
        for at, found in costs(result).items()
    }
    _bars(cost, percent, {side: colours[side] for side in SIDES if side[1] == "sparse"})
    cost.set(title="perplexity that the budget costs", ylabel="% of dense")
    text.legend(fontsize=8)
    for axes in (loss, text, cost, tasks):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plot.close(figure)
    return path


def _name(at: tuple[str, int]) -> str:
    return f"{at[0]}\n{at[1] // 1024}K"


def _bars(
    axes: Any,
    groups: dict[str, dict[tuple[str, str], float]],
    colours: dict[tuple[str, str], str],
) -> None:
    width = 0.8 / len(colours)
    for i, (side, colour) in enumerate(colours.items()):
        places = [group + width * (i - (len(colours) - 1) / 2) for group in range(len(groups))]
        heights = [by_side.get(side, 0.0) for by_side in groups.values()]
        axes.bar(places, heights, 0.95 * width, color=colour, label=", ".join(side))
    axes.set_xticks(range(len(groups)), list(groups))
