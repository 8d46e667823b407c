"""Attention over segments against the specification, and its exactness rules (DESIGN 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import by_channel, reference
from longreach.kernels.ops import (
    PagedKV,
    Rope,
    Segments,
    Selection,
    attend_block,
    attend_segments,
    merge_partials,
    plan_attend,
    select_blocks,
)

FLOAT8, INT4, INT4C = torch.float8_e4m3fn, torch.uint8, by_channel.DTYPE
STAGES = (Stage(chunk=64, keep=512), Stage(chunk=8, keep=136))


def policy_of(stages: tuple[Stage, ...] = STAGES, **more: Any) -> LayerPolicy:
    return LayerPolicy(stages=stages, **{"sink": 32, "window": 128, **more})


def run(
    q: torch.Tensor, q_start: int, view: PagedKV, policy: LayerPolicy, rope: Rope, scale: float
) -> tuple[torch.Tensor, torch.Tensor, Selection | None, Segments]:
    selection = None if policy.dense else select_blocks(q, q_start, view, policy, rope)
    segments = plan_attend(q_start, q.shape[1], selection, policy, view.page_tokens)
    o, lse = attend_segments(q, q_start, view, segments, policy, rope, scale)
    return *merge_partials(o, lse), selection, segments


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "page_tokens", "n_queries"),
    [
        (torch.float32, 3, 64, 64, 64),
        (torch.float32, 3, 64, 64, 1),
        (torch.float16, 1, 80, 16, 13),
        (torch.bfloat16, 2, 128, 32, 64),
        (torch.float16, 8, 96, 64, 1),
        (torch.bfloat16, 7, 64, 16, 1),
        (torch.float32, 4, 256, 64, 1),
        (torch.float16, 6, 128, 16, 1),
        (torch.int8, 3, 64, 64, 1),
        (torch.int8, 5, 80, 32, 17),
        (FLOAT8, 3, 64, 64, 1),
        (FLOAT8, 2, 80, 16, 13),
        (INT4, 3, 64, 64, 1),
        (INT4, 6, 80, 16, 1),
        (INT4, 5, 128, 32, 17),
        (INT4C, 3, 64, 64, 64),
        (INT4C, 2, 96, 128, 13),
        (INT4C, 3, 64, 128, 1),
        (INT4C, 5, 128, 64, 1),
        (torch.float32, 5, 24, 64, 3),  # a head size that the fast path leaves to torch
    ],
)
def test_sparse_attention_equals_the_specification(
    path, paged, rope, attend_rope, head_reduce, dtype, group, head_dim, page_tokens, n_queries
):
    n_tokens = 1408 + n_queries
    k, v = torch.randn(2, 2, n_tokens, head_dim).unbind(0)
    view, k, v = paged(k, v, page_tokens, dtype, n_memories=3)
    policy = policy_of(attend_rope=attend_rope, head_reduce=head_reduce)
    q, rotary = torch.randn(2 * group, n_queries, head_dim), rope(head_dim, 1.1)
    out, lse, selection, _ = run(q, 1408, view, policy, rotary, head_dim**-0.5)
    blocks = [[b for b in row if b >= 0] for row in selection.blocks.tolist()]
    assert sum(map(len, blocks)) == 17 * len(blocks)
    want, want_lse = reference.sparse_attention(
        q, 1408, k, v, blocks, policy, rotary, head_dim**-0.5
    )
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize("tail", [8, 16, 64])
@pytest.mark.parametrize(("dtype", "n_queries"), [(torch.float32, 1), (torch.float16, 20)])
@pytest.mark.parametrize("deep", [False, True])
def test_the_tail_equals_the_specification(
    path, paged, rope, attend_rope, head_reduce, tail, dtype, n_queries, deep
):
    k, v = torch.randn(2, 2, 1408 + n_queries, 64).unbind(0)
    view, k, v = paged(k, v, 64, dtype)
    stages = (*STAGES[: int(deep)], STAGES[1])
    more = {"attend_rope": attend_rope, "head_reduce": head_reduce, "window": 192}
    policy = policy_of(stages, tail=tail, sink=64, **more)
    q, rotary = torch.randn(6, n_queries, 64), rope(64)
    selection = select_blocks(q, 1408, view, policy, rotary)
    out, lse = attend_block(q, 1408, view, selection, policy, rotary, 0.125)
    inputs, blocks = reference.select(q, 1408, k, policy, rotary)
    parts = [
        reference.sparse_attention(q, 1408, k, v, blocks, policy, rotary, 0.125),
        reference.tail_attention(q, 1408, k, v, inputs[-1], blocks, policy, rotary, 0.125),
    ]
    assert float(parts[1][1].exp().min()) > 0
    want, want_lse = reference.merge(*(torch.stack(x) for x in zip(*parts, strict=True)))
    # means of 16-bit keys are kept in 16 bit
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(out, want, **close)
    torch.testing.assert_close(lse, want_lse, **close)


def test_a_selection_that_keeps_everything_has_no_tail(path, paged, rope):
    k, v = torch.randn(2, 2, 1409, 64).unbind(0)
    view, k, v = paged(k, v)
    policy = policy_of((Stage(chunk=64, keep=2048), Stage(chunk=8, keep=2048)), tail=16)
    q, rotary = torch.randn(4, 1, 64), rope(64)
    selection = select_blocks(q, 1408, view, policy, rotary)
    out, _ = attend_block(q, 1408, view, selection, policy, rotary, 0.125)
    want, _ = reference.dense_attention(q, 1408, k, v, rotary, 0.125)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("q_start", [0, 1, 31, 32, 100, 127, 128, 129, 160, 161, 192, 230, 448])
@pytest.mark.parametrize("n_queries", [1, 7, 64])
def test_early_contexts_equal_dense(path, paged, rope, q_start, n_queries):
    """Shorter than sink + window + budget: everything is attended, in any style."""
    k, v = torch.randn(2, 2, q_start + n_queries, 32).unbind(0)
    view, k, v = paged(k, v, 16)
    q, rotary = torch.randn(4, n_queries, 32), rope(32)
    want, want_lse = reference.dense_attention(q, q_start, k, v, rotary, 0.2)
    for attend_rope in ("streaming", "none"):
        policy = policy_of((Stage(chunk=64, keep=512),), attend_rope=attend_rope)
        out, lse, _, _ = run(q, q_start, view, policy, rotary, 0.2)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("page_tokens", [16, 32, 64])
@pytest.mark.parametrize(("sink", "window"), [(0, 64), (5, 131), (64, 256), (200, 64)])
def test_keeping_everything_equals_dense(path, paged, rope, page_tokens, sink, window):
    k, v = torch.randn(2, 2, 1333, 64).unbind(0)
    view, k, v = paged(k, v, page_tokens)
    rotary = rope(64)
    policies = [LayerPolicy(attend_rope="none", sink=0, window=0)]
    for attend_rope in ("streaming", "none"):
        stages = (Stage(chunk=64, keep=4096), Stage(chunk=8, keep=4096))
        policies.append(policy_of(stages, attend_rope=attend_rope, sink=sink, window=window))
    for q_start, n_queries in ((1280, 53), (1332, 1)):
        q = torch.randn(6, n_queries, 64)
        want, _ = reference.dense_attention(q, q_start, k, v, rotary, 0.125)
        for policy in policies:
            out, _, _, _ = run(q, q_start, view, policy, rotary, 0.125)
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize("n_queries", [64, 5, 1])
def test_bits_do_not_depend_on_the_call(path, paged, rope, threads, head_reduce, n_queries):
    """All segments at once, one at a time, in any memory, with any number of threads."""
    k, v = torch.randn(2, 3, 1984 + n_queries, 64).unbind(0)
    policy = policy_of(head_reduce=head_reduce)
    q, rotary = torch.randn(9, n_queries, 64), rope(64)
    view, _, _ = paged(k, v)
    threads(1)
    selection = select_blocks(q, 1984, view, policy, rotary)
    segments = plan_attend(1984, n_queries, selection, policy, 64)
    assert len(segments) >= 4
    o, lse = attend_segments(q, 1984, view, segments, policy, rotary, 0.125)
    out, _ = merge_partials(o, lse)
    for n_threads, n_memories, size in ((1, 1, 1), (2, 3, 1), (2, 2, 3), (3, 3, 99)):
        threads(n_threads)
        other, _, _ = paged(k, v, n_memories=n_memories, seed=n_memories)
        parts = [
            attend_segments(q, 1984, other, segments[i : i + size], policy, rotary, 0.125)
            for i in range(0, len(segments), size)
        ]
        assert torch.equal(torch.cat([p for p, _ in parts]), o)
        assert torch.equal(torch.cat([p for _, p in parts]), lse)
        again, _ = merge_partials(torch.cat([p for p, _ in parts]), lse)
        assert torch.equal(again, out)


def test_pages_of_other_segments_need_not_be_present(path, paged, rope):
    k, v = torch.randn(2, 2, 1088, 64).unbind(0)
    view, _, _ = paged(k, v)
    policy, rotary, q = policy_of(), rope(64), torch.randn(4, 64, 64)
    selection = select_blocks(q, 1024, view, policy, rotary)
    segments = plan_attend(1024, 64, selection, policy, 64)
    o, _ = attend_segments(q, 1024, view, segments, policy, rotary, 0.125)
    for i, segment in enumerate(segments):
        row = torch.full_like(view.row, -1)
        row[:, list(segment.pages[0])] = view.row[:, list(segment.pages[0])]
        bank = PagedKV(view.memories, view.memory, row, 64, 1088)
        part, _ = attend_segments(q, 1024, bank, segments[i : i + 1], policy, rotary, 0.125)
        assert torch.equal(part[0], o[i])
        row[:, segment.pages[0][0]] = -1
        with pytest.raises(InternalError, match="absent"):
            attend_segments(q, 1024, bank, segments[i : i + 1], policy, rotary, 0.125)


def test_rows_that_see_nothing(path, paged, rope):
    """A sink segment of a block whose first queries still have the sinks inside their window."""
    k, v = torch.randn(2, 2, 192, 32).unbind(0)
    view, _, _ = paged(k, v, 32)
    policy, rotary, q = policy_of(), rope(32), torch.randn(4, 64, 32)
    selection = select_blocks(q, 128, view, policy, rotary)
    sink = plan_attend(128, 64, selection, policy, 32)[:1]
    assert sink[0].kind == "sink"
    o, lse = attend_segments(q, 140, view, sink, policy, rotary, 0.2)
    assert bool(torch.isfinite(o).all())
    early = attend_segments(q[:, :20], 100, view, sink, policy, rotary, 0.2)
    assert bool((early[0] == 0).all())
    assert bool((early[1] == -torch.inf).all())
    assert bool((lse > -torch.inf).all())


def test_nan_keys_are_not_hidden(path, paged, rope):
    """A visible NaN reaches the result, so that the engine can refuse the row."""
    k, v = torch.randn(2, 2, 512, 64).unbind(0)
    k[0, 505] = torch.nan
    view, _, _ = paged(k, v)
    policy, rotary = policy_of(), rope(64)
    q = torch.randn(4, 1, 64)
    out, _, _, _ = run(q, 511, view, policy, rotary, 0.125)
    assert bool(out[:2].isnan().all())
    assert not bool(out[2:].isnan().any())


def test_merge_equals_the_specification(path):
    o, lse = torch.randn(7, 3, 50, 16), 20 * torch.randn(7, 3, 50)
    lse[2], o[2] = -torch.inf, 0.0
    lse[:, 1, 4], o[:, 1, 4] = -torch.inf, 0.0
    lse[:6, 2, 9], o[:6, 2, 9] = -torch.inf, 0.0
    out, total = merge_partials(o, lse)
    want, want_total = reference.merge(o, lse)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, want_total, atol=1e-5, rtol=1e-5)
    assert total[1, 4] == -torch.inf
    assert bool((out[1, 4] == 0).all())
    torch.testing.assert_close(out[2, 9], o[6, 2, 9])
    one, one_lse = merge_partials(o[:1], lse[:1])
    torch.testing.assert_close(one[0, :4], o[0, 0, :4])
    torch.testing.assert_close(one_lse[0, :4], lse[0, 0, :4])
