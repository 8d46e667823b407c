"""What is not measured follows exactly from what is, every side answers the same tokens, and a missing
llama.cpp is told before anything is measured."""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from longreach.core.config import Config
from longreach.workers.embedded import find_embedded_gguf
from longreach.workers.prompt import PromptBuilder

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def model() -> ModuleType:
    return importlib.import_module("benchmarks.model")


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("benchmarks.model_report")


@pytest.fixture
def llama() -> ModuleType:
    return importlib.import_module("benchmarks.llama_cpp")


def _row(tokens: int, prefill_s: float, decode_ms: float) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "extrapolated": False,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": round(tokens / prefill_s, 2),
        "decode_ms": {"median": decode_ms},
    }


def _quadratic(n: int) -> dict[str, Any]:
    return _row(n, 2e-3 * n + 1e-7 * n * n, 5.0 + 1e-3 * n)


def test_what_lies_beyond_follows_exactly_from_exact_rows(report: ModuleType) -> None:
    lengths = (2048, 4096, 8192, 32768, 131072)
    rows = [_quadratic(n) for n in lengths[:3]]
    beyond = report.extrapolated(rows, lengths)
    assert [row["tokens"] for row in beyond] == [32768, 131072]
    for row in beyond:
        exact = _quadratic(row["tokens"])
        assert row["extrapolated"]
        assert row["decode_ms"]["median"] == pytest.approx(exact["decode_ms"]["median"], abs=1e-3)
        for name in ("prefill_s", "prefill_tokens_per_s"):
            assert row[name] == pytest.approx(exact[name], abs=0.01)
        assert row["fit"]["lengths"] == list(lengths[:3])
    assert beyond[0]["fit"]["prefill_s"] == pytest.approx([2e-3, 1e-7], rel=1e-6)
    assert beyond[0]["fit"]["decode_ms"] == pytest.approx([5.0, 1e-3], rel=1e-6)


def test_the_fit_is_of_least_squares(report: ModuleType) -> None:
    """Three points that no line meets: errors +1, -2, +1 about the best one."""
    assert report.fit((1, 2, 3), (1.0, 0.0, 3.0), (0, 1)) == pytest.approx([-2 / 3, 1.0])


def test_nothing_follows_from_one_row_or_from_times_that_fall(report: ModuleType) -> None:
    assert report.extrapolated([_quadratic(2048)], (2048, 4096)) == []
    disturbed = [_row(1024, 5.0, 90.0), _row(2048, 5.5, 10.0)]
    assert report.extrapolated(disturbed, (1024, 2048, 131072)) == []


def test_what_must_be_extrapolated_is_measured_at_more_lengths(model: ModuleType) -> None:
    assert model.measurable((512, 1024), 8192) == [512, 1024]
    assert model.measurable((3000, 32768), 8192) == [2048, 3000, 4096, 8192]


def test_the_margin_is_the_rate_of_the_new_part(report: ModuleType) -> None:
    rows = [_row(1000, 1.0, 5.0), _row(3000, 5.0, 5.0), _row(4000, 4.9, 5.0)]
    made = report.margins(rows)
    # a longer text that took less time says nothing about its end
    assert [row["marginal_tokens_per_s"] for row in made] == [1000.0, 500.0, None]
    assert [row["prefill_s"] for row in made] == [1.0, 5.0, 4.9]
    # a text that grew: its row is of the 2,000 new tokens, the whole counts all that was read
    rows = [_row(1000, 1.0, 5.0), {**_row(3000, 4.0, 5.0), "prefill_tokens_per_s": 500.0}]
    made = report.margins(rows, grown=True)
    assert [row["marginal_tokens_per_s"] for row in made] == [1000.0, 500.0]
    assert made[1]["prefill_s"] == 5.0
    assert made[1]["part_prefill_s"] == 4.0
    assert made[1]["prefill_tokens_per_s"] == 600.0


