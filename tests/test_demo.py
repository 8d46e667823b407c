"""The demo's batch is what it claims to be: our text, known answers, nothing given away."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
ROWS = [json.loads(line) for line in (DEMO / "batch.jsonl").open()]
EXPECTED: dict[str, str] = json.loads((DEMO / "expected.json").read_text())


def _text(row: dict[str, str]) -> str:
    return (ROOT / row["context_uri"]).read_text()


def test_five_rows_over_two_documents() -> None:
    assert [row["custom_id"] for row in ROWS] == list(EXPECTED)
    documents = [row["context_uri"] for row in ROWS]
    assert sorted(documents.count(name) for name in set(documents)) == [2, 3]


def test_each_prefix_occurs_once_and_the_answer_follows_it() -> None:
    for row in ROWS:
        text = _text(row)
        assert text.count(row["answer_prefix"]) == 1, row["custom_id"]
        rest = text.split(row["answer_prefix"])[1]
        answer = EXPECTED[row["custom_id"]]
        assert answer in rest[: len(answer) + 20]
        assert text.count(answer) == 1, "an answer that stands twice is not a needle"


def test_questions_do_not_give_the_answer_away() -> None:
    for row in ROWS:
        answer = EXPECTED[row["custom_id"]].lower()
        assert answer not in (row["question"] + row["answer_prefix"]).lower()
        assert row["max_tokens"] == 12
        assert row["temperature"] == 0


def test_facts_stand_at_different_depths() -> None:
    depths = [
        _text(row).index(row["answer_prefix"]) / len(_text(row))
        for row in ROWS
        if "harbour" in row["context_uri"]
    ]
    for depth, wanted in zip(depths, (0.1, 0.5, 0.8), strict=True):
        assert abs(depth - wanted) < 0.05


def test_no_paragraph_stands_twice() -> None:
    for path in DEMO.glob("*.txt"):
        paragraphs = [p for p in path.read_text().split("\n\n") if len(p) > 60]
        assert len(paragraphs) > 15
        assert len(set(paragraphs)) == len(paragraphs)
        assert path.read_text().isascii()
