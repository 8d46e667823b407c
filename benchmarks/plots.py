"""What a run of `benchmarks.attention` found: beside the wanted numbers, as tables, as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import harness
from .attention_parts import Row, refresh_weights

WANTED_RATIOS = {1 << 20: 120.0, 256 << 10: 30.0}
"""Own dense over the amortised sparse step, at a context, with the 8B geometry."""
WANTED_GROWTH = 2.0
"""At most, of the amortised step, from the first to the second context."""
GROWTH_OVER = (64 << 10, 3 << 20)
WANTED_GB_PER_S = {"in order": 10.0, "random": 6.0}
"""Of attention with one thread."""
SELECTIONS = ("full", "from 2", "from 3")


def size(n_tokens: int) -> str:
    for unit, n in (("M", 1 << 20), ("K", 1 << 10)):
        if n_tokens % n == 0:
            return f"{n_tokens // n}{unit}"
    return f"{n_tokens:,}"


def dense_us(result: Row, geometry: str, n_tokens: int, system: str, n_queries: int = 1) -> Any:
    """Median microseconds of a dense system; None if it was not measured."""
    for row in result["dense"]:
        at = (row["geometry"], row["tokens"], row["system"], row.get("n_queries", 1))
        if at == (geometry, n_tokens, system, n_queries):
            return row["median_us"]
    return None


def checks(result: Row) -> list[Row]:
    """Every wanted number that this run can tell."""
    found = []

    def check(name: str, value: float, wanted: float, *, at_most: bool = False) -> None:
        met = value <= wanted if at_most else value >= wanted
        row = {"name": name, "found": round(value, 2), "wanted": wanted, "at_most": at_most}
        found.append(row | {"met": met})

    steps = {(r["geometry"], r["policy"], r["tokens"]): r["amortised"] for r in result["decode"]}
    for (geometry, policy, n_tokens), step in steps.items():
        name = f"{geometry}, {policy}"
        dense = dense_us(result, geometry, n_tokens, "own dense")
        if dense and geometry.startswith("Llama") and n_tokens in WANTED_RATIOS:
            label = f"{name}: own dense / sparse at {size(n_tokens)}"
            check(label, dense / step["median_us"], WANTED_RATIOS[n_tokens])
        first = steps.get((geometry, policy, GROWTH_OVER[0]))
        if first and n_tokens == GROWTH_OVER[1]:
            label = f"{name}: sparse at {size(n_tokens)} / at {size(GROWTH_OVER[0])}"
            grown = step["median_us"] / first["median_us"]
            check(label, grown, WANTED_GROWTH, at_most=True)
    for row in result["rates"]:
        if row["threads"] == 1 and row["order"] in WANTED_GB_PER_S:
            label = f"attend, GB/s of one core, pages {row['order']}"
            check(label, row["gb_per_s"]["median"], WANTED_GB_PER_S[row["order"]])
    return found


# --- tables ---------------------------------------------------------------------------------------


def tables(result: Row) -> Iterator[Table]:
    for geometry in dict.fromkeys(row["geometry"] for row in result["decode"]):
        yield _parts_table(result, geometry, "decode")
        yield _dense_table(result, geometry)
        yield _bytes_table(result, geometry)
        yield _parts_table(result, geometry, "prefill")
    if result["rates"]:
        yield _rates_table(result["rates"])
    made = _table("Wanted", "", "found", "wanted", "")
    for row in result["checks"]:
        sign = "≤" if row["at_most"] else "≥"
        said = "met" if row["met"] else "missed"
        made.add_row(row["name"], f"{row['found']:.2f}", f"{sign} {row['wanted']:g}", said)
    yield made


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 or name == "policy" else "right")
    return made


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _rows(result: Row, kind: str, geometry: str) -> list[Row]:
    return [row for row in result[kind] if row["geometry"] == geometry]


def _parts_table(result: Row, geometry: str, kind: str) -> Table:
    decode = kind == "decode"
    title = f"{geometry}, {kind}: median µs per layer, {result['threads']} threads"
    if not decode:
        title += ", block of 64 queries"
    last = ("step", "amortised", "best") if decode else ("block", "tokens/s", "SDPA f32 block")
    parts = ("plan", "attend", "merge")
    selections = SELECTIONS if decode else SELECTIONS[:1]
    made = _table(title, "context", "policy", *selections, *parts, *last)
    for row in _rows(result, kind, geometry):
        took = {part: times["median_us"] for part, times in row["parts"].items()}
        cells = [took.get(f"select_{i}") for i in range(len(selections))]
        cells += [took[part] for part in parts]
        if decode:
            cells += [took["step"], row["amortised"]["median_us"], row["amortised"]["best_us"]]
        else:
            dense = dense_us(result, geometry, row["tokens"], "SDPA float32", 64)
            cells += [row["block_us"], row["tokens_per_s"], dense]
        folded = " folded" if row["folded"] else ""
        made.add_row(size(row["tokens"]) + folded, row["policy"], *map(_us, cells))
    return made


def _dense_table(result: Row, geometry: str) -> Table:
    systems = list(dict.fromkeys(row["system"] for row in result["dense"]))
    title = f"{geometry}, decode: dense attention, median µs, and how many times ours is as fast"
    made = _table(title, "context", "policy", "sparse", *(c for s in systems for c in (s, "ratio")))
    for row in _rows(result, "decode", geometry):
        ours = row["amortised"]["median_us"]
        cells = [_us(ours)]
        for system in systems:
            dense = dense_us(result, geometry, row["tokens"], system)
            cells += [_us(dense), "-" if dense is None else f"{dense / ours:.1f}"]
        made.add_row(size(row["tokens"]), row["policy"], *cells)
    return made


def _bytes_table(result: Row, geometry: str) -> Table:
    title = f"{geometry}, decode: MB per layer and token, amortised"
    columns = ("formula, least", "most", "counted", "of least", "of most", "attend, MB", "GB/s")
    made = _table(title, "context", "policy", *columns)
    for row in _rows(result, "decode", geometry):
        moved = [row[name]["amortised"] for name in ("formula_least", "formula_most", "counted")]
        made.add_row(
            size(row["tokens"]),
            row["policy"],
            *(f"{n / 1e6:.1f}" for n in moved),
            f"{row['counted_of_formula_least']:.2f}",
            f"{row['counted_of_formula_most']:.2f}",
            f"{row['counted']['attend'] / 1e6:.1f}",
            f"{row['attend_gb_per_s']:.1f}",
        )
    return made


def _rates_table(rows: list[Row]) -> Table:
    made = _table(
        "Attend alone, and a plain read", "pages", "threads", "MB", "GB/s, median", "best"
    )
    for row in rows:
        rate = row["gb_per_s"]
        cells = (f"{row['bytes'] / 1e6:.0f}", f"{rate['median']:.2f}", f"{rate['best']:.2f}")
        made.add_row(row["order"], str(row["threads"]), *cells)
    return made


# --- plot -----------------------------------------------------------------------------------------


def stacked_us(row: Row, policy: Row) -> dict[str, float]:
    """Contribution of each part to the amortised step: selections by their share."""
    took = {part: times["median_us"] for part, times in row["parts"].items()}
    weights = refresh_weights([stage["refresh"] for stage in policy["stages"]])[:-1]
    made = {f"select {SELECTIONS[i]}": w * took[f"select_{i}"] for i, w in enumerate(weights)}
    made |= {part: took[part] for part in ("attend", "merge", "plan")}
    # a step in one call, with the tail: what its parts alone do not take
    return made | {"rest of the step": max(0.0, took["step"] - sum(list(made.values())[-3:]))}


def draw(result: Row, path: Path) -> Path | None:
    """Decode per layer by context, and its parts under the first policy. None without matplotlib."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return None
    geometries = list(dict.fromkeys(row["geometry"] for row in result["decode"]))
    figure, axes = pyplot.subplots(
        len(geometries), 2, figsize=(13, 4.6 * len(geometries)), squeeze=False
    )
    for (lines, bars), geometry in zip(axes, geometries, strict=True):
        _draw_lines(lines, result, geometry)
        _draw_bars(bars, result, geometry)
    figure.suptitle(
        f"{result['machine']['cpu']}, {result['threads']} threads, {result['dtype']} KV, "
        f"commit {result['commit'][:8]}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_lines(axes: Any, result: Row, geometry: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(result, "dense", geometry):
        if row.get("n_queries", 1) == 1:
            lines.setdefault(row["system"], []).append((row["tokens"], row["median_us"]))
    for row in _rows(result, "decode", geometry):
        point = (row["tokens"], row["amortised"]["median_us"])
        lines.setdefault(f"longreach, {row['policy']}", []).append(point)
    for name, points in lines.items():
        style = "-o" if name.startswith("longreach") else "--s"
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    ticks = sorted({row["tokens"] for row in _rows(result, "decode", geometry)})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [size(n) for n in ticks])
    axes.set(
        title=f"{geometry}: decode, amortised", xlabel="context, tokens", ylabel="µs per layer"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_bars(axes: Any, result: Row, geometry: str) -> None:
    rows = _rows(result, "decode", geometry)
    name = rows[0]["policy"]
    rows = [row for row in rows if row["policy"] == name]
    stacks = [stacked_us(row, result["policies"][name]) for row in rows]
    under = [0.0] * len(rows)
    for part in stacks[0]:
        heights = [stack[part] for stack in stacks]
        axes.bar([size(row["tokens"]) for row in rows], heights, bottom=under, label=part)
        under = [a + b for a, b in zip(under, heights, strict=True)]
    axes.set(title=f"{geometry}: parts, {name}", xlabel="context, tokens", ylabel="µs per layer")
    axes.legend(fontsize=8)
