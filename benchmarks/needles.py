"""Facts found in long texts by the embedded model as configured (configs/dev.yaml), beside dense attention.

    python -m benchmarks.needles [--quick] [--skip-dense]

One magic number at three depths of 12K and 16K tokens, and four documents of 12K tokens with five
facts each, whose questions share one prefill. Hugging Face dense attention answers the same prompts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from longreach.workers.dense import DenseModel
from longreach.workers.prompt import Prompt, PromptBuilder

from .facts import Fact
from .harness import (
    Answer,
    Say,
    Session,
    config_of,
    console,
    load_model,
    open_session,
    parser,
    record,
    result_path,
    write_result,
)
from .texts import Document, documents, needles

LENGTHS = (12_000, 16_000)
NEEDLE_DEPTHS = (0.1, 0.5, 0.8)
DOCUMENT_TOKENS = 12_000
WANTED_OF_DOCUMENTS = 12
QUICK_TOKENS = 2_000
ANSWER_TOKENS = 16

Row = dict[str, Any]


def found(fact: Fact, answer: str) -> Row:
    """An answer and whether it holds the fact."""
    return {"answer": answer, "hit": fact.found_in(answer)}


def total(rows: Iterable[Row], kind: str, by: str) -> Row | None:
    """Hits among the rows of a kind; None if nobody was asked."""
    asked = [row[by]["hit"] for row in rows if row["kind"] == kind and row[by] is not None]
    return {"hits": sum(asked), "of": len(asked)} if asked else None


def totals(rows: Sequence[Row]) -> Row:
    return {
        kind: {by: total(rows, kind, by) for by in ("sparse", "dense")}
        for kind in ("needle", "document")
    }


def row_of(
    kind: str, document: Document, at: int, prompt: Prompt, answer: Answer, dense: str | None
) -> Row:
    depth, fact = document.facts[at]
    return {
        "kind": kind,
        "document": document.name,
        "tokens": prompt.n_tokens,
        "depth": depth,
        "question": fact.question,
        "wanted": fact.answer,
        "sparse": found(fact, answer.text),
        "dense": None if dense is None else found(fact, dense),
        "stats": {
            name: answer.stats[name]
            for name in ("tokens_prefilled", "tokens_reused", "prefill_s", "decode_s", "ttft_s")
        },
    }


def ask(
    kind: str,
    document: Document,
    prompts: PromptBuilder,
    session: Session,
    dense: DenseModel | None,
    say: Say,
) -> list[Row]:
    """All questions of a document together, so that its context is read once by each side."""
    built = [prompts.build(document.text, f.question, f.prefix) for _, f in document.facts]
    started_s = time.monotonic()
    answers = session.ask(built, ANSWER_TOKENS, say)
    say(f"sparse took {time.monotonic() - started_s:.0f} s")
    said: list[str | None] = [None] * len(built)
    if dense is not None:
        started_s = time.monotonic()
        said = [dense.text(a) for a in dense.answer(built, [ANSWER_TOKENS] * len(built))]
        say(f"dense took {time.monotonic() - started_s:.0f} s")
    rows = []
    for i, (prompt, answer) in enumerate(zip(built, answers, strict=True)):
        rows.append(row_of(kind, document, i, prompt, answer, said[i]))
        say(f"wanted {rows[-1]['wanted']!r}: {_line(answer.text)}")
    return rows


def table(rows: Sequence[Row]) -> Table:
    made = Table(title="Facts found")
    for name in ("text", "tokens", "depth", "fact", "longreach", "", "dense attention", ""):
        made.add_column(name, justify="right" if name in ("tokens", "depth") else "left")
    for row in rows:
        made.add_row(
            row["document"],
            f"{row['tokens']:,}",
            f"{row['depth']:.2f}",
            row["wanted"],
            *_cells(row["sparse"]),
            *_cells(row["dense"]),
        )
    return made


def _cells(answer: Row | None) -> tuple[str, str]:
    if answer is None:
        return "not asked", ""
    return _line(answer["answer"]), "hit" if answer["hit"] else "miss"


def _line(text: str, n_chars: int = 36) -> str:
    line = " ".join(text.split())
    return line if len(line) <= n_chars else line[: n_chars - 1] + "…"


def _total_lines(rows: Sequence[Row]) -> Iterable[str]:
    for kind, sides in totals(rows).items():
        parts = [
            f"{name} {side['hits']} of {side['of']}"
            for name, side in (("longreach", sides["sparse"]), ("dense", sides["dense"]))
            if side
        ]
        yield f"{kind}s: " + (", ".join(parts) or "none asked")


def main(argv: Sequence[str] | None = None) -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--only", choices=("needle", "document"), help="one kind of text")
    arguments = arguments_of.parse_args(argv)
    out = console()
    config = config_of(arguments, small=arguments.quick)
    result = record("benchmarks.needles", config, sys.argv[1:] if argv is None else argv)
    path = result_path(arguments, "needles")
    model, prompts = load_model(config)
    length = arguments.tokens or (QUICK_TOKENS if arguments.quick else DOCUMENT_TOKENS)
    if arguments.quick:
        wanted = [("needle", d) for d in needles(prompts.count, (length,), (0.5,))]
        wanted += [("document", d) for d in documents(prompts.count, length)[:1]]
    else:
        lengths = (length,) if arguments.tokens else LENGTHS
        wanted = [("needle", d) for d in needles(prompts.count, lengths, NEEDLE_DEPTHS)]
        wanted += [("document", d) for d in documents(prompts.count, length)]
    if arguments.only:
        wanted = [(kind, document) for kind, document in wanted if kind == arguments.only]
    dense = None if arguments.skip_dense else DenseModel(config.model)
    started_s = time.monotonic()
    rows: list[Row] = []
    with open_session(config, model, prompts) as session:
        for i, (kind, document) in enumerate(wanted):
            out.print(f"{i + 1} of {len(wanted)}: {kind} {document.name}")
            rows += ask(kind, document, prompts, session, dense, lambda s: out.print(f"  {s}"))
            result |= {
                "complete": i + 1 == len(wanted),
                "seconds": round(time.monotonic() - started_s, 1),
                "totals": totals(rows),
                "rows": rows,
            }
            write_result(path, result)
    out.print(table(rows))
    for line in _total_lines(rows):
        out.print(line)
    if not arguments.quick:
        out.print(f"wanted: at least {WANTED_OF_DOCUMENTS} of 20 in the documents")
    out.print(f"written to {path}")


if __name__ == "__main__":
    main()
