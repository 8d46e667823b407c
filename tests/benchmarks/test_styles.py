"""The benchmark of positions: one text with all facts, every style asked, what was measured is kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def styles() -> ModuleType:
    return importlib.import_module("benchmarks.styles")


def test_a_text_has_every_fact_once_in_order(styles: ModuleType) -> None:
    words = len  # a token per character is as good as any count
    for n_tokens in (30_000, 90_000):
        text = styles.document(words, n_tokens)
        at = [text.text.index(fact.sentence) / len(text.text) for _, fact in text.facts]
        assert len(at) == len(set(at)) == len(styles.FACTS)
        assert at == sorted(at)
        for found, (depth, _) in zip(at, text.facts, strict=True):
            assert found == pytest.approx(depth, abs=0.05)
        assert len(text.text) == pytest.approx(n_tokens, rel=0.05)


def test_styles_are_measured_and_kept(
    styles: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "styles.json"
    common = ["--quick", "--lengths", "4096", "--out", str(out), "--keep"]
    for assignment in (f"model.name={tiny}", "model.n_threads=1"):
        common += ["--set", assignment]
    styles.main([*common, "--styles", "relative/streaming"])
    styles.main([*common, "--styles", "none/none,relative/streaming"])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["select"], r["attend"]) for r in rows] == [
        ("none", "none"),
        ("relative", "streaming"),
    ]
    for row in rows:
        assert row["of"] == len(styles.FACTS) == len(row["facts"])
        assert row["hits"] == sum(fact["hit"] for fact in row["facts"])
        assert row["tokens"] == pytest.approx(4096, rel=0.2)
        assert all(fact["answer"] for fact in row["facts"])
    printed = capsys.readouterr().out
    assert "none / none" in printed
    assert "4K" in printed


def test_the_best_read_the_longest_texts(styles: ModuleType) -> None:
    hits = {("a", "x"): (3, 4), ("b", "x"): (5, 1), ("c", "x"): (9, 0), ("d", "x"): (2, 5)}
    rows = [
        {"length": length, "select": style[0], "attend": style[1], "hits": n}
        for style, by_length in hits.items()
        for length, n in zip((8, 16), by_length, strict=True)
    ]
    assert styles.best(rows, (8, 16), 2) == [("c", "x"), ("a", "x")]
    assert styles.best(rows, (16,), 1) == [("d", "x")]


@pytest.mark.parametrize("style", ["relative", "relative/yarn", "no/none"])
def test_an_unknown_style_is_refused(
    styles: ModuleType, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        styles.main(["--styles", style])
    assert "selecting is one of" in capsys.readouterr().err
