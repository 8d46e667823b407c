"""The transport's benchmarks in short: they run, and one batch beats a call for each page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import page_rates, stores


def test_pages_in_place_and_by_plan() -> None:
    found = page_rates.measure(n_pages=48, n_times=3)
    assert set(found) == {"in place", "plan, in place", "plan, over loopback"}
    assert found["in place"]["copy_from_arena_of_memcpy"] > 0.2
    assert found["plan, in place"]["batch_speedup"] > 1.0


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_two_stores_behind_limited_links(tmp_path: Path) -> None:
    out = tmp_path / "stores.json"
    arguments = ["--mbit", "20", "--pages", "6", "--times", "1", "--counts", "1", "2"]
    assert stores.main([*arguments, "--out", str(out)]) == 0
    if not out.exists():
        pytest.skip("this machine lets nobody make network namespaces")
    one, two = json.loads(out.read_text())["rows"]
    assert one["mb_per_s"] < 6.0, "the link is not limited"
    assert two["of_linear"] > 0.5
    left = [name for name in os.listdir("/var/run/netns") if name.startswith(f"lrns{os.getpid()}")]
    assert not left


def test_without_the_right_to_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    out = tmp_path / "stores.json"
    assert stores.main(["--out", str(out)]) == 0
    assert "not measured: network namespaces need root" in capsys.readouterr().out
    assert not out.exists()
