"""What `benchmarks.quality` found, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from . import harness
from .quality_settings import FEW

Row = dict[str, Any]

MARKS = "os^D"


def tables(result: Row) -> Iterator[Table]:
    for study in result["studies"]:
        for n in dict.fromkeys(row["queries"] for row in study["rows"]):
            rows = [row for row in study["rows"] if row["queries"] == n]
            title = f"{study['title']}; {'single queries' if n == 1 else f'blocks of {n} queries'}"
            if len({(row["budget"], row["age"]) for row in rows}) > 2:
                yield _grid(title, rows)
            some = (*FEW, rows[0]["budget"])
            yield _details(title, [r for r in rows if r["budget"] in some and not r["age"]])
        if study["gold"]:
            yield _gold(study)


def _grid(title: str, rows: Sequence[Row]) -> Table:
    by_age = any(row["age"] for row in rows)
    made = Table(title=f"{title}: mass kept / error of the output")
    made.add_column("age" if by_age else "tokens kept")
    points = sorted({(row["budget"], row["age"]) for row in rows})
    for budget, age in points:
        made.add_column(str(age if by_age else budget), justify="right")
    cells = {(row["setting"], row["budget"], row["age"]): row for row in rows}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found = [cells[setting, *point] for point in points]
        made.add_row(
            setting, *(f"{_n(r['mass']['mean'])}/{_n(r['error']['true']['mean'])}" for r in found)
        )
    return made


def _details(title: str, rows: Sequence[Row]) -> Table:
    made = Table(title=title)
    for name in ("", "budget", "tokens", "mass", "p10", "worst layer", "error", "p90", "streaming"):
        made.add_column(name, justify="right" if name else "left")
    for row in rows:
        mass, error = row["mass"], row["error"]
        made.add_row(
            row["setting"],
            str(row["budget"]),
            f"{row['tokens']:.0f}",
            _n(mass["mean"]),
            _n(mass["p10"]),
            f"{_n(mass['worst'])} ({mass['worst_layer']})",
            _n(error["true"]["mean"]),
            _n(error["true"]["p90"]),
            _n(error["streaming"]["mean"]),
        )
    return made


def _gold(study: Row) -> Table:
    n_cases, budgets = study["gold"][0]["of"], list(study["gold"][0]["kept"])
    title = f"{study['title']}: the answer's block kept where a head reads it, {n_cases} cases"
    made = Table(title=title)
    for name in ("", "queries", "median rank", *budgets):
        made.add_column(name, justify="right" if name else "left")
    for row in study["gold"]:
        rank = "-" if row["median_rank"] is None else f"{row['median_rank']:.0f}"
        kept = (f"{row['kept'][budget]:.2f}" for budget in budgets)
        made.add_row(row["setting"], str(row["queries"]), rank, *kept)
    return made


def _n(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 10 else f"{value:.1f}"


# --- plot -----------------------------------------------------------------------------------------


def draw(result: Row, path: Path) -> Path | None:
    """Mass kept and error by budget, single queries, one line per setting. None without matplotlib."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return None
    shown = [s for s in result["studies"] if s["name"] in ("budget", "preset")]
    if not shown:
        return None
    figure, axes = pyplot.subplots(len(shown), 2, figsize=(15, 5 * len(shown)), squeeze=False)
    for pair, study in zip(axes, shown, strict=True):
        rows = [row for row in study["rows"] if row["queries"] == 1]
        for i, setting in enumerate(dict.fromkeys(row["setting"] for row in rows)):
            mine = [row for row in rows if row["setting"] == setting]
            budgets = [row["budget"] for row in mine]
            style = "--" if setting.startswith("exact") else "-"
            look = {"label": setting, "ms": 4, "color": f"C{i % 10}", "marker": MARKS[i // 10 % 4]}
            pair[0].plot(budgets, [r["mass"]["mean"] for r in mine], style, **look)
            errors = [max(1e-4, r["error"]["true"]["mean"]) for r in mine]
            pair[1].plot(budgets, errors, style, **look)
        for axis, name in zip(pair, ("mass kept", "error of the output"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(n) for n in budgets])
            axis.set(xlabel="tokens kept", ylabel=name)
            axis.grid(alpha=0.3)
        pair[1].set_yscale("log")
        pair[0].set_title(study["title"], fontsize=9, loc="left")
        pair[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(
        f"{result['model']}, {result['tokens']:,} tokens, commit {result['commit'][:8]}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
