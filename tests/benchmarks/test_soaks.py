"""The soaks in short: nothing wrong, nothing uncounted, nothing left behind."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_20_000_reads_at_one_percent_corruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soak = importlib.import_module("benchmarks.soak_corruption")
    out = tmp_path / "soak.json"
    argv = ["--reads", "20000", "--pages", "256", "--arena-dir", str(tmp_path), "--out", str(out)]
    soak.main(argv)
    result = json.loads(out.read_text())
    assert result["total"]["reads"] >= 20_000
    assert result["total"]["wrong"] == result["total"]["uncounted"] == 0
    assert {(row["transport"], row["way"]) for row in result["rows"]} == set(soak.WAYS)
    for row in result["rows"]:
        assert row["accepted"] + row["recomputed"] == row["reads"]
        # the share of a page's reads: on the way or in memory, five standard deviations around 1 %
        injected = row["injected"]
        n_read = sum(injected[kind] for kind in injected if kind != "corrupt_write")
        assert 15 < n_read < 90
        assert row["found_by_client"] > 0
        assert row["found_by_stores"] > 0
    assert "wrong 0" in capsys.readouterr().out


def test_the_soak_would_see_a_wrong_page_and_an_uncounted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak = importlib.import_module("benchmarks.soak_corruption")
    loader = importlib.import_module("longreach.kvstore.page_share")
    # a client that believes what it gets
    monkeypatch.setattr(loader.ShareReader, "_good", lambda *arguments: True)
    out = tmp_path / "soak.json"
    argv = ["--reads", "2000", "--pages", "128", "--share", "0.1", "--arena-dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        soak.main([*argv, "--out", str(out)])
    total = json.loads(out.read_text())["total"]
    assert total["wrong"] > 20
    assert total["uncounted"] > 20


def test_60_rows_leave_nothing_behind(tmp_path: Path) -> None:
    soak = importlib.import_module("benchmarks.soak_leaks")
    out = tmp_path / "leaks.json"
    soak.main(["--rows", "60", "--seed", "3", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["rows"] >= 60
    assert result["left_over"] == {}
    assert {"answered", "cancelled", "connection_lost", "refused"} <= set(result["ends"])
    assert result["faults"]["faults_injected"] > 0
    assert result["before"]["descriptors"] > 10
    assert result["before"]["shared-memory mappings"] > 0


def test_what_is_left_is_what_there_is_more_of() -> None:
    soak = importlib.import_module("benchmarks.soak_leaks")
    assert soak.left_over({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "c": 0}) == {"b": 3}


def test_slopes_are_those_of_the_samples() -> None:
    soak = importlib.import_module("benchmarks.soak_leaks")
    memory = soak.Memory()
    memory.samples = [(60.0 * i, int(5e6 * i), int(7e8 - 2e6 * i)) for i in range(20)]
    assert memory.slopes()["all"] == pytest.approx(5.0)
    assert memory.slopes()["own in the second half"] == pytest.approx(-2.0)