def test_the_better_llama_counts_and_ours_is_compared_with_it(report: ModuleType) -> None:
    flash, plain = report.WAYS
    measured = {
        "longreach dev": [_row(1024, 1.0, 10.0), _row(2048, 2.0, 10.0), _row(32768, 40.0, 10.0)],
        flash: [_row(1024, 2.0, 30.0), _row(2048, 8.0, 60.0)],
        plain: [_row(1024, 4.0, 20.0), _row(2048, 16.0, 40.0)],
    }
    systems = report.completed(measured, (1024, 2048, 32768), grown=False)
    assert list(systems) == ["longreach dev", "llama.cpp"]
    theirs = systems["llama.cpp"]
    assert [(r["prefill_s"], r["decode_ms"]["median"]) for r in theirs[:2]] == [(2, 20), (8, 40)]
    first, second, last = report.ratios(systems)
    assert (first["prefill"], first["decode"], first["extrapolated"]) == (2.0, 2.0, False)
    assert (second["prefill"], second["decode"]) == (4.0, 4.0)
    assert first["wanted"] == {}
    assert last["extrapolated"]
    assert last["wanted"] == {"prefill": 5, "decode": 5}
    # flash: s = 2 (n / 1024)^2; without: ms = 20 n / 1024
    assert (last["prefill"], last["decode"]) == (51.2, 64.0)
    cells = [list(column.cells) for column in report.ratios_table(report.ratios(systems)).columns]
    assert cells[3] == ["2.00", "4.00", "~51.20"]
    assert cells[6] == ["", "", "≥ 5"]


