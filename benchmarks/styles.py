"""Facts found by length of the text and by the positions that selection and attention give to keys.

    python -m benchmarks.styles [--quick] [--lengths 8192,16384] [--styles relative/streaming,...] [--keep]

One text per length carries all twenty facts of `benchmarks.facts`, evenly spread; its questions share
one prefill. A style is the positions while selecting, then those while attending (`none`: true ones);
everything else is as configured. Lengths beyond the third are read with the two styles that found the
most before. The embedded model was trained for 8,192 tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from longreach.core.config import Config, load_config
from longreach.core.stage import AttendRope, SelectRope
from longreach.workers.model import ModelAdapter
from longreach.workers.prompt import PromptBuilder

from .facts import FACTS
from .harness import (
    Say,
    config_of,
    console,
    load_model,
    open_session,
    parser,
    pyplot,
    record,
    result_path,
    scaled_down,
    write_result,
)
from .model import room
from .needles import found
from .texts import Count, Document, build_text

LENGTHS = (8192, 16384, 32768, 65536)
QUICK_LENGTHS = (4096, 5120)
STYLES = (
    ("relative", "streaming"),
    ("clamped", "streaming"),
    ("streaming", "streaming"),
    ("chunk-indexed", "streaming"),
    ("none", "streaming"),
    ("relative", "none"),
    ("none", "none"),
)
N_FULL_LENGTHS = 3
"""Lengths that every style reads."""
N_BEST = 2
ANSWER_TOKENS = 16
PART_TOKENS = 40_000
"""One seed of the generator fills no more."""
FIRST_SEED = 500
MARKERS = "osD^vPX"
LAST_DEPTH = 0.97
"""A fact's paragraph must end inside the text."""

Row = dict[str, Any]


