"""The benchmark of page indexes by facts found: equal budgets, one text, what was measured is kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from longreach.core.config import load_config
from longreach.core.stage import resolve_policies

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def retrieval() -> ModuleType:
    return importlib.import_module("benchmarks.retrieval")


@pytest.mark.parametrize("budget", [2304, 4096])
def test_every_method_attends_to_as_many_tokens(retrieval: ModuleType, budget: int) -> None:
    base = load_config([ROOT / "configs" / "retrolm.yaml"])
    names = []
    for method in retrieval.methods(budget):
        assert method.budget == budget
        names.append(method.name)
        policies = resolve_policies(retrieval.configured(base, method).attention.policies, 30)
        for policy in policies:
            total = policy.sink + policy.window + policy.stages[-1].keep
            assert budget - 128 < total <= budget  # whole pages
        assert policies[5].stages == method.stages
    assert len(set(names)) == len(names)


def test_single_facts_and_those_among_alike_are_told_apart(retrieval: ModuleType) -> None:
    text = retrieval.document(len, 60_000)
    at = [text.text.index(fact.sentence) for _, fact in text.facts]
    assert at == sorted(set(at))
    assert len({fact.question for _, fact in text.facts}) == len(text.facts)
    rows = [{"wanted": fact.answer, "hit": i % 2 == 0} for i, (_, fact) in enumerate(text.facts)]
    kinds = retrieval.by_kind(rows)
    assert kinds["single"][1] == retrieval.N_SINGLE
    assert kinds["among alike"][1] == len(retrieval.ALIKE)
    assert kinds["single"][0] + kinds["among alike"][0] == len(rows) // 2


def test_methods_are_measured_and_kept(
    retrieval: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "retrieval.json"
    common = ["--lengths", "2048", "--out", str(out), "--keep", "--budget", "1536"]
    for assignment in (f"model.name={tiny}", "model.n_threads=1"):
        common += ["--set", assignment]
    retrieval.main([*common, "--methods", "bounds;recency"])
    retrieval.main([*common, "--methods", "bounds"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["recency", "bounds"]
    for row in rows:
        assert row["hits"] == sum(hits for hits, _ in row["kinds"].values())
        assert all(fact["answer"] for fact in row["facts"])
    assert out.with_suffix(".png").is_file()
    assert "2K" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        retrieval.main([*common, "--methods", "guessing"])
    assert "no method 'guessing'" in capsys.readouterr().err
