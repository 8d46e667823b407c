"""What follows from the rows of `benchmarks.model`: extrapolation, rates, ratios, tables and the plot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from . import harness
from .llama_cpp import WAYS, faster
from .speed import PARTS

OURS, DENSE, LLAMA = "longreach", "dense attention", "llama.cpp"
# by length, how many times as fast as llama.cpp
WANTED = {32768: {"prefill": 5, "decode": 5}, 65536: {"decode": 10}, 131072: {"decode": 20}}

Row = dict[str, Any]
Systems = dict[str, list[Row]]


# --- what follows from the rows -------------------------------------------------------------------


def fit(lengths: Sequence[int], values: Sequence[float], powers: Sequence[int]) -> list[float]:
    """Least squares: coefficients of these powers of the length."""
    columns = np.array([[float(n) ** power for power in powers] for n in lengths])
    return [float(c) for c in np.linalg.lstsq(columns, np.array(values), rcond=None)[0]]


def extrapolated(rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
    """Rows of the lengths beyond the longest measured; none from fewer than two rows.

    Median decode ms = a + b T, prefill s = c T + d T^2.
    """
    if len(rows) < 2:
        return []
    seen = [row["tokens"] for row in rows]
    a, b = fit(seen, [row["decode_ms"]["median"] for row in rows], (0, 1))
    c, d = fit(seen, [row["prefill_s"] for row in rows], (1, 2))
    told = {"decode_ms": [a, b], "prefill_s": [c, d], "lengths": seen}
    return [
        {
            "tokens": n,
            "extrapolated": True,
            "prefill_s": round(c * n + d * n * n, 3),
            "prefill_tokens_per_s": round(1 / (c + d * n), 2),
            "decode_ms": {"median": round(a + b * n, 3)},
            "fit": told,
        }
        for n in lengths
        # times below zero come from disturbed measurements: nothing follows from them
        if n > max(seen) and c + d * n > 0 and a + b * n > 0
    ]


def margins(rows: Sequence[Row], *, grown: bool = False) -> list[Row]:
    """Rows with the prefill rate of the part beyond the row before.

    grown: a row prefilled that part alone; prefill_s becomes the time of the whole text.
    """
    made: list[Row] = []
    for row in rows:
        before = made[-1] if made else {"tokens": 0, "prefill_s": 0.0}
        rate, more = row["prefill_tokens_per_s"], {}
        if grown:
            whole_s = before["prefill_s"] + row["prefill_s"]
            more = {"part_prefill_s": row["prefill_s"], "prefill_s": round(whole_s, 3)}
            more["prefill_tokens_per_s"] = round(row["tokens"] / whole_s, 2)
        else:
            part_s = row["prefill_s"] - before["prefill_s"]
            n_part = row["tokens"] - before["tokens"]
            rate = round(n_part / part_s, 2) if part_s > 0 else None
        made.append({**row, **more, "marginal_tokens_per_s": rate})
    return made


def completed(rows_of: Systems, lengths: Sequence[int], *, grown: bool) -> Systems:
    """Every side with marginal rates and the lengths it was not measured at; one llama.cpp."""
    made: Systems = {}
    for name, rows in rows_of.items():
        made[name] = rows if name.startswith(OURS) else [*rows, *extrapolated(rows, lengths)]
    ways = [made.pop(name) for name in WAYS if name in made]
    if ways:
        made[LLAMA] = faster(ways[0], ways[-1])
    return {
        name: margins(rows, grown=grown and name.startswith(OURS)) for name, rows in made.items()
    }


def ratios(systems: Systems) -> list[Row]:
    """How many times as fast as each other side every config of ours is, at each common length."""
    made = []
    mine = [name for name in systems if name.startswith(OURS)]
    for name, other in itertools.product(mine, (LLAMA, DENSE)):
        theirs = {row["tokens"]: row for row in systems.get(other, ())}
        for row in (row for row in systems[name] if row["tokens"] in theirs):
            them = theirs[row["tokens"]]
            prefill = row["prefill_tokens_per_s"] / them["prefill_tokens_per_s"]
            decode = them["decode_ms"]["median"] / row["decode_ms"]["median"]
            told = {"system": name, "against": other, "tokens": row["tokens"]}
            told["extrapolated"] = them["extrapolated"]
            told["wanted"] = WANTED.get(row["tokens"], {}) if other == LLAMA else {}
            made.append({**told, "prefill": round(prefill, 2), "decode": round(decode, 2)})
    return made


# --- tables and the plot --------------------------------------------------------------------------


def _mark(row: Row, text: str) -> str:
    return f"~{text}" if row["extrapolated"] else text


def rows_table(systems: Systems) -> Table:
    made = Table(title="By context length (~: extrapolated)")
    names = ("system", "tokens", "prefill/s", "of the new part", "first token", "decode ms")
    for name in (*names, "mean", "first", "max of others", "max/median", "peak MiB"):
        made.add_column(name, justify="left" if name == "system" else "right")
    for name, rows in systems.items():
        for row in rows:
            rate, ms = row["marginal_tokens_per_s"], row["decode_ms"]
            cells = [
                f"{row['prefill_tokens_per_s']:.1f}",
                "-" if rate is None else f"{rate:.1f}",
                f"{row.get('ttft_s', row['prefill_s']):.1f} s",
                f"{ms['median']:.1f}",
            ]
            cells = [_mark(row, cell) for cell in cells]
            if not row["extrapolated"]:
                cells += [f"{ms[kind]:.1f}" for kind in ("mean", "first", "max")]
                cells.append(f"{ms['max_over_median']:.2f}")
                cells.append(f"{row['peak_resident_bytes'] / 2**20:,.0f}")
            made.add_row(name, f"{row['tokens']:,}", *cells)
        made.add_section()
    return made


def parts_table(rows: Sequence[Row]) -> Table:
    """Where the time of one side's rows goes, by length."""
    made = Table(title="Where the time goes, ms per token")
    for name in ("tokens", "phase", *PARTS, "other", "all"):
        made.add_column(name, justify="left" if name == "phase" else "right")
    for row in rows:
        steady = row["steady"]
        phases = {
            "prefill": (row["prefill_seconds"], row["prefill_s"], row["tokens_prefilled"]),
            "decode": (steady["seconds"], steady["s"], steady["steps"]),
        }
        for phase, (seconds, total_s, n) in phases.items():
            every = [*(seconds[part] for part in (*PARTS, "other")), total_s]
            made.add_row(
                f"{row['tokens']:,}", phase, *(f"{1e3 * x / max(n, 1):.2f}" for x in every)
            )
    return made


