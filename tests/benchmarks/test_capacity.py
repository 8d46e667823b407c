"""The capacity benchmark runs to its end on a small context, and says what it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import capacity
from longreach.kvstore.page import PageGeometry


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_scaled_pages_differ_in_their_scales_alone(kv_dtype: str) -> None:
    geometry = PageGeometry(2, 1, 8, 16, kv_dtype)
    page = np.random.default_rng(0).integers(0, 256, geometry.page_nbytes).astype(np.uint8)
    rows = page.reshape(geometry.n_leaves, -1, geometry.row_nbytes)
    rows[..., -4:] = np.frombuffer(np.float32(0.5).tobytes(), np.uint8)
    made = capacity.scaled(page, geometry, np.array([1.0, 2.0], np.float32))
    new = made.reshape(rows.shape)
    assert (new[..., :-4] == rows[..., :-4]).all()
    assert (np.ascontiguousarray(new[..., -4:]).view(np.float32) == [[[0.5]], [[1.0]]]).all()


def test_a_quick_run_finds_pages_in_both_tiers_as_planned(tmp_path: Path) -> None:
    out = tmp_path / "capacity.json"
    capacity.main(["--quick", "--cold", "--out", str(out), "--disk-dir", str(tmp_path / "disk")])
    result = json.loads(out.read_text())
    beside, large = result["rows"]
    assert beside["tiers"]["disk"] == {"predicted": 0, "held": 0}
    assert large["tiers"]["disk"]["held"] > large["tiers"]["arena"]["held"] > 0
    # the answer's page is planned and never full: one of few here
    one_page = large["arena_bytes_limit"] / 17
    for row in result["rows"]:
        for tier in row["tiers"].values():
            assert abs(tier["predicted"] - tier["held"]) <= one_page
    # nothing but the last block is computed
    assert large["tokens_prefilled"] <= 64
    assert large["step_ms"]["n"] == capacity.QUICK_STEPS - 1
