"""Facts that each page index finds in long texts at one budget: single ones, and one number among others.

    python -m benchmarks.retrieval [--quick] [--keep] [--lengths 8192,16384] [--methods "bookmark;bounds"]

One text per length carries 14 facts, each of a wording of its own ("single"), and six magic numbers of six
animals in the same words, each of which is asked for ("among alike"). Every method attends to the same
number of tokens: the first page of 128, a window, and as many pages of 128 as the budget leaves, or blocks
of 8 out of more pages where two stages follow each other. Each prefills with its own selection, so that it
answers with the keys and values it would have in use.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from longreach.core.config import AttentionConfig, Config
from longreach.core.stage import LayerPolicy, Stage

from .facts import magic_number
from .harness import (
    ROOT,
    config_of,
    console,
    load_model,
    parser,
    pyplot,
    record,
    result_path,
    write_result,
)
from .styles import FACTS, LAST_DEPTH, MARKERS, measured
from .texts import Count, Document, build_text

LENGTHS, QUICK_LENGTHS = (8192, 16384, 32768), (4096,)
N_SINGLE = 14
ALIKE = tuple(magic_number(seed) for seed in range(12, 18))
SEED = 800
PAGE = 128
QUESTION_BLOCK = 16
SPREAD = 0.4

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """stages: of all layers but the first `n_first`, which rank pages by their mean keys; window: latest
    tokens kept."""

    name: str
    stages: tuple[Stage, ...]
    window: int = 2 * PAGE
    n_first: int = 2

    @property
    def budget(self) -> int:
        """Tokens attended in a layer that selects."""
        return PAGE + self.window + self.stages[-1].keep


def methods(budget: int) -> tuple[Method, ...]:
    """All of which attend to `budget` tokens."""
    keep, window = budget - 3 * PAGE, 1024
    inner = Stage(
        scorer="bounds", chunk=8, keep=budget - PAGE - window, query_stride=2, spread=SPREAD
    )

    def pages(scorer: str, n_tokens: int = keep, **more: Any) -> Stage:
        return Stage(scorer=scorer, chunk=PAGE, keep=n_tokens, **more)  # type: ignore[arg-type]

    bounds = {"query_stride": 4, "spread": SPREAD}
    return (
        Method("bookmark", (pages("bookmark"),)),
        Method("bounds", (pages("bounds", **bounds),)),
        Method("mean", (pages("mean", query_stride=4),)),
        Method("search", (pages("search"),)),
        Method("recency", (pages("mean", PAGE),), window=budget - 2 * PAGE),
        Method("bookmark, then bounds", (pages("bookmark", 8192), inner), window),
        Method("bounds, then bounds", (pages("bounds", 8192, **bounds), inner), window),
        Method("bounds of 8 alone", (inner,), window, n_first=0),
    )


def configured(base: Config, method: Method) -> Config:
    """The configuration with this method in every layer, true to its budget."""
    shared: dict[str, Any] = {"sink": PAGE, "window": method.window, "reduce": "softmax"}
    mean = Stage(scorer="mean", chunk=PAGE, keep=method.stages[-1].keep // PAGE * PAGE)
    policies = [LayerPolicy(layers="rest", stages=method.stages, **shared)]
    if method.n_first:
        first = f"0-{method.n_first - 1}"
        policies.insert(0, LayerPolicy(layers=first, stages=(mean,), **shared))
    attention = AttentionConfig(policies=tuple(policies), question_block=QUESTION_BLOCK)
    return Config.model_validate(base.model_dump() | {"attention": attention.model_dump()})


def document(count: Count, n_tokens: int) -> Document:
    """The numbers that are alike stand between the others."""
    facts = [*FACTS[:N_SINGLE], *ALIKE]
    order = sorted(range(len(facts)), key=lambda i: (i * 7) % len(facts))
    depths = [LAST_DEPTH * (i + 0.5) / len(facts) for i in range(len(facts))]
    placed = tuple((depth, facts[i]) for depth, i in zip(depths, order, strict=True))
    text = build_text(count, SEED, n_tokens, [(depth, fact.sentence) for depth, fact in placed])
    return Document(f"{n_tokens:,} tokens", text, placed)


def by_kind(facts: Sequence[Row]) -> dict[str, list[int]]:
    """(hits, of) of what is single and what stands among others alike."""
    alike = {fact.answer for fact in ALIKE}
    kinds: dict[str, list[int]] = {"single": [0, 0], "among alike": [0, 0]}
    for row in facts:
        kind = kinds["among alike" if row["wanted"] in alike else "single"]
        kind[0] += row["hit"]
        kind[1] += 1
    return kinds


def table(rows: Sequence[Row]) -> Table:
    lengths = sorted({row["length"] for row in rows})
    made = Table(title="Facts found, single + among others alike, by what chooses the pages")
    made.add_column("index")
    for n in lengths:
        made.add_column(f"{n / 1024:g}K", justify="right")
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = {row["length"]: row["kinds"] for row in rows if row["method"] == name}
        cells = [" + ".join(f"{hits}/{of}" for hits, of in mine[n].values()) if n in mine else ""
                 for n in lengths]  # fmt: skip
        made.add_row(name, *cells)
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharex=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    for panel, kind in zip(panels, ("single", "among alike"), strict=True):
        for i, name in enumerate(names):
            mine = sorted((r["length"], r["kinds"][kind][0]) for r in rows if r["method"] == name)
            # a little apart, so that equal ones do not hide each other
            where = [n * 1.012 ** (i - len(names) // 2) for n, _ in mine]
            marker = MARKERS[i % len(MARKERS)]
            panel.plot(where, [hits for _, hits in mine], "-" + marker, label=name)
        n_facts = len(ALIKE) if kind == "among alike" else N_SINGLE
        panel.set(xscale="log", title=kind, xlabel="tokens", ylabel=f"found of {n_facts}")
        panel.set_xticks(lengths, [f"{n / 1024:g}K" for n in lengths])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.set_ylim(-0.3, n_facts + 0.3)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str]) -> Any:
    made = parser(__doc__)
    made.set_defaults(config=ROOT / "configs" / "retrolm.yaml")
    made.add_argument("--lengths", help=f"default {','.join(map(str, LENGTHS))}")
    made.add_argument("--methods", help="names parted by ;, default: all")
    made.add_argument("--budget", type=int, default=2304, help="tokens attended in each layer")
    made.add_argument("--keep", action="store_true", help="add to what the result file has")
    given = made.parse_args(argv)
    default = QUICK_LENGTHS if given.quick else LENGTHS
    given.lengths = [int(n) for n in given.lengths.split(",")] if given.lengths else list(default)
    known = {method.name: method for method in methods(given.budget)}
    chosen = given.methods.split(";") if given.methods else list(known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        made.error(f"no method {unknown[0]!r}; known, to be parted by ';': {'; '.join(known)}")
    given.methods = [known[name] for name in chosen]
    return given


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    out = console()
    base = config_of(given, small=False)
    result = record("benchmarks.retrieval", base, argv)
    path = result_path(given, "retrieval")
    rows: list[Row] = []
    if given.keep and path.is_file():
        rows = json.loads(path.read_text())["rows"]
    model, prompts = load_model(base)
    for length in given.lengths:
        text = document(prompts.count, length)
        for method in given.methods:
            out.print(f"{length:,} tokens, {method.name}")
            row = measured(
                configured(base, method), model, prompts, text, lambda s: out.print(f"  {s}")
            )
            kinds = by_kind(row["facts"])
            out.print(f"  {kinds} in {row['seconds']:.0f} s")
            rows = [r for r in rows if (r["length"], r["method"]) != (length, method.name)]
            told = {"length": length, "method": method.name, "budget": method.budget}
            rows.append({**told, "commit": result["commit"], "kinds": kinds, **row})
            write_result(path, result | {"rows": rows})
    out.print(table(rows))
    plot(rows, path.with_suffix(".png"))
    out.print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
