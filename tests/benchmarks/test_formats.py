"""Rounding keys and values: float32 changes nothing, smaller formats change more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import formats, kv_formats
from longreach.kernels.ops import PagedKV, gather_tokens
from longreach.kvstore.page import PageGeometry
from longreach.workers.bank import Bank


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
    assert rows["int4c"]["kl_mean"] < rows["int4"]["kl_mean"]
    assert rows["int4c"]["built"]
    assert rows["int4c"]["bytes_per_token"] == 72


def test_the_numbers_are_of_what_the_engine_stores() -> None:
    """Written and read by the engine's bank in every built format: the same bits."""
    k, v = torch.randn(2, 2, 128, 64).unbind(0)
    for form in kv_formats.formats(64):
        if not form.built:
            continue
        geometry = PageGeometry(1, 2, 64, 64, form.name)
        assert form.bytes_per_token == geometry.leaf_nbytes / 64
        bank = Bank(geometry, 2)
        slots = np.arange(4).reshape(2, 2)
        if geometry.block_tokens > 1:
            bank.seal(0, slots, np.zeros(2, dtype=np.int64), k, v)
        else:
            token = np.arange(128)
            assert bank.write(0, slots[:, token // 64], token % 64, k, v) == -1
        row = torch.from_numpy(slots)
        view = PagedKV((bank.layers[0],), torch.zeros_like(row), row, 64, 128)
        assert torch.equal(gather_tokens(view, torch.arange(128)), form.keys(k))
        assert torch.equal(gather_tokens(view, torch.arange(128), "v"), form.values(v))
