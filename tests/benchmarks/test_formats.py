"""Rounding keys and values: float32 changes nothing, smaller formats change more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import formats, kv_formats


def test_smaller_formats_change_more(tmp_path: Path) -> None:
    out = tmp_path / "formats.json"
    formats.main(["--quick", "--tokens", "192", "--skip-facts", "--out", str(out)])
    rows = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["float32"]["kl_mean"] == 0.0
    assert rows["float32"]["same_choice"] == 1.0
    order = ["float16", "bfloat16", "int8", "int4"]
    for measure in ("kl_mean", "output_error"):
        found = [rows[name][measure] for name in order]
        assert found == sorted(found)
    assert 0 < rows["int4"]["mass"] < 1.001
    assert rows["int4"]["bytes_per_token"] < rows["float8"]["bytes_per_token"]
    assert rows["int4, keys by channel"]["kl_mean"] < rows["int4"]["kl_mean"]


@pytest.mark.parametrize("rounding", [kv_formats.per_channel, kv_formats.grouped])
def test_four_bits_have_sixteen_values_at_most_and_err_by_half_a_step(
    rounding: kv_formats.Rounding,
) -> None:
    x = torch.randn(2, 128, 64) * torch.logspace(-1, 1, 64)
    made = rounding(x)
    by_channel = rounding is kv_formats.per_channel
    units = (made[:, :64].mT if by_channel else made.unflatten(-1, (-1, 32))).reshape(-1, 32)
    assert all(len(unit.unique()) <= 16 for unit in units)
    spread = x[:, :64].amax(1) - x[:, :64].amin(1)
    if by_channel:
        assert ((made - x)[:, :64].abs().amax(1) <= 0.51 * spread / 15 + 1e-2 * spread).all()
    assert torch.equal(kv_formats.per_channel(x[:, :70])[:, 64:], x[:, 64:70])
