"""What post-training over retrieved pages does to the embedded model: text and facts, before and after.

    python -m benchmarks.post_train MODEL [--quick] [--only before] [--curve CURVE.json] [--bookmarks FILE]

MODEL is the folder that `longreach post-train` wrote. Each model reads the same contexts twice: within the
budget, pages chosen as in training, and with dense attention. So what the model learnt of the text (both
get better) stands apart from what it learnt of reading few pages (the first gains on the second).

Text: the perplexity of one text of invented worlds with this repository's prose, and of one of
documentation, neither trained on; since no token sees a later one, 4K and 8K are beginnings of one reading.
Facts and needles: a value counts as found where each of its tokens, after the answer's opening words, is the
likeliest one, which is what greedy decoding would say. The bookmark behind those words chooses the pages for
it. Needles have the wordings of the training tasks, in other documents; facts have wordings of their own.

Rows of a run that was cut short are kept, where model and contexts are the same.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longreach.core.config import Config
from longreach.core.stage import DENSE
from longreach.workers.bookmark_file import load_bookmarks, read_card, weights_fingerprint
from longreach.workers.bookmark_source import EMBEDDED
from longreach.workers.embedded import ensure_embedded_model
from longreach.workers.post_run import BOOKMARKS, CARD, decoder_of
from longreach.workers.post_training import PostPlan, by_layer, policies_for
from longreach.workers.prompt import PromptBuilder
from longreach.workers.sparse_forward import SparseForward, groups_of
from longreach.workers.threads import use_threads
from longreach.workers.train_data import PACKAGES, Example, Question, package_documents
from longreach.workers.train_prompt import StreamBuilder
from longreach.workers.train_streams import DataPlan, streams

from .captured import held_out_text
from .harness import Say, config_of, console, parser, record, result_path, write_result
from .post_train_report import draw, lines, tables
from .texts import documents

LENGTHS, QUICK_LENGTHS = (4096, 8192), (1024, 1536)
N_DOCUMENTS = 2
"""Of five facts each, at every length."""
SEED = 700
"""Of the data; no training run has it by default."""
QUESTIONS_TOKENS = 320
"""Left for five questions and their answers."""
SPARSE, DENSE_NAME = "sparse", "dense"

Row = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """What an answer says after its opening words: [start, end) tokens of a context."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Context:
    """kind: worlds, documentation, needles, facts; token_ids int64 [T]; cuts: where pages are chosen anew."""

    kind: str
    name: str
    token_ids: np.ndarray
    cuts: tuple[int, ...] = ()
    values: tuple[Value, ...] = ()


# --- what is read ---------------------------------------------------------------------------------


def contexts(
    prompts: PromptBuilder,
    lengths: Sequence[int],
    n_documents: int,
    packages: Sequence[str] = PACKAGES,
) -> Iterator[Context]:
    """Texts of the greatest length, then tasks of every length. packages: whose held-out documentation is
    read."""
    builder, longest = StreamBuilder(prompts), max(lengths)
    worlds = builder.build(Example("worlds", held_out_text(prompts.count, longest)))
    yield Context("worlds", f"worlds {longest}", worlds.token_ids[:longest])
    own = package_documents(packages)
    for kind, task, sizes in (
        ("documentation", "text", (longest,)),
        ("needles", "needles", lengths),
    ):
        for n_tokens in sizes:
            plan = DataPlan(n_held_out=1, context_tokens=n_tokens, tasks=(task,), seed=SEED)
            (stream,) = streams(plan, own, [], builder, held_out=True)
            asked = [ask.position + 1 for ask in stream.asks]
            yield _asked(kind, f"{kind} {n_tokens}", stream.token_ids, asked, prompts)
    for n_tokens in lengths:
        for document in documents(prompts.count, n_tokens - QUESTIONS_TOKENS)[:n_documents]:
            questions = tuple(
                Question(fact.question, fact.sentence, ()) for _, fact in document.facts
            )
            stream = builder.build(Example(document.name, document.text, questions))
            asked = [ask.position + 1 for ask in stream.asks]
            texts = [(fact.prefix, fact.answer) for _, fact in document.facts]
            name = f"{document.name} {n_tokens}"
            yield _asked("facts", name, stream.token_ids, asked, prompts, texts)


def _asked(
    kind: str,
    name: str,
    token_ids: np.ndarray,
    starts: Sequence[int],
    prompts: PromptBuilder,
    texts: Sequence[tuple[str, str]] | None = None,
) -> Context:
    """starts: where answers begin; texts: opening words and value of each, read off the needles' answers
    where they are not given."""
    values = []
    for i, start in enumerate(starts):
        if texts is None:
            sentence, _, _ = prompts.decode(token_ids[start : start + 48].tolist()).partition(".")
            opening, _, said = sentence.rpartition(" ")
        else:
            opening, said = texts[i]
        n_opening = len(prompts.encode_plain(opening))
        n = len(prompts.encode_plain(f"{opening} {said}"))
        found = prompts.decode(token_ids[start + n_opening : start + n].tolist())
        if found.strip() != said:
            raise ValueError(f"{name}: {said!r} is asked for, but {found!r} stands there")
        values.append(Value(said, start + n_opening, start + n))
    cuts = sorted({*starts, *(value.start for value in values)})
    return Context(kind, name, token_ids, tuple(cuts), tuple(values))


# --- how it is read -------------------------------------------------------------------------------


