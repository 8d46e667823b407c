"""Rounding keys and values: float32 changes nothing, smaller formats change more."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import formats


def test_smaller_formats_change_more(tmp_path: Path) -> None:
    out = tmp_path / "formats.json"
    formats.main(["--quick", "--tokens", "192", "--out", str(out)])
    rows = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["float32"]["kl_mean"] == 0.0
    assert rows["float32"]["same_choice"] == 1.0
    order = ["float16", "bfloat16", "int8", "int4"]
    assert [rows[name]["kl_mean"] for name in order] == sorted(
        rows[name]["kl_mean"] for name in order
    )
    assert rows["int4"]["bytes_per_key"] < rows["float8"]["bytes_per_key"]
