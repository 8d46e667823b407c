"""Which pages the dense model's attention goes to, and which of them a page index would have brought.

    python -m benchmarks.recall [--quick] [--lengths 4096,8192] [--bookmarks FILE]

The embedded model reads held-out texts and held-out tasks with exact dense attention. For each block of 64
queries in the later half (prefill), and for the 32 tokens after a position (decode), every index ranks the
pages of 128 tokens before them, one choice per layer. Recall is the share of the dense attention's mass on
candidate pages that lies on the best k; the first page and the block's own are always kept and are no
candidates. `far` leaves out the latest 1,024 tokens too, which policies keep as their window.

The indexes that read summaries are compared at equal bytes: per page and layer a bookmark is one key for
each KV head, as is a mean; bounds are two, so they get pages twice as long. Search reads the page's keys
themselves. BM25 reads the text, recency and random nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longreach.core.config import Config
from longreach.workers.bookmark_file import load_bookmarks, read_card, weights_fingerprint
from longreach.workers.bookmark_source import EMBEDDED
from longreach.workers.embedded import cache_dir
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_dir
from longreach.workers.prompt import PromptBuilder
from longreach.workers.threads import use_threads
from longreach.workers.train_capture import CaptureFolder
from longreach.workers.train_data import Example, package_documents
from longreach.workers.train_prompt import Stream, StreamBuilder
from longreach.workers.train_run import end_embedding, frozen_of
from longreach.workers.train_streams import DataPlan, streams

from .captured import held_out_text
from .harness import Say, config_of, console, parser, record, result_path, write_result
from .recall_measure import Measured, measure, summary
from .recall_methods import ROLES, Methods, asked_of
from .recall_report import draw, tables

LENGTHS, QUICK_LENGTHS = (4096, 8192), (2048,)
TASKS = ("needles", "key-value")
"""One context of each and length, made of documents that training never saw."""
SEED = 700

Row = dict[str, Any]


def held_out(
    config: Config, prompts: PromptBuilder, n_tokens: int, *, quick: bool
) -> Iterator[tuple[str, Stream]]:
    """(kind, context): text of this repository's own and of held-out documents, then tasks."""
    builder = StreamBuilder(prompts)
    own = builder.build(Example("worlds", held_out_text(prompts.count, n_tokens)))
    yield "text", Stream(f"worlds {n_tokens}", own.token_ids[:n_tokens], ())
    if quick:
        tasks: tuple[str, ...] = ("needles",)
        documents = package_documents(("rich",))
    else:
        tasks = ("text", *TASKS)
        documents = package_documents()
    plan = DataPlan(n_held_out=len(tasks), context_tokens=n_tokens, tasks=tasks, seed=SEED)
    for name, stream in zip(
        tasks, streams(plan, documents, [], builder, held_out=True), strict=True
    ):
        yield "text" if name == "text" else "tasks", stream


def run(
    config: Config, lengths: Sequence[int], weights: str, folder: Path, say: Say, *, quick: bool
) -> list[Row]:
    """A row per length, kind and role, with every method."""
    prompts = PromptBuilder.from_config(config)
    directory = model_dir(config.model)
    model = ModelAdapter(directory, own_kernels=False)
    captures = CaptureFolder(folder, weights_fingerprint(directory), lambda: model)
    bookmarks = load_bookmarks(weights, directory)
    methods = Methods(bookmarks, frozen_of(model), end_embedding(model))
    rows = []
    for n_tokens in lengths:
        found: dict[tuple[str, str], list[Measured]] = {}
        for kind, stream in held_out(config, prompts, n_tokens, quick=quick):
            capture = captures.get(stream, say, full=True)
            texts = [prompts.decode([int(i)]) for i in capture.token_ids]
            for role in ROLES:
                asked = asked_of(capture, role)
                say(f"{stream.name}, {role}: {len(asked.positions)} selections per layer")
                found.setdefault((kind, role), []).append(measure(methods, capture, asked, texts))
        for (kind, role), parts in found.items():
            summed = summary(parts)
            for name, row in summed.items():
                row["bytes"] = methods.bytes_of(name)
            rows.append({"tokens": n_tokens, "kind": kind, "role": role, "methods": summed})
    return rows


def main(argv: Sequence[str]) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--lengths", help="tokens of the contexts, with commas")
    arguments.add_argument("--bookmarks", default=EMBEDDED, help="weights; default: those shipped")
    arguments.add_argument("--captures", type=Path, default=cache_dir().parent / "recall")
    given = arguments.parse_args(argv)
    config = config_of(given, small=False)
    use_threads(config.model.n_threads)
    shown = console()
    lengths = QUICK_LENGTHS if given.quick else LENGTHS
    if given.lengths:
        lengths = tuple(int(n) for n in given.lengths.split(","))
    result = record("benchmarks.recall", config, argv)

    def say(line: str) -> None:
        shown.print(line, style="dim")

    rows = run(config, lengths, given.bookmarks, given.captures, say, quick=given.quick)
    result |= {"card": read_card(given.bookmarks).model_dump(), "rows": rows}
    path = result_path(given, "recall")
    write_result(path, result)
    for table in tables(result):
        shown.print(table)
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
