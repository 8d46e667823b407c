"""The attention benchmark weighs, counts and compares what it says, on steps that do differ."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longreach.core.config import load_config
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.ops import Selection, gather_tokens, plan_attend
from longreach.workers.threads import use_threads

ROOT = Path(__file__).resolve().parents[2]
MIB_OF_PAGES = 4 << 20


@pytest.fixture
def attention() -> ModuleType:
    return importlib.import_module("benchmarks.attention")


@pytest.fixture
def parts() -> ModuleType:
    return importlib.import_module("benchmarks.attention_parts")


@pytest.fixture
def plots() -> ModuleType:
    return importlib.import_module("benchmarks.plots")


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intervals", "n_steps", "by_first_stage"),
    [
        ((16, 8, 4), 16, (1, 1, 2, 12)),
        ((32, 16, 8), 32, (1, 1, 2, 28)),
        ((96, 24, 8), 96, (1, 3, 8, 84)),
    ],
)
def test_steps_are_weighed_by_the_first_stage_they_recompute(
    parts: ModuleType, intervals: tuple[int, ...], n_steps: int, by_first_stage: tuple[int, ...]
) -> None:
    counted = [0] * (len(intervals) + 1)
    for step in range(n_steps):
        due = [step % n == 0 for n in intervals]
        counted[due.index(True) if any(due) else len(intervals)] += 1
    assert tuple(counted) == by_first_stage
    shares = [n / n_steps for n in by_first_stage]
    assert parts.refresh_weights(intervals) == pytest.approx(shares)


def test_an_amortised_step_is_the_mean_over_a_period(parts: ModuleType) -> None:
    stages = [Stage(chunk=8, keep=64, refresh=n) for n in (4, 2)]
    policy = LayerPolicy(stages=tuple(stages))
    took = {"select_0": 100.0, "select_1": 30.0, "step": 7.0}
    times = {name: {"median_us": value} for name, value in took.items()}
    assert parts.amortised_us(times, policy, "median_us") == (107 + 7 + 37 + 7) / 4


# --- bytes ----------------------------------------------------------------------------------------


def _preset(name: str) -> LayerPolicy:
    policies = load_config([str(ROOT / "configs" / f"{name}.yaml")], []).attention.policies
    return policies[1]


def _megabytes(parts: ModuleType, policy: LayerPolicy, n_tokens: int, **most: bool) -> float:
    geometry = parts.GEOMETRIES["llama-8b"]
    moved = parts.formula_bytes(policy, geometry, n_tokens, 2, **most)
    return float(parts.amortised_bytes(moved, policy) / 1e6)


def test_the_formulas_give_the_published_table(parts: ModuleType) -> None:
    million = 1 << 20
    assert _megabytes(parts, parts.DENSE, million) == pytest.approx(4295, abs=0.5)
    assert _megabytes(parts, parts.DENSE, 128 << 10) == pytest.approx(537, abs=0.5)
    for name, least, most in (("infinitehip-3k", 22, 43), ("infinitehip-3k-flash", 16, 21.8)):
        assert _megabytes(parts, _preset(name), million) == pytest.approx(least, abs=0.5)
        assert _megabytes(parts, _preset(name), million, most=True) == pytest.approx(most, abs=0.5)
    uncached = parts.unrefreshed(_preset("infinitehip-3k"))
    assert _megabytes(parts, uncached, million) == pytest.approx(110, abs=0.5)
    assert _megabytes(parts, uncached, million, most=True) == pytest.approx(361, abs=1)
    bounds = LayerPolicy(stages=(Stage(scorer="bounds", chunk=16, keep=2048),))
    assert _megabytes(parts, bounds, million) == pytest.approx(282, abs=0.5)


def test_probed_keys_lie_between_one_search_and_all_keys(parts: ModuleType) -> None:
    assert parts.probed_keys(2, 4, paper=False) == 2
    assert parts.probed_keys(8, 32, paper=False) == pytest.approx(8, abs=0.1)
    # two probes a level; the last ones may have been met before
    assert 2 * 8 - 2 <= parts.probed_keys(256, 1, paper=False) <= 2 * 8
    assert 2 * 8 < parts.probed_keys(256, 4, paper=False) < 4 * 2 * 8
    # the first token of the left half is the one that was probed on the way down
    assert 1 <= parts.probed_keys(256, 1, paper=True) <= 1 + 8


def test_counted_bytes_are_those_of_the_keys_that_are_read(parts: ModuleType) -> None:
    geometry = parts.GEOMETRIES["smollm2"]
    policy = LayerPolicy(stages=(Stage(chunk=64, keep=1024), Stage(chunk=8, keep=256)))
    flat = torch.zeros(MIB_OF_PAGES // 2, dtype=torch.float16)
    step = parts.make_steps(geometry, parts.make_views(geometry, flat, 4096, 1), 1, 1)[0]
    entering = torch.arange(256, 256 + 1024, 8)[None]
    blocks = torch.arange(512, 512 + 256, 8)[None]
    selection = Selection((None, entering), blocks, torch.tensor([32]))
    segments = plan_attend(step.q_start, 1, selection, policy, parts.PAGE_TOKENS)
    moved = parts.counted_bytes(policy, geometry, step, selection, segments)
    key = 64 * 2
    # candidates [256, 4095 - (1024 - 64)) in chunks of 64
    n_chunks = -(-(4095 - 960 - 256) // 64)
    assert moved["stages"] == [
        round(3 * n_chunks * parts.probed_keys(64, 3, False) * key),
        round(3 * 128 * parts.probed_keys(8, 3, False) * key),
    ]
    # sinks, blocks, and the pages of the window, of which the first is cut by nothing
    assert moved["attend"] == 3 * (256 + 256 + 1024) * 2 * key


# --- steps ----------------------------------------------------------------------------------------


def test_steps_read_other_pages_at_other_positions(parts: ModuleType) -> None:
    geometry = parts.GEOMETRIES["smollm2"]
    arena = parts.Arena(MIB_OF_PAGES)
    flat = arena.filled(torch.float16, MIB_OF_PAGES)
    assert flat.float().std() == pytest.approx(1, abs=0.05)
    views = parts.make_views(geometry, flat, 4096, 2)
    assert not parts.is_folded(views[0])
    assert not torch.equal(views[0].row, views[1].row)
    steps = parts.make_steps(geometry, views, 1, 4)
    assert [step.view for step in steps] == [*views, *views]
    assert [step.q_start for step in steps] == [4095, 4095, 4030, 4030]
    assert not torch.equal(
        gather_tokens(views[0], torch.arange(8)), gather_tokens(views[1], torch.arange(8))
    )


def test_a_folded_table_repeats_pages_but_not_one_after_the_other(parts: ModuleType) -> None:
    geometry = parts.GEOMETRIES["smollm2"]
    flat = parts.Arena(MIB_OF_PAGES).filled(torch.float16, MIB_OF_PAGES)
    view = parts.make_views(geometry, flat, 16 << 10, 1)[0]
    assert parts.is_folded(view)
    assert 0 <= int(view.row.min()) <= int(view.row.max()) < view.memories[0].shape[0]
    first, second = view.row[0, :-1], view.row[0, 1:]
    assert int((first == second).sum()) <= 1
    assert torch.equal(view.row[1], view.row[0] + 1)


def test_pages_in_order_are_adjacent(parts: ModuleType) -> None:
    geometry = parts.GEOMETRIES["smollm2"]
    flat = torch.zeros(MIB_OF_PAGES // 2, dtype=torch.float16)
    for view in parts.make_views(geometry, flat, 1024, 2, in_order=True):
        assert set(view.row[0].diff().tolist()) == {geometry.n_kv_heads}


def test_every_item_is_timed_once_after_one_untimed_call(parts: ModuleType) -> None:
    called: list[int] = []

    def call(i: int) -> int:
        called.append(i)
        return i

    made, seconds = parts.laps(call, [(0,), (1,), (2,)])
    assert called == [2, 0, 1, 2]
    assert made == [0, 1, 2]
    assert len(seconds) == 3
    assert len(parts.laps(call, [(i,) for i in range(9)], budget_s=0.0, least=2)[1]) == 2


def test_dense_attention_of_ours_covers_every_key(parts: ModuleType) -> None:
    use_threads(1)
    geometry = parts.GEOMETRIES["smollm2"]
    flat = parts.Arena(MIB_OF_PAGES).filled(torch.float16, MIB_OF_PAGES)
    step = parts.make_steps(geometry, parts.make_views(geometry, flat, 1000, 1), 1, 1)[0]
    found = parts.attend_dense(parts.Attention(geometry, parts.DENSE), step)
    ids, rope = torch.arange(1000), geometry.rope()
    q = rope.rotate(step.q, 999).view(1, 3, 3, 64)
    k = rope.rotate(gather_tokens(step.view, ids), ids)[None]
    v = gather_tokens(step.view, ids, "v")[None]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).view(9, 1, 64)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_measures_every_geometry_context_and_policy(
    attention: ModuleType,
    parts: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "attention.json"
    argv = ["--quick", "--threads", "1", "--policy", "3k", "--policy", "flash", "--out", str(path)]
    attention.main(argv)
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["complete"]
    assert result["command"][3:] == argv
    names = [g.name for g in parts.GEOMETRIES.values()]
    wanted = [(g, n, p) for g in names for n in (4096, 8192) for p in ("3k", "flash")]
    for kind in ("decode", "prefill"):
        rows = result[kind]
        assert [(r["geometry"], r["tokens"], r["policy"]) for r in rows] == wanted
        for row in rows:
            assert row["distinct_selections"] == row["selections"] >= 2
    for row in result["decode"]:
        took = {name: times["median_us"] for name, times in row["parts"].items()}
        policy = attention.policy_of(row["policy"])
        weights = parts.refresh_weights([stage.refresh for stage in policy.stages])
        selecting = sum(w * took[f"select_{i}"] for i, w in enumerate(weights[:-1]))
        assert row["amortised"]["median_us"] == pytest.approx(selecting + took["step"], abs=0.1)
        assert 0.3 < row["counted_of_formula_most"] <= row["counted_of_formula_least"] < 2
    systems = {(row["system"], row.get("n_queries", 1)) for row in result["dense"]}
    assert systems == {
        ("own dense", 1),
        ("SDPA bfloat16", 1),
        ("SDPA float32", 1),
        ("SDPA float32", 64),
    }
    assert [row["order"] for row in result["rates"]] == ["in order", "random", "plain read"]
    assert len({row["bytes"] for row in result["rates"] if row["order"] != "in order"}) == 1
    printed = capsys.readouterr().out
    for title in (
        "median µs per layer",
        "dense attention",
        "MB per layer",
        "Attend alone",
        "Wanted",
    ):
        assert title in printed


def test_wanted_numbers_are_checked_where_they_were_measured(plots: ModuleType) -> None:
    model = "Llama-3.1-8B"
    steps = {64 << 10: 100.0, 256 << 10: 150.0, 1 << 20: 180.0, 3 << 20: 210.0}
    decode = [
        {"geometry": model, "policy": "3k", "tokens": n, "amortised": {"median_us": us}}
        for n, us in steps.items()
    ]
    dense = [
        {"geometry": model, "tokens": n, "system": "own dense", "median_us": us}
        for n, us in ((256 << 10, 4500.0), (1 << 20, 18000.0))
    ]
    rates = [{"order": "random", "threads": 1, "gb_per_s": {"median": 5.0}}]
    found = plots.checks({"decode": decode, "dense": dense, "rates": rates})
    assert [(row["found"], row["met"]) for row in found] == [
        (30.0, True),
        (100.0, False),
        (2.1, False),
        (5.0, False),
    ]
