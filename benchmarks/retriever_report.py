"""What a run of `benchmarks.retriever` found, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import harness

Row = dict[str, Any]


def tables(result: Row) -> Iterator[Table]:
    table = Table(title="queries: one layer's pages, ranked")
    for name in ("pages", "contexts", "queries/s", "median ms", "p95 ms", "table"):
        table.add_column(name, justify="right")
    for row in result["queries"]:
        table.add_row(
            f"{row['pages']:,}",
            str(row["contexts"]),
            f"{row['queries_per_s']:,.1f}",
            f"{row['median_ms']:,.2f}",
            f"{row['p95_ms']:,.2f}",
            f"{row['table_bytes'] / 1e6:,.1f} MB",
        )
    yield table
    table = Table(title="a decode step of all rows")
    for name in ("retrieval", "answers late by", "steps", "median ms", "p95 ms", "longest ms"):
        table.add_column(name, justify="left" if name == "retrieval" else "right")
    for row in result["decode"]:
        numbers = [f"{row[name]:,.1f}" for name in ("median_ms", "p95_ms", "max_ms")]
        table.add_row(row["mode"], f"{row['delay_ms']:.0f} ms", str(row["steps"]), *numbers)
    yield table
    table = Table(title="kill -9 of the retriever in decode")
    for name in ("retrieval", "rows", "submitted again", "tokens unchanged"):
        table.add_column(name, justify="left" if name == "retrieval" else "right")
    for row in result["killed"]:
        unchanged = "yes" if row["tokens_unchanged"] else "NO"
        table.add_row(row["mode"], str(row["rows"]), str(row["submitted_again"]), unchanged)
    yield table


def draw(result: Row, path: Path) -> Path | None:
    """Queries per second by pages, and the steps of each way to retrieve; None without matplotlib."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for n_contexts in sorted({row["contexts"] for row in result["queries"]}):
        rows = [row for row in result["queries"] if row["contexts"] == n_contexts]
        points = [(row["pages"], row["queries_per_s"]) for row in rows]
        left.plot(*zip(*points, strict=True), "-o", label=f"{n_contexts} contexts")
    left.set(xscale="log", yscale="log", xlabel="pages of a context", ylabel="queries per second")
    left.set(title="one layer's pages, ranked by one retriever")
    for row in result["decode"]:
        late = f" {row['delay_ms']:.0f} ms" if row["delay_ms"] else ""
        right.plot(sorted(row["step_ms"]), label=row["mode"] + late)
    right.set(xlabel="steps, shortest first", ylabel="ms", title="decode steps of 8 rows")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