@torch.no_grad()
def measure(forward: SparseForward, context: Context, lengths: Sequence[int]) -> Row:
    """Mean loss of the first tokens of a text at each length, or what became of each value."""
    token_ids = torch.from_numpy(context.token_ids)
    page_tokens = forward.bookmarks.shape.page_tokens
    groups = groups_of(len(token_ids), page_tokens, context.cuts)
    hidden = forward.hidden(token_ids, groups, {})
    if not context.values:
        losses = forward.losses(hidden, token_ids)
        return {"nats": {str(n): float(losses[: n - 1].mean()) for n in lengths}}
    found = []
    for value in context.values:
        scores = forward.logits(hidden[value.start - 1 : value.end - 1]).log_softmax(dim=-1)
        wanted = token_ids[value.start : value.end]
        nats = -scores.gather(1, wanted[:, None]).mean()
        hit = bool((scores.argmax(dim=-1) == wanted).all())
        found.append({"value": value.text, "hit": hit, "nats": round(float(nats), 4)})
    return {"values": found}


def forwards(folder: Path, weights: str, plan: PostPlan) -> dict[str, SparseForward]:
    """A model within the budget, and dense."""
    decoder, bookmarks = decoder_of(folder), load_bookmarks(weights, folder)
    n_layers = len(decoder.layers)
    sparse = by_layer(policies_for(plan, bookmarks.shape.page_tokens), n_layers)
    return {
        SPARSE: SparseForward(decoder, bookmarks, sparse),
        DENSE_NAME: SparseForward(decoder, bookmarks, [DENSE] * n_layers),
    }


def run(
    models: dict[str, tuple[Path, str]],
    wanted: Sequence[Context],
    lengths: Sequence[int],
    plan: PostPlan,
    rows: list[Row],
    commit: Any,
    say: Say,
) -> Iterator[list[Row]]:
    """models: "before" and "after" -> folder and bookmarks. Rows so far, after each; those there are kept,
    with the commit that measured them."""
    for when, (folder, weights) in models.items():
        named = {"when": when, "model": weights_fingerprint(folder), "budget": plan.budget}
        made: dict[str, SparseForward] = {}
        for context in wanted:
            for how in (SPARSE, DENSE_NAME):
                about = named | {"how": how, "kind": context.kind, "name": context.name}
                if any(about.items() <= row.items() for row in rows):
                    continue
                made = made or forwards(folder, weights, plan)
                started_s = time.monotonic()
                found = measure(made[how], context, lengths)
                took_s = round(time.monotonic() - started_s, 1)
                rows.append(about | {"tokens": len(context.token_ids)} | found)
                rows[-1] |= {"s": took_s, "commit": commit}
                say(f"{when}, {context.name}, {how}: {_said(found)} ({took_s:.0f} s)")
                yield rows


def _said(found: Row) -> str:
    if "values" in found:
        return f"{sum(v['hit'] for v in found['values'])} of {len(found['values'])}"
    return ", ".join(f"{n}: {math.exp(nats):.3f}" for n, nats in found["nats"].items())


def main(argv: Sequence[str]) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, nargs="?", help="folder of `longreach post-train`")
    arguments.add_argument("--only", choices=("before", "after"), help="one of the two")
    arguments.add_argument("--budget", type=int, default=PostPlan().budget, help="tokens")
    arguments.add_argument("--documents", type=int, default=N_DOCUMENTS, help="of five facts")
    arguments.add_argument("--bookmarks", default=EMBEDDED, help="weights of the model before")
    arguments.add_argument("--curve", type=Path, help="losses by step, for the picture")
    given = arguments.parse_args(argv)
    config: Config = config_of(given, small=False)
    use_threads(config.model.n_threads)
    shown = console()
    models = {"before": (ensure_embedded_model(), given.bookmarks)}
    if given.model is not None:
        models["after"] = (given.model, str(given.model / BOOKMARKS))
    if given.only:
        models = {given.only: models[given.only]}
    lengths = QUICK_LENGTHS if given.quick else LENGTHS
    budget = 512 if given.quick else given.budget
    path = result_path(given, "post-train")
    result = record("benchmarks.post_train", config, argv)
    old = json.loads(path.read_text()) if path.is_file() else {}
    bookmarks = read_card(given.bookmarks).fingerprint
    same = old.get("bookmarks") == bookmarks and old.get("lengths") == list(lengths)
    result |= {"bookmarks": bookmarks, "lengths": list(lengths), "budget": budget}
    result |= {"rows": old["rows"] if same else []}
    if given.model is not None:
        result["training"] = json.loads((given.model / CARD).read_text())
    if given.curve is not None:
        result["curve"] = json.loads(given.curve.read_text())

    def say(line: str) -> None:
        shown.print(line, style="dim")

    prompts = PromptBuilder.from_config(config)
    if given.quick:
        wanted = list(contexts(prompts, lengths, 1, ("rich",)))
    else:
        wanted = list(contexts(prompts, lengths, given.documents))
    plan, commit = PostPlan(budget=budget), result["commit"]
    for _ in run(models, wanted, lengths, plan, result["rows"], commit, say):
        write_result(path, result)
    for table in tables(result):
        shown.print(table)
    for line in lines(result):
        shown.print(line)
    draw(result, path.with_suffix(".png"))
    write_result(path, result)


if __name__ == "__main__":
    main(sys.argv[1:])
