"""Where training text comes from: the same on every machine, split by name, questions with true spans."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from longreach.core.config import Config
from longreach.core.errors import BatchLineError, InvalidInput, NotFound
from longreach.workers import train_data
from longreach.workers.prompt import PromptBuilder
from longreach.workers.train_data import (
    Document,
    Example,
    file_documents,
    is_held_out,
    licences,
    package_documents,
    read_jsonl,
    text_contexts,
    without_repeats,
)
from longreach.workers.train_prompt import StreamBuilder
from longreach.workers.train_streams import DataPlan, streams
from longreach.workers.train_tasks import TASKS


@pytest.fixture(scope="module")
def builder() -> StreamBuilder:
    return StreamBuilder(PromptBuilder(Config()))


WORDS = "the river runs past seven mills before anyone counts its stones again today"


def sentences(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = WORDS.split()
    made = []
    for i in range(n):
        chosen = " ".join(rng.choices(words, k=12))
        made.append(f"In year {1000 + i} {chosen}.")
        if i % 5 == 4:
            made[-1] += "\n"
    return " ".join(made)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document(f"book {i}", sentences(40, i)) for i in range(40)]


# --- documents ------------------------------------------------------------------------------------


def test_documentation_of_packages_is_the_same_each_time() -> None:
    found = package_documents(["typer"])
    assert len(found) > 3
    assert found == package_documents(["typer"])
    assert all(len(d.text) >= train_data.MIN_CHARACTERS for d in found)
    assert all(d.source.startswith("typer.") for d in found)
    assert "MIT" in licences(["typer"])["typer"]


def test_a_missing_package_is_named() -> None:
    with pytest.raises(NotFound, match="'no_such_package_here' is not installed"):
        package_documents(["no_such_package_here"])


def test_paragraphs_are_kept_once_and_short_documents_dropped() -> None:
    long, other = "a paragraph that stands in two files. " * 9, "one of its own, long enough. " * 30
    found = without_repeats(
        [
            Document("a", f"{long}\n\n{other}"),
            Document("b", f"{long}\n\nshort"),
            Document("c", f"{long}\n\n{'yet another one, also long enough. ' * 30}"),
        ]
    )
    assert [d.source for d in found] == ["a", "c"]
    assert "two files" not in found[1].text


def test_text_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.txt").write_text("first words " * 100)
    (tmp_path / "b.md").write_text("second words " * 100)
    (tmp_path / "c.bin").write_bytes(b"\xff" * 2000)
    assert len(file_documents([tmp_path])) == 2
    with pytest.raises(NotFound, match="does not exist"):
        file_documents([tmp_path / "none"])
    with pytest.raises(InvalidInput, match="not UTF-8"):
        file_documents([tmp_path / "c.bin"])


def test_about_a_tenth_is_held_out_by_name() -> None:
    held = [is_held_out(f"name {i}") for i in range(2000)]
    assert 140 < sum(held) < 260
    assert held[:9] == [is_held_out(f"name {i}") for i in range(9)]


# --- questions ------------------------------------------------------------------------------------


def test_rows_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = "It rained. The key is under the mat. It snowed."
    rows = [
        {"context": context, "question": "Where?", "answer": "under the mat"},
        {"context": context, "question": "What?", "gold": [[3, 9], [37, 40]]},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    first, second = read_jsonl(path)
    (span,) = first.questions[0].gold
    assert context[slice(*span)] == "under the mat"
    assert second.questions[0].gold == ((3, 9), (37, 40))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"context": "a"}', "has no 'question'"),
        ('{"context": "a", "question": "b"}', "needs 'answer' or 'gold'"),
        ('{"context": "a", "question": "b", "answer": "c"}', "does not stand in the context"),
        ('{"context": "a", "question": "b", "gold": [0, 5]}', "lies outside a context of 1"),
        ('{"context": "a", "question": "b", "gold": "x"}', "line 2"),
        ("[1]", "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"context": "a", "question": "b", "answer": "a"}\n' + line + "\n")
    with pytest.raises(BatchLineError, match=said):
        read_jsonl(path)


def test_no_rows_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidInput, match="has no lines"):
        read_jsonl(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_gold_spans_hold_what_is_asked_for(name: str) -> None:
    text = sentences(120)
    example = TASKS[name](text, random.Random(3))
    assert example == TASKS[name](text, random.Random(3))
    assert example.questions
    for question in example.questions:
        for start, end in question.gold:
            found = example.context[start:end]
            assert found == question.answer
            assert example.context.count(found) == 1


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_is_the_conversation_with_gold_tokens(builder: StreamBuilder) -> None:
    example = TASKS["needles"](sentences(100), random.Random(1))
    stream = builder.build(example)
    tokenizer = builder._prompts.tokenizer
    text = tokenizer.decode(stream.token_ids)
    at = -1
    for ask, question in zip(stream.asks, example.questions, strict=True):
        ((start, end),) = ask.gold
        assert tokenizer.decode(stream.token_ids[start:end]).strip() == question.answer
        after = tokenizer.decode(stream.token_ids[ask.position + 1 :])
        assert after.startswith(question.answer)
        assert at < text.index(question.text) < len(text) - len(after)
        at = text.index(question.text)
    assert tokenizer.decode(stream.token_ids[: stream.asks[0].position + 1]).endswith(
        "<|im_start|>assistant\n"
    )


def test_streams_have_the_wanted_length_and_keep_the_sides_apart(
    builder: StreamBuilder, documents: list[Document]
) -> None:
    plan = DataPlan(n_contexts=6, n_held_out=3, context_tokens=1024)
    own = streams(plan, documents, [], builder, held_out=False)
    held = streams(plan, documents, [], builder, held_out=True)
    assert [len(own), len(held)] == [6, 3]
    for stream in (*own, *held):
        assert 900 < stream.n_tokens <= 1024
        assert ("text" in stream.name) == (not stream.asks)
        assert all(ask.gold for ask in stream.asks)
    again = streams(plan, documents, [], builder, held_out=False)
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(own, again, strict=True))
    names = {d.source: d.text for d in documents}
    train_text = "".join(t for s, t in names.items() if not is_held_out(s))
    held_text = builder._prompts.tokenizer.decode(held[0].token_ids[50:90])
    assert held_text not in train_text


def test_rows_are_put_among_others_that_share_words(builder: StreamBuilder) -> None:
    rows = []
    for i in range(60):
        context = f"{sentences(6, i)} The colour of door {i} is shade {i * 7}."
        gold = (context.index("The colour"), len(context))
        question = train_data.Question(
            f"What is the colour of door {i}?", context[slice(*gold)], (gold,)
        )
        rows.append(Example(f"rows:{i}", context, (question,)))
    plan = DataPlan(n_contexts=5, n_held_out=0, context_tokens=1024)
    found = streams(plan, [], rows, builder, held_out=False)
    assert len(found) == 5
    places = set()
    for stream in found:
        assert 900 < stream.n_tokens <= 1024
        ((start, end),) = stream.asks[0].gold
        assert "The colour of door" in builder._prompts.tokenizer.decode(
            stream.token_ids[start:end]
        )
        places.add(start // 128)
    assert len(places) > 1
    assert streams(plan, [], rows, builder, held_out=True) == []


def test_what_cannot_be_planned_is_refused(builder: StreamBuilder) -> None:
    with pytest.raises(InvalidInput, match="no task poem; known: text, needle"):
        DataPlan(tasks=("text", "poem")).check()
    with pytest.raises(InvalidInput, match="n_contexts is 0, at least 1"):
        DataPlan(n_contexts=0).check()
    with pytest.raises(InvalidInput, match="no document and no row is held out"):
        streams(DataPlan(), [], [], builder, held_out=True)


def test_contexts_of_text_use_every_document(documents: list[Document]) -> None:
    found = list(itertools.islice(text_contexts(documents, 3000, seed=0), 40))
    assert all(len(e.context) >= 3000 for e in found)
    assert len({e.context for e in found}) == 40
