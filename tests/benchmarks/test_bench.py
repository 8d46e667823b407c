"""Both benchmarks run from their command lines, with a tiny model that has a real tokenizer, and
their tables say what the answers say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 1000


@pytest.fixture
def needles() -> ModuleType:
    return importlib.import_module("benchmarks.needles")


@pytest.fixture
def speed() -> ModuleType:
    return importlib.import_module("benchmarks.speed")


def _run(module: ModuleType, tiny: Path, out: Path, *more: str) -> dict[str, Any]:
    sets = [f"model.name={tiny}", "model.n_threads=1", "store.capacity_bytes=67108864"]
    argv = ["--quick", "--tokens", str(TOKENS), "--out", str(out), *more]
    for assignment in sets:
        argv += ["--set", assignment]
    module.main(argv)
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["command"][3:] == argv
    assert len(result["commit"].removesuffix("-dirty")) in (0, 40)
    assert result["machine"]["cores"] >= 1
    assert torch.__version__.startswith(result["machine"]["versions"]["torch"])
    assert result["config"]["cache"]["page_tokens"] == 64
    return result


def test_needles_reads_each_text_once_and_prints_a_row_per_question(
    needles: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _run(needles, tiny, tmp_path / "needles.json")
    rows = result["rows"]
    assert result["complete"]
    assert [row["kind"] for row in rows] == ["needle"] + ["document"] * 5
    assert [row["depth"] for row in rows[1:]] == [0.08, 0.27, 0.46, 0.65, 0.84]
    for row in rows:
        assert abs(row["tokens"] - TOKENS) < 200
        for by in ("sparse", "dense"):
            assert row[by]["answer"]
            assert row[by]["hit"] == (row["wanted"].lower() in row[by]["answer"].lower())
    prefilled = [row["stats"]["tokens_prefilled"] for row in rows[1:]]
    assert max(prefilled) > TOKENS * 0.8
    assert sum(prefilled) < TOKENS * 0.8 + 5 * 192, "the questions share one prefill"
    printed = capsys.readouterr().out
    assert "Facts found" in printed
    for row in rows:
        assert printed.count(row["wanted"]) >= 2
    assert "of 5" in printed
    assert "6 of 6" not in printed


def test_needles_without_dense(needles: ModuleType, tiny: Path, tmp_path: Path) -> None:
    result = _run(needles, tiny, tmp_path / "needles.json", "--skip-dense")
    assert {row["dense"] for row in result["rows"]} == {None}
    assert result["totals"]["document"]["dense"] is None
    assert result["totals"]["document"]["sparse"]["of"] == 5


def test_hits_follow_from_the_answers(needles: ModuleType) -> None:
    facts = importlib.import_module("benchmarks.facts").FACTS
    answer = f" {facts[0].answer.upper()}, of course."
    rows = [
        {
            "kind": "document",
            "document": "a text",
            "tokens": 12000,
            "depth": 0.1,
            "wanted": fact.answer,
            "sparse": needles.found(fact, answer),
            "dense": needles.found(fact, "I do not know."),
        }
        for fact in facts[:3]
    ]
    assert [row["sparse"]["hit"] for row in rows] == [True, False, False]
    assert needles.totals(rows) == {
        "needle": {"sparse": None, "dense": None},
        "document": {"sparse": {"hits": 1, "of": 3}, "dense": {"hits": 0, "of": 3}},
    }
    table = needles.table(rows)
    cells = [list(column.cells) for column in table.columns]
    assert cells[5] == ["hit", "miss", "miss"]
    assert cells[7] == ["miss", "miss", "miss"]


def test_speed_compares_the_same_prompt_and_reuses_pages(
    speed: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _run(speed, tiny, tmp_path / "speed.json")
    sparse, dense = result["sparse"], result["dense"]
    assert sparse["tokens_prefilled"] == dense["tokens_prefilled"] == result["tokens"]
    assert sparse["decode_steps"] == dense["decode_steps"] == speed.QUICK_DECODE_STEPS
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        assert result["ratio"][name] == pytest.approx(sparse[name] / dense[name], abs=0.01)
    for phase in ("prefill", "decode"):
        parts = sparse[f"{phase}_seconds"]
        assert set(parts) == {*speed.PARTS, "other"}
        assert sum(parts.values()) == pytest.approx(sparse[f"{phase}_s"], abs=0.01)
        assert all(parts[name] > 0 for name in ("linear", "select", "attend"))
    first, *others = sparse["questions"]
    assert first["pages_reused"] == 0
    for row in others:
        assert row["pages_reused"] == row["pages_of_context"] > 10
        assert row["tokens_prefilled"] < 192
        assert 0 < row["ttft_s"] < first["ttft_s"]
    page_bytes = 4 * 2 * 2 * 64 * 16 * 2  # layers, KV heads, K and V, tokens, head size, float16
    assert sparse["bytes_device_to_store"] >= first["pages_of_context"] * page_bytes
    assert sparse["store"]["corrupt_detected"] == 0
    assert sparse["memory"]["after all questions"]["all"] > 100 << 20
    printed = capsys.readouterr().out
    for title in ("Speed at", "Where the time goes", "Three questions", "resident MiB"):
        assert title in printed


def test_what_no_part_counted_is_other(speed: ModuleType) -> None:
    counters = {f"seconds_{part}": 1.0 for part in speed.PARTS}
    assert speed.seconds_by_part(counters, 7.5)["other"] == 2.5


def test_a_quick_run_never_replaces_a_measured_result(needles: ModuleType) -> None:
    harness = importlib.import_module("benchmarks.harness")
    quick = harness.parser(None).parse_args(["--quick"])
    full = harness.parser(None).parse_args([])
    assert harness.result_path(full, "speed") == ROOT / "benchmarks" / "results" / "speed.json"
    assert harness.result_path(quick, "speed").parent == ROOT / "out"


def test_the_small_preset_still_prunes(needles: ModuleType) -> None:
    harness = importlib.import_module("benchmarks.harness")
    arguments = harness.parser(None).parse_args(["--quick"])
    small = harness.config_of(arguments, small=True)
    for policy in small.attention.policies:
        assert policy.sink + policy.window + policy.stages[-1].keep < TOKENS / 2
        assert policy.stages[1].keep + policy.sink + policy.window < TOKENS
