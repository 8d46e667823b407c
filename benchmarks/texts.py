"""Long texts of our own, made from a seed: distinct sentences, no paragraph twice, known depths.

A sentence joins parts of one theme's pools; a theme is a world of its own (a mountain hut, a
workshop, a museum, a river survey). The same seed and length give the same text on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .facts import DOCUMENT_FACTS, Fact, magic_number
from .themes import THEMES, Theme

Count = Callable[[str], int]
"""Tokens of a text, without template or special tokens."""

DEPTHS = (0.08, 0.27, 0.46, 0.65, 0.84)
"""Where the five facts of a document stand, as shares of its tokens."""


@dataclass(frozen=True)
class Document:
    """A text and the facts hidden in it, with their depths in [0, 1)."""

    name: str
    text: str
    facts: tuple[tuple[float, Fact], ...]


def _sentence(theme: Theme, rng: random.Random) -> str:
    shape = rng.choice(theme.shapes)
    words = {slot: rng.choice(pool) for slot, pool in theme.pools.items()}
    text = shape.format(n=rng.randint(3, 40), **words)
    return text[0].upper() + text[1:]


def _paragraphs(theme: Theme, rng: random.Random) -> list[list[str]]:
    """More paragraphs than any text here needs, each of four to seven sentences never used."""
    seen: set[str] = set()
    paragraphs = []
    for _ in range(400):
        wanted = rng.randint(4, 7)
        sentences: list[str] = []
        while len(sentences) < wanted:
            sentence = _sentence(theme, rng)
            if sentence not in seen:
                seen.add(sentence)
                sentences.append(sentence)
        paragraphs.append(sentences)
    return paragraphs


def build_text(
    count: Count, seed: int, n_tokens: int, facts: Sequence[tuple[float, str]] = ()
) -> str:
    """A text of n_tokens (within one percent or one paragraph) with sentences set at depths.

    facts: (depth in [0, 1), sentence); each stands inside a paragraph, between two sentences.
    Raises ValueError if n_tokens is more than the generator can fill.
    """
    rng = random.Random(seed)
    theme = THEMES[seed % len(THEMES)]
    waiting = sorted(facts)
    done: list[str] = []
    filled = 0
    for sentences in _paragraphs(theme, rng):
        due = bool(waiting) and filled >= waiting[0][0] * n_tokens
        if due:
            sentences.insert(2, waiting[0][1])
        paragraph = " ".join(sentences) + "\n\n"
        length = count(paragraph)
        if filled + length > n_tokens and not due:
            if waiting:
                raise ValueError(f"no place left for {len(waiting)} facts in {n_tokens} tokens")
            return "".join(done).rstrip() + "\n"
        done.append(paragraph)
        filled += length
        waiting = waiting[due:]
    raise ValueError(f"the generator ends at {filled} tokens, {n_tokens} were asked for")


def documents(count: Count, n_tokens: int = 12_000) -> list[Document]:
    """Four documents of five facts each, all of different wording."""
    made = []
    for seed, facts in enumerate(DOCUMENT_FACTS):
        placed = tuple(zip(DEPTHS, facts, strict=True))
        text = build_text(count, seed, n_tokens, [(d, f.sentence) for d, f in placed])
        made.append(Document(THEMES[seed % len(THEMES)].name, text, placed))
    return made


def needles(
    count: Count,
    lengths: Sequence[int] = (12_000, 16_000),
    depths: Sequence[float] = (0.1, 0.5, 0.8),
) -> list[Document]:
    """One magic number in each text, for every length and depth."""
    made = []
    for length in lengths:
        for i, depth in enumerate(depths):
            seed = 100 + length // 1000 * 10 + i
            fact = magic_number(seed)
            text = build_text(count, seed, length, [(depth, fact.sentence)])
            made.append(Document(f"{length // 1000}K at {depth}", text, ((depth, fact),)))
    return made
