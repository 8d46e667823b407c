"""The share of dense attention that was attended, against the specification."""

from __future__ import annotations

import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import audit, reference
from longreach.kernels.ops import MassAudit, Selection, select_blocks

STAGES = (Stage(chunk=64, keep=512), Stage(chunk=8, keep=136))


def share_of(running: MassAudit, view) -> tuple[float, int]:  # type: ignore[no-untyped-def]
    """The result, and in how many pieces it came."""
    for n_pieces in range(1, 100):
        found = running.advance(view)
        if found is not None:
            return found, n_pieces
    raise AssertionError("the audit never ends")


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
@pytest.mark.parametrize("piece_segments", [64, 2])
def test_each_attended_key_counts_once(
    path, paged, rope, monkeypatch, head_reduce, attend_rope, piece_segments
):
    monkeypatch.setattr(audit, "PIECE_SEGMENTS", piece_segments)
    k, v = torch.randn(2, 2, 1500, 32).unbind(0)
    view, k, _ = paged(k, v, 16)
    policy = LayerPolicy(
        stages=STAGES, sink=32, window=128, head_reduce=head_reduce, attend_rope=attend_rope
    )
    rotary, q = rope(32), torch.randn(4, 1, 32)
    selection = select_blocks(q, 1450, view, policy, rotary)
    for head in (0, 3):
        mine = selection.blocks[0 if head_reduce == "all" else head // 2].tolist()
        tokens, seen, _, _ = reference.attended_keys(1450, 1, mine, policy)
        attended = torch.zeros(1451, dtype=torch.bool)
        attended[tokens[seen[0]]] = True
        want = reference.mass_kept(q, 1450, k, attended, rotary, 0.2, head)
        running = MassAudit(q, 1450, head, selection, policy, rotary, 0.2)
        got, n_pieces = share_of(running, view)
        assert got == pytest.approx(want, abs=1e-5)
        assert 0.05 < got < 0.9
        assert n_pieces == (
            1 if piece_segments == 64 else 6
        )  # 91 pages in groups of 8, two at a time


def test_all_is_kept(path, paged, rope):
    k, v = torch.randn(2, 2, 1333, 64).unbind(0)
    view, _, _ = paged(k, v, 64)
    policy = LayerPolicy(stages=(Stage(chunk=8, keep=4096),), sink=5, window=131)
    q, rotary = torch.randn(6, 1, 64), rope(64)
    selection = Selection((None,), torch.arange(5, 1300, 8)[None], torch.tensor([162]))
    running = MassAudit(q, 1332, 4, selection, policy, rotary, 0.125)
    assert share_of(running, view)[0] == pytest.approx(1.0, abs=1e-5)
