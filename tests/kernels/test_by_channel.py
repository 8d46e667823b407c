"""The format int4c: blocks of 64 tokens rounded together, and views with a block that is not rounded yet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy
from longreach.kernels import by_channel, summaries
from longreach.kernels.append import append_tokens, first_not_finite, seal_blocks, seal_torch
from longreach.kernels.ops import (
    PagedKV,
    PreparedDecode,
    attend_segments,
    block_start,
    gather_tokens,
    merge_partials,
    plan_attend,
)
from longreach.kernels.paged import stored_items
from longreach.kernels.summaries import page_summaries


def empty(n_slots: int, page_tokens: int, head_dim: int) -> torch.Tensor:
    shape = (n_slots, 2, page_tokens, stored_items(head_dim, by_channel.DTYPE))
    return torch.full(shape, -1, dtype=torch.int16).view(by_channel.DTYPE)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("page_tokens", [64, 128, 192])
def test_both_paths_store_the_same_bits_and_nothing_else(head_dim: int, page_tokens: int) -> None:
    k, v = torch.randn(2, 3, 256, head_dim).unbind(0)
    k = k * torch.logspace(-9, 4, head_dim) + torch.logspace(-3, 3, head_dim)
    v = v * torch.logspace(-9, 3, 256)[:, None]
    k[0, :, 5], k[1, :64, 7], v[2, 9] = 3.25, 0.0, 0.0
    k[2, 3, 1], v[1, 4, 2] = 65504.0, -65504.0
    token = np.array([0, 64, 128, 320])
    slots = np.arange(3)[:, None] * 7 + token // page_tokens
    blocks = token % page_tokens // 64
    one, two = empty(24, page_tokens, head_dim), empty(24, page_tokens, head_dim)
    # as the model hands them over: not contiguous
    views = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    seal_blocks(one, slots, blocks, *views)
    seal_torch(two, slots, blocks, k, v)
    assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    touched = (one.view(torch.uint8).flatten(2).unflatten(2, (page_tokens // 64, -1)) != 255).any(
        -1
    )
    assert int(touched.sum()) == 3 * 4 * 2
    rounded = by_channel.rounded(k, keys=True), by_channel.rounded(v, keys=False)
    for i, first in enumerate(token):
        row = torch.from_numpy(slots[:, i]).repeat_interleave(64)
        slot = (first % page_tokens + torch.arange(64)).repeat(3)
        got = by_channel.gather_keys(one, row, slot).view(3, 64, head_dim)
        assert torch.equal(got, rounded[0][:, i * 64 : (i + 1) * 64])
        got = by_channel.gather_values(one, row, slot).view(3, 64, head_dim)
        assert torch.equal(got, rounded[1][:, i * 64 : (i + 1) * 64])


def test_the_error_is_half_a_step_of_the_channel_or_group() -> None:
    x = torch.randn(2, 128, 64) * torch.logspace(-1, 1, 64) + torch.linspace(-20, 20, 64)
    blocks = x.unflatten(1, (2, 64))
    spread = blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)
    error = (by_channel.rounded(x, keys=True).unflatten(1, (2, 64)) - blocks).abs()
    # besides half a step, what float16 does to offset and scale
    assert bool((error <= 0.5 * spread / 15 + 2**-10 * (spread + blocks.abs().amax(2, True))).all())
    groups = x.unflatten(2, (2, 32))
    error = (by_channel.rounded(x, keys=False).unflatten(2, (2, 32)) - groups).abs()
    assert bool((error <= 0.501 * groups.abs().amax(3, keepdim=True) / 7).all())
    # rounding what is rounded changes little more than its scales' last bits: nothing drifts
    assert torch.equal(by_channel.rounded(x[:, :100], keys=True)[:, 64:], x[:, 64:100])


def test_numbers_beyond_float16_are_named() -> None:
    kv = torch.randn(2, 3, 70, 32)
    assert first_not_finite(*kv, by_channel.DTYPE) == -1
    kv[1, 2, 40, 3], kv[0, 1, 66, 0] = 7e4, torch.nan
    assert first_not_finite(*kv, by_channel.DTYPE) == 40
    kv[1, 0, 3, 1] = torch.inf
    assert first_not_finite(*kv, by_channel.DTYPE) == 3


def test_tokens_are_not_appended_one_by_one() -> None:
    one = torch.zeros(1, 1, 32)
    with pytest.raises(InternalError, match="seal_blocks"):
        append_tokens(empty(1, 64, 32), np.array([[0]]), np.array([0]), one, one)


@pytest.mark.parametrize("page_tokens", [64, 128])
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 300, 320])
def test_gather_reads_pages_and_the_open_block(paged, page_tokens: int, n_tokens: int) -> None:
    k, v = torch.randn(2, 3, n_tokens, 32).unbind(0)
    view, stored_k, stored_v = paged(k, v, page_tokens, by_channel.DTYPE, n_memories=2)
    ids = torch.randint(0, n_tokens, (3, 50))
    for which, want in (("k", stored_k), ("v", stored_v)):
        got = gather_tokens(view, ids, which)
        assert torch.equal(got, torch.stack([want[h, ids[h]] for h in range(3)]))
    assert bool((gather_tokens(view, torch.tensor([-1, n_tokens])) == 0).all())
    first = block_start(n_tokens - 1)
    assert torch.equal(stored_k[:, first:], k[:, first:])
    if first:
        assert not torch.equal(stored_k[:, :first], k[:, :first])
        gone = replace(view, row=torch.full_like(view.row, -1))
        assert torch.equal(gather_tokens(gone, torch.tensor([first])), k[:, first : first + 1])
        with pytest.raises(InternalError, match="absent"):
            gather_tokens(gone, torch.tensor([first - 1]))


@pytest.mark.parametrize("head_dim", [32, 96])
@pytest.mark.parametrize("page_tokens", [64, 128])
def test_compiled_code_reads_what_torch_does(paged, monkeypatch, head_dim: int, page_tokens: int):
    """A mean of one token is what is stored there."""
    k, v = torch.randn(2, 2, 641, head_dim).unbind(0)
    view, stored_k, _ = paged(k, v, page_tokens, by_channel.DTYPE, n_memories=2)
    last = 640 // page_tokens
    rows = page_summaries(("mean", 1, 1.0), view, 0, last)[:, :, :, 0].transpose(0, 1)
    assert torch.equal(rows.reshape(2, -1, head_dim), stored_k[:, : last * page_tokens])
    for name in (("bounds", 8, 0.4), ("tail", 32, 1.0)):
        made = page_summaries(name, view, 0, last)
        with monkeypatch.context() as patch:
            patch.setattr(summaries, "cpu_page_summaries", None)
            torch.testing.assert_close(made, page_summaries(name, view, 0, last))


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
def test_a_plan_of_decode_goes_on_over_the_edge_of_a_block(paged, rope, attend_rope: str) -> None:
    """The same prepared call reads position after position, as a fresh view of each would."""
    k, v = torch.randn(2, 2, 448, 64).unbind(0)
    view, _, _ = paged(k, v, 128, by_channel.DTYPE)
    policy = LayerPolicy(attend_rope=attend_rope)
    q, rotary = torch.randn(6, 1, 64), rope(64)
    segments = plan_attend(380, 12, None, policy, 128)
    assert view.open is not None
    block = torch.full_like(view.open.kv, torch.nan)
    growing = replace(view, open=replace(view.open, kv=block)).until(380)
    prepared = PreparedDecode(growing, segments, policy, rotary, 0.1, 6)
    for position in range(380, 388):
        first = block_start(position)
        block[:, :, : position + 1 - first] = torch.stack((k, v))[:, :, first : position + 1]
        fresh, _, _ = paged(k[:, : position + 1], v[:, : position + 1], 128, by_channel.DTYPE)
        fresh = PagedKV(
            view.memories, view.memory[:, :4], view.row[:, :4], 128, position + 1, fresh.open
        )
        want, _ = merge_partials(
            *attend_segments(q, position, fresh, segments, policy, rotary, 0.1)
        )
        assert torch.equal(prepared.attend(q, position, segments.base), want)
