"""The contexts of a training run: which documents and questions, how long, which are held out."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InvalidInput
from .bm25 import Bm25
from .train_data import Document, Example, Question, is_held_out, text_contexts
from .train_prompt import Stream, StreamBuilder
from .train_tasks import TASKS

CHARACTERS_PER_TOKEN = 6
"""More than a text has, so that a context never runs short."""
N_HARD = 32
"""Contexts that share most words with a question, among which its distractors are drawn."""
TEXT = "text"


@dataclass(frozen=True)
class DataPlan:
    """n_contexts of context_tokens tokens for training, n_held_out others to measure recall on; tasks are
    names of `TASKS` or "text", taken in turn."""

    n_contexts: int = 32
    n_held_out: int = 8
    context_tokens: int = 4096
    tasks: tuple[str, ...] = (TEXT, "needles", TEXT, "key-value", TEXT, "sentences")
    seed: int = 0

    def check(self) -> None:
        """Raises InvalidInput naming the first value that cannot be."""
        unknown = sorted(set(self.tasks) - {TEXT, *TASKS})
        if unknown or not self.tasks:
            known = ", ".join((TEXT, *TASKS))
            raise InvalidInput(f"no task {', '.join(unknown) or 'given'}; known: {known}")
        for name in ("n_contexts", "n_held_out", "context_tokens"):
            least = {"n_contexts": 1, "n_held_out": 0, "context_tokens": 1024}[name]
            if getattr(self, name) < least:
                raise InvalidInput(f"{name} is {getattr(self, name)}, at least {least} is needed")


def streams(
    plan: DataPlan,
    documents: Sequence[Document],
    rows: Sequence[Example],
    builder: StreamBuilder,
    *,
    held_out: bool,
) -> list[Stream]:
    """Training contexts or held-out ones; rows of JSONL, where there are any, are every second context.

    Raises InvalidInput where nothing is on this side of the split.
    """
    own = [d for d in documents if is_held_out(d.source) == held_out]
    asked = [e for e in _by_context(rows) if is_held_out(_name_of(e.context)) == held_out]
    n = plan.n_held_out if held_out else plan.n_contexts
    if not n:
        return []
    seed = 2 * plan.seed + held_out
    sources: list[Iterator[Stream]] = []
    if own:
        sources.append(_from_documents(plan, own, builder, seed))
    if asked:
        sources.append(_from_rows(plan, asked, builder, seed))
    if not sources:
        side = "held out" if held_out else "left to train on"
        raise InvalidInput(f"no document and no row is {side}; give more of them")
    return [next(source) for source in itertools.islice(itertools.cycle(sources), n)]


def _from_documents(
    plan: DataPlan, documents: Sequence[Document], builder: StreamBuilder, seed: int
) -> Iterator[Stream]:
    texts = text_contexts(documents, plan.context_tokens * CHARACTERS_PER_TOKEN, seed)
    for i, example in enumerate(texts):
        rng = random.Random(f"{seed} {i}")
        name = plan.tasks[i % len(plan.tasks)]
        if name != TEXT:
            example = _fitting(name, example.context, plan.context_tokens, builder, rng)
        stream = builder.build(example)
        yield _cut(stream, f"{name} {seed}-{i}", plan.context_tokens)


def _fitting(
    name: str, text: str, n_tokens: int, builder: StreamBuilder, rng: random.Random
) -> Example:
    """A task on the beginning of a text, whose questions end just within n_tokens."""
    state, room = rng.getstate(), n_tokens
    for _ in range(4):
        rng.setstate(state)
        example = TASKS[name](builder.cut(text, room), rng)
        over = builder.build(example).n_tokens - n_tokens
        if over <= 0:
            return example
        room = max(0, room - over - 8)
    raise InvalidInput(f"task {name} does not fit into {n_tokens} tokens; use longer contexts")


def _from_rows(
    plan: DataPlan, rows: Sequence[Example], builder: StreamBuilder, seed: int
) -> Iterator[Stream]:
    """Each row's context among others, which share words with its question: hard negatives."""
    index = Bm25([row.context for row in rows])
    for turn in itertools.count():
        rng = random.Random(f"{seed} rows {turn}")
        for i in rng.sample(range(len(rows)), len(rows)):
            row = rows[i]
            near = np.argsort(-index.scores(row.questions[0].text), kind="stable")
            others = [int(j) for j in near[: N_HARD + 1] if j != i]
            rng.shuffle(others)
            example = _among(
                row, [rows[j].context for j in others], plan.context_tokens, builder, rng
            )
            stream = builder.build(example)
            yield _cut(stream, f"{row.source} {seed}-{turn}", plan.context_tokens)


def _among(
    row: Example, others: Sequence[str], n_tokens: int, builder: StreamBuilder, rng: random.Random
) -> Example:
    """The row's context, cut around what answers it if it is too long, and others before and after."""
    room = n_tokens - builder.n_question_tokens(row.questions) - 64
    own, shift = _window(row, room, builder)
    room -= len(builder.tokens(own))
    before: list[str] = []
    after: list[str] = []
    for text in others:
        n = len(builder.tokens(text)) + 2
        if n > room:
            text = builder.cut(text, max(0, room - 2))
        if text.strip():
            (before if rng.random() < 0.5 else after).append(text)
        room -= n
        if room <= 2:
            break
    head = "".join(f"{text}\n\n" for text in before)
    shift += len(head)
    questions = tuple(
        Question(q.text, q.answer, tuple((a + shift, b + shift) for a, b in q.gold))
        for q in row.questions
    )
    return Example(row.source, head + own + "".join(f"\n\n{text}" for text in after), questions)


def _window(row: Example, n_tokens: int, builder: StreamBuilder) -> tuple[str, int]:
    """(text, by how much its characters have moved)"""
    if len(builder.tokens(row.context)) <= n_tokens:
        return row.context, 0
    first = min(start for q in row.questions for start, _ in q.gold)
    last = max(end for q in row.questions for _, end in q.gold)
    start = max(0, first - (n_tokens - (last - first) // 3) // 2)  # three characters a token, about
    text = builder.cut(row.context[start:], n_tokens)
    if last > start + len(text):
        raise InvalidInput(f"{row.source}: its gold spans reach over more than {n_tokens} tokens")
    return text, -start


def _cut(stream: Stream, name: str, n_tokens: int) -> Stream:
    asks = tuple(ask for ask in stream.asks if ask.position < n_tokens)
    return Stream(name, stream.token_ids[:n_tokens], asks)


def _by_context(rows: Sequence[Example]) -> list[Example]:
    """Rows of one context become one, with all their questions."""
    found: dict[str, list[Example]] = {}
    for row in rows:
        found.setdefault(row.context, []).append(row)
    merged = []
    for same in found.values():
        questions = [q for row in same for q in row.questions]
        for i in range(0, len(questions), 4):
            merged.append(Example(same[0].source, same[0].context, tuple(questions[i : i + 4])))
    return merged


def _name_of(context: str) -> str:
    return hashlib.sha256(context.encode()).hexdigest()