def test_extrapolated_rows_are_marked_and_drawn_dashed(report: ModuleType, tmp_path: Path) -> None:
    measured = {report.DENSE: [_quadratic(1024), _quadratic(2048)]}
    for row in measured[report.DENSE]:
        row |= {"ttft_s": 1.0, "peak_resident_bytes": 1 << 20}
        row["decode_ms"] |= {"mean": 1.0, "first": 3.0, "max": 2.0, "max_over_median": 2.0}
    systems = report.completed(measured, (1024, 2048, 4096), grown=False)
    rates = list(report.rows_table(systems).columns[2].cells)
    assert [cell.startswith("~") for cell in rates] == [False, False, True]
    pytest.importorskip("matplotlib")
    report.plot(systems, tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install matplotlib.*--no-plot"):
        report.pyplot()


def test_prompts_have_the_lengths_asked_and_share_their_beginning(model: ModuleType) -> None:
    builder = PromptBuilder.from_config(Config())
    made = model.prompts_of(builder, (700, 300, 12_000))
    assert list(made) == [300, 700, 12_000]
    longest = made[12_000]
    for n, prompt in made.items():
        assert prompt.n_tokens == n
        kept = prompt.n_context_tokens
        assert np.array_equal(prompt.token_ids[:kept], longest.token_ids[:kept])
        asked = builder.decode(prompt.token_ids[kept:].tolist())
        assert model.QUESTION in asked


def test_pages_that_memory_cannot_hold_twice_are_held_once_or_on_disk(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config()
    page_bytes = model.model_geometry(config).page_nbytes
    n_bytes = 2048 * page_bytes
    free: dict[str, float] = {config.store.arena_dir: 2 * n_bytes, "scratch": math.inf}
    monkeypatch.setattr(model, "free_bytes", free.get)
    n_tokens = 2048 * config.cache.page_tokens
    roomy, told = model.room(config, n_tokens, "scratch")
    assert roomy.store.capacity_bytes == told["capacity_bytes"] == n_bytes
    assert (roomy.store.replicas, told["arena"]) == (2, "as configured")
    free[config.store.arena_dir] = n_bytes
    roomy, _ = model.room(config, n_tokens, "scratch")
    assert (roomy.store.replicas, roomy.store.arena_dir) == (1, config.store.arena_dir)
    free[config.store.arena_dir] = n_bytes - 1
    roomy, told = model.room(config, n_tokens, "scratch")
    assert (roomy.store.replicas, roomy.store.arena_dir) == (1, "scratch")
    assert told["arena"] == "a temporary directory on disk"
    free["scratch"] = 0
    with pytest.raises(SystemExit, match="no place"):
        model.room(config, n_tokens, "scratch")


def _run(model: ModuleType, tiny: Path, out: Path, *more: str) -> dict[str, Any]:
    argv = ["--quick", "--lengths", "320,512", "--steps", "6", "--no-plot", "--out", str(out)]
    for assignment in (f"model.name={tiny}", "model.n_threads=1", "store.capacity_bytes=67108864"):
        argv += ["--set", assignment]
    model.main([*argv, *more])
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["complete"]
    return result


def test_each_length_is_read_whole_and_compared_with_dense(
    model: ModuleType,
    report: ModuleType,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = _run(model, tiny, tmp_path / "model.json")
    mine, dense = result["systems"]["longreach dev"], result["systems"][report.DENSE]
    for rows in (mine, dense):
        assert [row["tokens_prefilled"] for row in rows] == [320, 512]
        for row in rows:
            assert row["decode_steps"] == 6
            assert len(row["token_ids"]) == 7
            ms = row["decode_ms"]
            assert 0 < ms["median"] <= ms["max"]
            assert ms["max_over_median"] == pytest.approx(ms["max"] / ms["median"], abs=0.1)
            assert row["peak_resident_bytes"] > 100 << 20
    for row in mine:
        assert row["tokens_reused"] == 0
        assert sum(row["prefill_seconds"].values()) == pytest.approx(row["prefill_s"], abs=0.01)
        assert row["store"]["replicas"] == 2
    printed = capsys.readouterr().out
    for title in ("without llama.cpp", "By context length", "How many times", "Where the time"):
        assert title in printed


def test_a_growing_text_reuses_what_was_read(model: ModuleType, tiny: Path, tmp_path: Path) -> None:
    result = _run(model, tiny, tmp_path / "model.json", "--grow", "--skip-dense", "--skip-llama")
    first, second = result["systems"]["longreach dev"]
    assert first["tokens_reused"] == 0
    assert second["tokens_reused"] == 256, "the pages before the shorter text's question"
    assert second["tokens_prefilled"] == 512 - 256
    whole_s = first["prefill_s"] + second["part_prefill_s"]
    assert second["prefill_s"] == pytest.approx(whole_s, abs=2e-3)


def _request(**more: Any) -> dict[str, Any]:
    builder = PromptBuilder.from_config(Config())
    text = "Paris is the capital of France. Rome is the capital of Italy."
    tokens = builder.build(text, "What is the capital of France?").token_ids.tolist()
    fixed = {"gguf": str(find_embedded_gguf()), "n_steps": 4, "flash": True, "n_threads": 1}
    return {**fixed, "tokens": tokens, **more}


def test_llama_reads_the_tokens_and_decodes(llama: ModuleType) -> None:
    try:
        llama.environment_python()
    except llama.LlamaCppError as error:
        pytest.skip(str(error))
    said: list[str] = []
    for flash in (True, False):
        result = llama.evaluate(_request(flash=flash), said.append)
        assert len(result["step_s"]) == 4
        answer = PromptBuilder.from_config(Config()).decode(result["token_ids"])
        assert "capital of" in answer
        assert min(result["prefill_s"], *result["step_s"]) > 0
        assert result["peak_bytes"] > 50 << 20
    assert len(said) == 2
    assert all("tokens read by llama" in line for line in said)
    with pytest.raises(llama.LlamaCppError, match=r"no-such.gguf cannot be loaded"):
        llama.evaluate(_request(gguf="no-such.gguf"), said.append)


def test_a_python_without_llama_is_told(llama: ModuleType) -> None:
    """The child answers even then: this is the protocol without the package."""
    with pytest.raises(llama.LlamaCppError, match="No module named 'llama_cpp'"):
        llama.evaluate(_request(), print, python=Path(sys.executable))


def test_a_child_that_is_silent_or_dies_is_told(llama: ModuleType, tmp_path: Path) -> None:
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\necho 'out of memory' >&2\n")
    child.chmod(0o755)
    with pytest.raises(llama.LlamaCppError, match=r"ended without a result.*out of memory"):
        llama.evaluate(_request(), print, python=child)
    child.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(llama.LlamaCppError, match="said nothing for 0 s"):
        llama.evaluate(_request(), print, python=child, silence_s=0.2)


def test_a_missing_environment_says_what_to_do(
    model: ModuleType, llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = functools.partial(llama.environment_python, tmp_path / ".venv-llama")
    with pytest.raises(llama.LlamaCppError, match=r"does not exist.*--setup.*--skip-llama"):
        missing()
    (tmp_path / ".installed").write_text("llama-cpp-python==0.0.1\n")
    with pytest.raises(llama.LlamaCppError, match="built otherwise than pinned"):
        llama.environment_python(tmp_path)
    monkeypatch.setattr(model, "environment_python", missing)
    with pytest.raises(SystemExit, match="--setup"):
        model.main(["--lengths", "512", "--no-plot", "--out", str(tmp_path / "model.json")])
    # a quick run goes on without it, as one that was told to
    said: list[str] = []
    for flag in ("--quick", "--skip-llama"):
        assert model.llama_gguf(Config(), model.arguments_of([flag]), said.append) is None
    assert "--setup" in said[0]
    assert said[1] == "without llama.cpp"


def test_no_build_begins_without_a_compiler(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.shutil, "which", lambda _: None)
    with pytest.raises(llama.LlamaCppError, match="needs cc"):
        llama.ensure_environment(tmp_path / "new")
    assert not (tmp_path / "new").exists()
