"""The GPU's benchmark runs to its end in the interpreter, and its result says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.timeout(300)
def test_a_toy_runs_every_section(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--toy", "--minutes", "20", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["left_out"] == {}
    assert set(gpu.SECTIONS) <= set(result)
    assert all(check["passed"] for check in result["checks"])
    assert result["device"]["interpreter"] is True
    assert result["aims"] == []  # times of the interpreter mean nothing
    assert out.with_suffix(".png").stat().st_size > 0


def test_aims_are_compared_with_what_was_found() -> None:
    layers = [
        {
            "n_tokens": 1 << 20,
            "summaries": {"amortised": 30.0, "warm": 25.0},
            "dense": {"warm": 1500.0},
        }
    ]
    model = [{"n_tokens": 3 << 20, "tokens_per_s": 90.0}]
    found = gpu.aims({"toy": False, "layers": layers, "model": model})
    assert [row["met"] for row in found] == [True, False, True, False]


def test_without_a_gpu_only_the_toy_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device here" in capsys.readouterr().err
