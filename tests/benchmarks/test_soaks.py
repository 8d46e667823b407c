"""The soaks in short: nothing wrong, nothing uncounted, nothing left behind."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_20_000_reads_at_one_percent_corruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soak = importlib.import_module("benchmarks.soak_corruption")
    out = tmp_path / "soak.json"
    argv = ["--reads", "20000", "--pages", "256", "--arena-dir", str(tmp_path), "--out", str(out)]
    soak.main(argv)
    result = json.loads(out.read_text())
    assert result["total"]["reads"] == 20_000
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
    loader = importlib.import_module("longreach.kvstore.page_fetch")
    # a client that believes what it gets
    monkeypatch.setattr(loader.Fetch, "_good", lambda *arguments: True)
    out = tmp_path / "soak.json"
    argv = ["--reads", "2000", "--pages", "128", "--share", "0.1", "--arena-dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        soak.main([*argv, "--out", str(out)])
    total = json.loads(out.read_text())["total"]
    assert total["wrong"] > 20
    assert total["uncounted"] > 20