def ratios_table(rows: Sequence[Row]) -> Table:
    made = Table(title="How many times as fast (~: the other side is extrapolated)")
    for name in ("system", "against", "tokens", "prefill", "wanted", "decode", "wanted"):
        made.add_column(name, justify="left" if name in ("system", "against") else "right")
    for row in rows:
        cells = []
        for phase in ("prefill", "decode"):
            wanted = row["wanted"].get(phase)
            cells += [_mark(row, f"{row[phase]:.2f}"), f"≥ {wanted}" if wanted else ""]
        made.add_row(row["system"], row["against"], f"{row['tokens']:,}", *cells)
    return made


TICKS = (1, 2, 5)
FINE_TICKS = (1, 1.2, 1.4, 1.6, 1.8, 2, 3, 4, 5, 6, 7, 8, 9)
"""Of an axis that spans less than a factor of 5: TICKS might label it once."""


def pyplot() -> Any:
    """matplotlib, drawing into files. Raises SystemExit where it is missing."""
    made = harness.pyplot()
    if made is None:
        fix = "pip install matplotlib, or leave the plot out with --no-plot"
        raise SystemExit(f"the plot needs matplotlib: {fix}")
    return made


def plot(systems: Systems, path: Path) -> None:
    """Two panels, both axes logarithmic; extrapolated lines are dashed."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    ticks = sorted({row["tokens"] for rows in systems.values() for row in rows})
    titles = ("decode, median ms per token", "prefill of the whole text, tokens/s")
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        for color, (name, rows) in enumerate(systems.items()):
            solid = [row for row in rows if not row["extrapolated"]]
            # the dashed line begins where the solid one ends
            dashed = [*solid[-1:], *(row for row in rows if row["extrapolated"])]
            for part, style, label in ((solid, "-o", name), (dashed, "--", None)):
                y = [(r["decode_ms"]["median"], r["prefill_tokens_per_s"])[i] for r in part]
                panel.plot([r["tokens"] for r in part], y, style, c=f"C{color}", label=label)
        panel.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
        panel.set_xticks(ticks, [f"{n / 1024:g}K" for n in ticks])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        low, high = panel.get_ylim()
        panel.yaxis.set_major_locator(plt.LogLocator(subs=TICKS if high > 5 * low else FINE_TICKS))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(which="both", alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
