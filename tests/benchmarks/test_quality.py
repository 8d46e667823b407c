"""Quality on real queries and keys: the capture is the model's own dense attention, the oracles bound
every selection, and keeping everything loses nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longreach.core.config import load_config
from longreach.core.stage import LayerPolicy, Stage

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 1024
LAYERS = (2, 29)

pytestmark = pytest.mark.slow


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("captures")
    return _module("captured").Captures(load_config([], []), lambda _: None, directory)


@pytest.fixture(scope="module")
def capture(captures: Any) -> Any:
    return captures.text(TOKENS)


def _small(settings: ModuleType) -> Any:
    """The study of all selections, at two budgets."""
    return dataclasses.replace(settings.studies()["budget"], budgets=(64, 256))


def test_a_capture_is_the_models_own_dense_attention(captures: Any, capture: Any) -> None:
    from transformers import AutoModelForCausalLM

    from longreach.workers.model_source import model_dir

    assert capture.token_ids.shape == (TOKENS,)
    directory = model_dir(load_config([], []).model)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        hidden = model.model(capture.token_ids[None]).last_hidden_state[0]
    assert (hidden[capture.positions] - capture.hidden).abs().max() < 1e-3
    # the facts' questions were read after a context that they share
    fact = captures.facts(TOKENS, 1)[1]
    with torch.inference_mode():
        hidden = model.model(fact.token_ids[None]).last_hidden_state[0]
    assert (hidden[fact.positions] - fact.hidden).abs().max() < 1e-3
    assert int(model.lm_head(hidden[-1:]).argmax()) == fact.next_token


def test_a_capture_is_read_once(captures: Any, capture: Any) -> None:
    again = type(captures)(load_config([], []), lambda _: None, captures._directory)
    assert torch.equal(again.text(TOKENS).q, capture.q)
    assert "model" not in vars(again), "nothing was computed"


def test_gold_is_where_the_answer_begins(captures: Any) -> None:
    facts = _module("facts").DOCUMENT_FACTS[0]
    found = captures.facts(TOKENS, 1)
    assert len(found) == len(facts) == 5
    for capture, fact in zip(found, facts, strict=True):
        after = captures.prompts.decode(capture.token_ids[capture.gold :].tolist())
        assert after.strip().startswith(fact.answer)
        before = captures.prompts.decode(capture.token_ids[: capture.gold].tolist())
        assert before.endswith(fact.prefix)
    assert sum(capture.found for capture in found) >= 3, "dense attention finds them in short texts"


@pytest.mark.parametrize("n_queries", [1, 64])
def test_keeping_everything_loses_nothing(capture: Any, n_queries: int) -> None:
    probe_of, settings = _module("quality_probe"), _module("quality_settings")
    setting = settings.Setting("all", settings.small(settings.FINE))
    policy = setting.policy(TOKENS, 0)
    for at in LAYERS:
        layer = probe_of.Layer(capture, at)
        probe = layer.probe(TOKENS - n_queries, n_queries)
        own = policy.model_copy(update={"attend_rope": "none"})
        selection = layer.select(probe, own, setting, 0, {})
        mass = probe_of.attended_mass(probe, selection, own)
        assert (mass - 1).abs().max() < 1e-5
        out = layer.attend(probe, own, selection, {})
        assert probe_of.output_error(probe, out).max() < 1e-4


@pytest.mark.parametrize("n_queries", [1, 64])
def test_the_kernel_attends_to_what_counts_as_kept(capture: Any, n_queries: int) -> None:
    probe_of, settings = _module("quality_probe"), _module("quality_settings")
    layer = probe_of.Layer(capture, 14)
    probe = layer.probe(TOKENS - 64, n_queries)
    setting = settings.Setting("bounds", settings.small(settings.BOUNDS, attend_rope="none"))
    policy = setting.policy(64, 0)
    ready = layer.summaries(policy)
    assert set(ready) == {"summaries"}
    selection = layer.select(probe, policy, setting, 0, ready)
    _, middle = probe.parts(policy)
    flags = probe_of.selected(selection, policy, middle.shape[2]).repeat_interleave(3, dim=0)
    kept = probe.weights - middle + middle * flags[:, None]
    assert torch.allclose(kept.sum(-1), probe_of.attended_mass(probe, selection, policy), atol=1e-5)
    wanted = _module("captured").weighted(kept / kept.sum(-1, keepdim=True), layer.v)
    assert torch.allclose(layer.attend(probe, policy, selection, ready), wanted, atol=1e-4)
    assert probe_of.n_attended(probe, selection, policy) <= 64


def test_nothing_beats_the_oracle(capture: Any) -> None:
    quality, settings = _module("quality"), _module("quality_settings")
    study = _small(settings)
    (measured,) = quality.run([study], capture, LAYERS, 2, lambda _: None)
    rows = measured["rows"]
    assert len(rows) == len(study.settings) * 2 * len(study.sizes)
    best = {
        (r["queries"], r["budget"]): r["mass"]["mean"]
        for r in rows
        if r["setting"] == "exact tokens"
    }
    blocks = {
        (r["queries"], r["budget"]): r["mass"]["mean"]
        for r in rows
        if r["setting"] == "exact blocks of 8"
    }
    for row in rows:
        at = row["queries"], row["budget"]
        assert row["mass"]["mean"] <= best[at] + 1e-5, row["setting"]
        assert row["mass"]["mean"] <= 1 + 1e-5
        assert row["tokens"] <= row["budget"]
        if "8" in row["setting"].split():
            assert row["mass"]["mean"] <= blocks[at] + 1e-5, row["setting"]
    assert best[1, 64] > blocks[1, 64]


def test_an_old_mask_is_no_better_and_a_fresh_one_the_same(capture: Any) -> None:
    probe_of, settings = _module("quality_probe"), _module("quality_settings")
    layer = probe_of.Layer(capture, 14)
    probe = layer.probe(TOKENS - 1)
    old = settings.Setting("old", settings.small(settings.FINE))
    policy = old.policy(64, 0)
    now = layer.select(probe, policy, old, 0, {})
    then = layer.select(probe, policy, old, 32, {})
    assert not torch.equal(now.blocks, then.blocks)
    first = settings.Setting("first", settings.small(settings.FINE), level=1)
    part = layer.select(probe, policy, first, 32, {})
    assert torch.equal(part.inputs[1], then.inputs[1]), "stage 1 is as old as asked for"
    assert not torch.equal(part.blocks, then.blocks)


def test_a_quick_run_writes_tables_numbers_and_a_plot(
    captures: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quality = _module("quality")
    monkeypatch.setattr(quality, "Captures", lambda *_: captures)
    out = tmp_path / "quality.json"
    argv = ["--quick", "--study", "budget", "--study", "top_p", "--layers", "14", "--out", str(out)]
    quality.main([*argv, "--queries", "2", "--threads", "1"])
    result = json.loads(out.read_text())
    assert [study["name"] for study in result["studies"]] == ["budget", "top_p"]
    assert result["tokens"] == TOKENS
    assert result["layers"] == [14]
    assert result["facts"]["asked"] == 5
    assert result["command"][3:5] == ["--quick", "--study"]
    assert "config" not in result
    budget, adaptive = result["studies"]
    for row in budget["gold"]:
        kept = list(row["kept"].values())
        assert kept == sorted(kept), "more tokens hold no fewer answers"
        assert row["of"] >= 3
        if row["setting"] == "exact tokens":
            assert kept[-1] == 1
    by_share = {r["setting"]: r for r in adaptive["rows"] if r["budget"] == 256}
    few, many = by_share["bounds 8: 0.8"], by_share["bounds 8: none"]
    assert few["tokens"] < many["tokens"]
    assert few["mass"]["mean"] < many["mass"]["mean"]
    assert out.with_suffix(".png").is_file()
    printed = capsys.readouterr().out
    for part in ("Selections by budget", "Adaptive budget", "the answer's block"):
        assert part in printed


def test_presets_are_measured_as_configured() -> None:
    settings = _module("quality_settings")
    presets = settings.presets()
    assert "infinitehip-3k" in presets
    assert "infinitehip-3k-flash" not in presets, "it differs in refresh alone"
    policy = presets["infinitehip-3k"]
    assert policy(512, 0).select_rope == "chunk-indexed"
    assert policy(512, 9).select_rope == "relative"
    assert policy(512, 9).stages[-1].keep == 512
    assert policy(512, 9).stages[0].keep == 32768


def test_every_setting_is_a_valid_policy() -> None:
    for study in _module("quality_settings").studies().values():
        for setting in study.settings:
            for budget in study.budgets:
                policy = setting.policy(budget, 5)
                assert LayerPolicy.model_validate(policy.model_dump()) == policy
                assert policy.stages[-1].keep == budget
                assert isinstance(policy.stages[-1], Stage)
