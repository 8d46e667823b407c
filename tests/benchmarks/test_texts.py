"""Benchmark texts: the same on every machine, facts where they are said to be, nothing twice."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


def _count(text: str) -> int:
    """Words and line ends: close enough to tokens for what is tested here."""
    return len(text.split()) + text.count("\n")


@pytest.fixture
def texts() -> ModuleType:
    return importlib.import_module("benchmarks.texts")


def test_the_same_seed_gives_the_same_text_and_another_seed_another(texts: ModuleType) -> None:
    first = texts.build_text(_count, 3, 2000)
    assert texts.build_text(_count, 3, 2000) == first
    assert texts.build_text(_count, 7, 2000) != first
    assert texts.build_text(_count, 3, 4000).startswith(first[:-1])


def test_four_documents_of_five_facts_each(texts: ModuleType) -> None:
    documents = texts.documents(_count, 8000)
    assert len({document.name for document in documents}) == 4
    used = [fact for document in documents for _, fact in document.facts]
    assert len(used) == len(set(used)) == 20
    for document in documents:
        assert abs(_count(document.text) - 8000) < 150
        for depth, fact in document.facts:
            assert document.text.count(fact.prefix) == 1
            assert document.text.count(fact.answer) == 1
            before = document.text[: document.text.index(fact.sentence)]
            assert abs(_count(before) / 8000 - depth) < 0.03


def test_needles_stand_at_every_length_and_depth(texts: ModuleType) -> None:
    made = texts.needles(_count, lengths=(3000, 5000), depths=(0.1, 0.5, 0.8))
    assert len(made) == 6
    assert len({document.facts[0][1].answer for document in made}) == 6
    for i, document in enumerate(made):
        ((depth, fact),) = document.facts
        assert (len(fact.answer), fact.answer.isdigit()) == (5, True)
        assert document.text.count(fact.answer) == 1
        before = document.text[: document.text.index(fact.sentence)]
        assert abs(_count(before) / (3000, 5000)[i // 3] - depth) < 0.05


def test_no_sentence_paragraph_or_document_repeats(texts: ModuleType) -> None:
    paragraphs: list[str] = []
    for document in texts.documents(_count, 8000):
        own = document.text.strip().split("\n\n")
        sentences = [s for p in own for s in p.split(". ")]
        assert len(set(sentences)) > 0.98 * len(sentences)
        paragraphs += own
    assert len(set(paragraphs)) == len(paragraphs) > 200


def test_the_bank_of_facts(texts: ModuleType) -> None:
    facts = importlib.import_module("benchmarks.facts").FACTS
    assert len(facts) == 20
    for values in (
        [fact.prefix for fact in facts],
        [fact.answer for fact in facts],
        [fact.question for fact in facts],
    ):
        assert len(set(values)) == len(facts)
    for fact in facts:
        assert fact.found_in(f" {fact.answer.upper()}, as everyone knew")
        assert not fact.found_in(fact.question + fact.prefix)
        assert len(fact.answer) >= 4


def test_what_does_not_fit_is_refused(texts: ModuleType) -> None:
    with pytest.raises(ValueError, match="no place left for 1 facts"):
        texts.build_text(_count, 0, 500, [(0.99, "Late.")])
    with pytest.raises(ValueError, match="the generator ends"):
        texts.build_text(_count, 0, 10**6)