def document(count: Count, n_tokens: int) -> Document:
    """A text with every fact, in parts that a seed can fill."""
    n_parts = -(-n_tokens // PART_TOKENS)
    n_facts = len(FACTS)
    texts, placed = [], []
    for part in range(n_parts):
        mine = FACTS[part * n_facts // n_parts : (part + 1) * n_facts // n_parts]
        depths = [LAST_DEPTH * (i + 0.5) / len(mine) for i in range(len(mine))]
        sentences = [(d, f.sentence) for d, f in zip(depths, mine, strict=True)]
        texts.append(build_text(count, FIRST_SEED + part, n_tokens // n_parts, sentences))
        placed += [((part + d) / n_parts, f) for d, f in zip(depths, mine, strict=True)]
    return Document(f"{n_tokens:,} tokens", "\n".join(texts), tuple(placed))


def styled(arguments: Any, select: str, attend: str) -> Config:
    """The configuration with these positions in every layer that selects."""
    base = config_of(arguments, small=False)
    sets = []
    for i, policy in enumerate(base.attention.policies):
        if policy.stages:
            sets += [f"attention.policies.{i}.select_rope={select}"]
            sets += [f"attention.policies.{i}.attend_rope={attend}"]
    every = [*arguments.set, *sets]
    if arguments.quick:
        every += scaled_down(base)
    return load_config([arguments.config], every)


def measured(
    config: Config, model: ModelAdapter, prompts: PromptBuilder, text: Document, say: Say
) -> Row:
    built = [prompts.build(text.text, f.question, f.prefix) for _, f in text.facts]
    n_tokens = max(prompt.n_tokens for prompt in built)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        # questions and answers take pages too
        roomy, _ = room(config, n_tokens + len(built) * 512, scratch)
        with open_session(roomy, model, prompts) as session:
            answers = session.ask(built, ANSWER_TOKENS, say)
    rows = [
        {"depth": round(depth, 3), "wanted": fact.answer, **found(fact, answer.text)}
        for (depth, fact), answer in zip(text.facts, answers, strict=True)
    ]
    hits = sum(row["hit"] for row in rows)
    seconds = round(time.monotonic() - started_s, 1)
    return {"tokens": n_tokens, "hits": hits, "of": len(rows), "seconds": seconds, "facts": rows}


def best(rows: Sequence[Row], lengths: Sequence[int], n: int) -> list[tuple[str, str]]:
    """Styles by facts found over these lengths, the most first; the earlier of equals."""
    sums: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["length"] in lengths:
            style = (row["select"], row["attend"])
            sums[style] = sums.get(style, 0) + row["hits"]
    return sorted(sums, key=lambda style: -sums[style])[:n]


def table(rows: Sequence[Row]) -> Table:
    lengths = sorted({row["length"] for row in rows})
    made = Table(title=f"Facts found, of {len(FACTS)}, by positions while selecting and attending")
    for name in ("selecting", "attending", *(f"{n / 1024:g}K" for n in lengths)):
        made.add_column(name, justify="left" if name.endswith("ing") else "right")
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        mine = cells.setdefault((row["select"], row["attend"]), {})
        mine[row["length"]] = str(row["hits"])
    for style, by_length in cells.items():
        made.add_row(*style, *(by_length.get(n, "") for n in lengths))
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles = list(dict.fromkeys((row["select"], row["attend"]) for row in rows))
    for i, style in enumerate(styles):
        mine = sorted(
            (row["length"], row["hits"]) for row in rows if (row["select"], row["attend"]) == style
        )
        look = "--" if style[1] == "none" else "-"
        # a little apart, so that equal ones do not hide each other
        lengths = [length * 1.012 ** (i - len(styles) // 2) for length, _ in mine]
        hits = [n for _, n in mine]
        panel.plot(lengths, hits, look + MARKERS[i % len(MARKERS)], label=" / ".join(style))
    ticks = sorted({row["length"] for row in rows})
    panel.set(xscale="log", xlabel="tokens", ylabel=f"facts found of {len(FACTS)}")
    panel.set_xticks(ticks, [f"{n / 1024:g}K" for n in ticks])
    panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    panel.set_ylim(bottom=-0.5, top=len(FACTS))
    panel.set_yticks(range(0, len(FACTS) + 1, 2))
    panel.legend(title="selecting / attending")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> Any:
    made = parser(__doc__)
    made.add_argument("--lengths", help=f"default {','.join(map(str, LENGTHS))}")
    made.add_argument(
        "--styles", help="like relative/streaming,none/none; default: all, then the best"
    )
    made.add_argument("--keep", action="store_true", help="add to what the result file has")
    found = made.parse_args(argv)
    default = QUICK_LENGTHS if found.quick else LENGTHS
    found.lengths = [int(n) for n in found.lengths.split(",")] if found.lengths else list(default)
    styles = None
    if found.styles:
        styles = [tuple(style.split("/")) for style in found.styles.split(",")]
        known = set(get_args(SelectRope)), set(get_args(AttendRope))
        for style in styles:
            if len(style) != 2 or style[0] not in known[0] or style[1] not in known[1]:
                made.error(f"{'/'.join(style)}: selecting is one of {sorted(known[0])}, "
                           f"attending one of {sorted(known[1])}")  # fmt: skip
    found.styles = styles
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    out = console()
    config = config_of(arguments, small=arguments.quick)
    result = record("benchmarks.styles", config, sys.argv[1:] if argv is None else argv)
    path = result_path(arguments, "styles")
    rows: list[Row] = []
    if arguments.keep and path.is_file():
        rows = json.loads(path.read_text())["rows"]
    model, prompts = load_model(config)
    for i, length in enumerate(arguments.lengths):
        text = document(prompts.count, length)
        styles = arguments.styles
        if styles is None:
            styles = STYLES
            if i >= N_FULL_LENGTHS:
                styles = best(rows, arguments.lengths[:N_FULL_LENGTHS], N_BEST)
        for select, attend in styles:
            out.print(f"{length:,} tokens, {select} / {attend}")
            own = styled(arguments, select, attend)
            row = measured(own, model, prompts, text, lambda s: out.print(f"  {s}"))
            out.print(f"  {row['hits']} of {row['of']} in {row['seconds']:.0f} s")
            key = (length, select, attend)
            rows = [r for r in rows if (r["length"], r["select"], r["attend"]) != key]
            told = {"length": length, "select": select, "attend": attend}
            rows.append({**told, "commit": result["commit"], **row})
            write_result(path, result | {"rows": rows})
    out.print(table(rows))
    plot(rows, path.with_suffix(".png"))
    out.print(f"written to {path}")


if __name__ == "__main__":
    main()
