"""One dense query corrects a block of sparse ones."""

from __future__ import annotations

import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import reference
from longreach.kernels.delta import delta_correction, dense_query
from longreach.kernels.ops import attend_block, select_blocks

STAGES = (Stage(chunk=64, keep=512), Stage(chunk=8, keep=136))


def policy_of(attend_rope: str) -> LayerPolicy:
    return LayerPolicy(stages=STAGES, sink=32, window=128, attend_rope=attend_rope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("page_tokens", [16, 64])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 300, 2000])
def test_true_positions_give_dense_attention(path, paged, rope, dtype, page_tokens, position):
    k, v = torch.randn(2, 2, position + 1, 64).unbind(0)
    view, k, v = paged(k, v, page_tokens, dtype)
    q, rotary = torch.randn(6, 1, 64), rope(64)
    got = dense_query(q, position, view, 136, policy_of("none"), rotary, 0.125)
    want, _ = reference.dense_attention(q, position, k, v, rotary, 0.125)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("position", [100, 700, 2000])
def test_far_keys_stand_at_the_reach(path, paged, rope, position):
    k, v = torch.randn(2, 2, position + 1, 64).unbind(0)
    view, k, v = paged(k, v, 64)
    q, rotary = torch.randn(6, 1, 64), rope(64)
    got = dense_query(q, position, view, 136, policy_of("streaming"), rotary, 0.125)
    reach = 32 + 136 + 128
    # pages that hold a near key have true distances throughout
    near = max(0, position - reach + 1) // 64 * 64
    at = torch.arange(position + 1)
    at[:near] = position - reach
    keys = rotary.rotate(k, at).repeat_interleave(3, dim=0)
    logits = rotary.rotate(q, position) @ keys.mT * 0.125
    want = logits.softmax(dim=-1) @ v.repeat_interleave(3, dim=0)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
def test_the_first_query_is_dense_and_the_others_are_shifted_by_as_much(
    path, paged, rope, attend_rope
):
    k, v = torch.randn(2, 2, 1472, 64).unbind(0)
    view, k, v = paged(k, v, 64)
    q, rotary, policy = torch.randn(6, 64, 64), rope(64), policy_of(attend_rope)
    selection = select_blocks(q, 1408, view, policy, rotary)
    out, _ = attend_block(q, 1408, view, selection, policy, rotary, 0.125)
    got = delta_correction(q, 1408, view, out, 136, policy, rotary, 0.125)
    shift = got - out
    assert float(shift.abs().max()) > 0.01
    torch.testing.assert_close(shift, shift[:, :1].expand(-1, 64, -1), atol=1e-5, rtol=1e-4)
    if attend_rope == "none":
        want, _ = reference.dense_attention(q[:, :1], 1408, k, v, rotary, 0.125)
        torch.testing.assert_close(got[:, :1], want, atol=2e-5, rtol=2e-5)


def test_neighbours_come_nearer_to_dense_attention(paged, rope):
    """Queries that are alike miss alike."""
    k, v = torch.randn(2, 2, 1472, 64).unbind(0)
    view, k, v = paged(k, v, 64)
    rotary, policy = rope(64), policy_of("none")
    still = torch.randn(6, 1, 64)
    # turned back by its position a query is the same for all of them once it is rotated
    q = rotary.rotate((still + 0.1 * torch.randn(6, 64, 64)), -torch.arange(1408, 1472))
    selection = select_blocks(q, 1408, view, policy, rotary)
    out, _ = attend_block(q, 1408, view, selection, policy, rotary, 0.125)
    got = delta_correction(q, 1408, view, out, 136, policy, rotary, 0.125)
    want, _ = reference.dense_attention(q, 1408, k, v, rotary, 0.125)
    assert float((got - want).norm()) < 0.5 * float((out - want).norm())
