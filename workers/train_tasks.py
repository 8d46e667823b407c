"""Questions whose gold pages are known, on any text: hidden facts, records, sentences of the text itself.

Retrieval in a frozen model is taught by its own attention, so what matters is that tokens far back are
asked for: by a name, by a key among many alike, or by the words that stand beside them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from .train_data import Example, Question

Task = Callable[[str, random.Random], Example]
"""Puts facts into a plain text, or finds them there, and asks for them."""
N_QUESTIONS = 4


def _pool(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


_THINGS = _pool(
    "copper lantern|north gate|blue ledger|third turbine|old lighthouse|garden shed|second archive|"
    "silent piano|glass bridge|winter cabin|paper mill|red carriage|stone quarry|upper reservoir|"
    "night ferry|spare engine|marble stair|field hospital|weather mast|river lock|seed vault|"
    "west tower|printing press|clock room|salt cellar|cable car|herb garden|iron kettle"
)
_KINDS = _pool(
    "access code|serial number|tracking number|room number|account number|licence number"
)
_SYLLABLES = _pool("ba|ke|li|mo|nu|ra|sho|ti|ve|zu|dor|fen|gal|hir|jas|kol|mar|nel|pol|quin")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
MIN_SENTENCE, MAX_SENTENCE = 60, 300
GROUP = 6
"""Records that stand together."""
CHARACTERS_PER_GROUP = 1500


def needle(text: str, rng: random.Random) -> Example:
    """One number of five digits, asked for in two wordings."""
    thing, kind, number = rng.choice(_THINGS), rng.choice(_KINDS), str(rng.randint(10_000, 99_999))
    fact = f"The {kind} of the {thing} is {number}."
    context, (span,) = placed(text, [fact], rng)
    asked = (f"What is the {kind} of the {thing}?", f"Which {kind} does the {thing} have?")
    return Example("needle", context, tuple(Question(q, fact, (span,)) for q in asked))


def needles(text: str, rng: random.Random) -> Example:
    """Facts of one wording about different things, some of which are asked for."""
    kind = rng.choice(_KINDS)
    things = rng.sample(_THINGS, 2 * N_QUESTIONS)
    facts = [f"The {kind} of the {t} is {rng.randint(10_000, 99_999)}." for t in things]
    context, spans = placed(text, facts, rng)
    asked = rng.sample(range(len(facts)), N_QUESTIONS)
    questions = (
        Question(f"What is the {kind} of the {things[i]}?", facts[i], (spans[i],)) for i in asked
    )
    return Example("needles", context, tuple(questions))


def key_value(text: str, rng: random.Random) -> Example:
    """Records of invented keys in groups all over the text, some of which are asked for."""
    n_groups = min(8, max(2, len(text) // CHARACTERS_PER_GROUP))
    keys = [_name(rng) for _ in range(GROUP * n_groups)]
    records = [f"{key}: {rng.randint(1000, 9999)}-{_name(rng)}" for key in keys]
    groups = [records[i : i + GROUP] for i in range(0, len(records), GROUP)]
    context, spans = placed(text, ["\n" + "\n".join(group) + "\n" for group in groups], rng)
    questions = []
    for i in rng.sample(range(len(records)), N_QUESTIONS):
        start = context.index(records[i], spans[i // GROUP][0])
        gold = ((start, start + len(records[i])),)
        questions.append(Question(f"Which value stands beside {keys[i]}?", records[i], gold))
    return Example("key-value", context, tuple(questions))


def sentences(text: str, rng: random.Random) -> Example:
    """Sentences of the text itself: from its first half, how does one go on?"""
    found, at = [], 0
    for sentence in _SENTENCE.split(text):
        start = text.index(sentence, at)
        at = start + len(sentence)
        if MIN_SENTENCE <= len(sentence) <= MAX_SENTENCE and "\n\n" not in sentence:
            found.append((start, at))
    questions = []
    for start, end in rng.sample(found, min(N_QUESTIONS, len(found))):
        middle = text.rfind(" ", start, (start + end) // 2)
        if middle > start:
            asked = f'How does the sentence go on that begins with "{text[start:middle]}"?'
            questions.append(Question(asked, text[start:end], ((start, end),)))
    return Example("sentences", text, tuple(questions))


TASKS: dict[str, Task] = {
    "needle": needle,
    "needles": needles,
    "key-value": key_value,
    "sentences": sentences,
}


def placed(text: str, facts: list[str], rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """The text with facts between its sentences, and the [start, end) of each fact, in their order."""
    edges = [match.end() for match in _SENTENCE.finditer(text)] or [len(text)]
    places = sorted((rng.choice(edges), i) for i in range(len(facts)))
    parts: list[str] = []
    spans = [(0, 0)] * len(facts)
    done = length = 0
    for edge, i in places:
        piece = text[done:edge]
        parts += [piece, facts[i], " "]
        length += len(piece)
        spans[i] = (length, length + len(facts[i]))
        length += len(facts[i]) + 1
        done = edge
    return "".join((*parts, text[done:])), spans


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(3)) + str(rng.randint(10, 99))
