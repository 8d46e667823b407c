"""Segments: every visible key in exactly one of them, and fixed groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.attend import key_positions, visible
from longreach.kernels.ops import (
    Segment,
    Selection,
    base_of,
    plan_attend,
    plan_tail,
    tail_until,
    touched_pages,
)
from longreach.kernels.paged import block_token_ids


def selection_of(*blocks: list[int]) -> Selection:
    longest = max(map(len, blocks))
    padded = torch.tensor([row + [-1] * (longest - len(row)) for row in blocks]).view(
        len(blocks), -1
    )
    counts = torch.tensor([len(row) for row in blocks])
    return Selection((None,), padded.long(), counts)


def keys_of(segment: Segment) -> torch.Tensor:
    return block_token_ids(segment.starts, segment.block_tokens)


@settings(max_examples=150)
@given(st.data())
def test_every_visible_key_is_in_one_segment(data):
    sink = data.draw(st.sampled_from([0, 8, 20, 64]))
    window = data.draw(st.sampled_from([8, 64, 100, 300]))
    page_tokens = data.draw(st.sampled_from([8, 16, 64]))
    q_start = data.draw(st.integers(0, 700))
    n_queries = data.draw(st.sampled_from([1, 5, 64]))
    policy = LayerPolicy(stages=(Stage(chunk=8, keep=64),), sink=sink, window=window)
    every = range(sink, max(sink, q_start - window + 8), 8)
    chosen = [b for b in every if data.draw(st.booleans())]
    segments = plan_attend(q_start, n_queries, selection_of(chosen), policy, page_tokens)
    positions = torch.arange(q_start, q_start + n_queries)
    count = torch.zeros(n_queries, q_start + n_queries + page_tokens + 8)
    for segment in segments:
        tokens = keys_of(segment)
        assert segment.starts.shape[-1] <= 8
        seen = visible(segment, tokens, positions, policy)
        count.index_add_(1, tokens.clamp(min=0), seen.float())
        pages = sorted({int(t) // page_tokens for t in tokens})
        assert segment.pages == (tuple(pages),)
    want = torch.zeros_like(count)
    for t, p in enumerate(positions.tolist()):
        want[t, max(0, p - window + 1) : p + 1] = 1
        want[t, : max(0, min(sink, p - window + 1))] = 1
        for b in chosen:
            want[t, b : max(b, min(b + 8, p - window + 1))] = 1
    assert torch.equal(count, want)


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_positions(head_reduce):
    policy = LayerPolicy(
        stages=(Stage(chunk=8, keep=96),), sink=16, window=64, head_reduce=head_reduce
    )
    rows = [[16, 40, 48, 200, 208, 216, 224, 232, 400], [16, 24, 32]]
    selection = selection_of(*rows[: 1 if head_reduce == "all" else 2])
    segments = plan_attend(1000, 24, selection, policy, 16)
    kinds = [s.kind for s in segments]
    assert kinds == sorted(kinds, key=["sink", "selected", "window"].index)
    base = [1000 - 64 - 16 - 8 * len(row) + 1 for row in rows][: len(segments[0].base)]
    assert list(segments[0].base) == base
    for segment in segments:
        assert list(segment.base) == base
        tokens = keys_of(segment)
        for h, mine in enumerate(key_positions(segment)):
            row = tokens if tokens.dim() == 1 else tokens[h]
            if segment.kind == "sink":
                assert torch.equal(mine, row)
            elif segment.kind == "window":
                assert torch.equal(mine + base[h], row)
    ranks = torch.cat([key_positions(s)[0] for s in segments if s.kind == "selected"])
    assert torch.equal(ranks, 16 + torch.arange(72))
    # the last selected key stands where the window begins: distances close up
    assert int(ranks[-1]) + base[0] == 1000 - 64


def test_true_positions():
    policy = LayerPolicy(stages=(Stage(chunk=8, keep=96),), sink=16, window=64, attend_rope="none")
    segments = plan_attend(1000, 24, selection_of([16, 40, 400]), policy, 16)
    for segment in segments:
        assert torch.equal(key_positions(segment)[0], keys_of(segment))


def test_dense_is_all_window():
    policy = LayerPolicy(sink=0, window=0, attend_rope="none")
    segments = plan_attend(1000, 24, None, policy, 16)
    assert [s.kind for s in segments] == ["window"] * 8
    assert torch.cat([keys_of(s) for s in segments]).tolist() == list(range(1024))
    assert all(s.pages[0] == tuple(range(8 * i, 8 * i + 8)) for i, s in enumerate(segments))
    # groups are absolute: a longer context has the same leading segments
    longer = plan_attend(2000, 1, None, policy, 16)
    for mine, theirs in zip(segments[:7], longer, strict=False):
        assert torch.equal(mine.starts, theirs.starts)


@settings(max_examples=200)
@given(st.data())
def test_a_tail_is_good_until_it_changes(data):
    """Before `tail_until` a new plan of the tail differs in its base alone."""
    policy = LayerPolicy(
        stages=(Stage(chunk=16, keep=960), Stage(chunk=8, keep=64)),
        sink=data.draw(st.sampled_from([0, 32, 64])),
        window=data.draw(st.sampled_from([64, 100, 256])),
        attend_rope=data.draw(st.sampled_from(["streaming", "none"])),
        tail=data.draw(st.sampled_from([8, 16])),
    )
    start = data.draw(st.integers(0, 900))
    rows = [
        sorted(data.draw(st.sets(st.integers(8, 120), max_size=20)))
        for _ in range(data.draw(st.sampled_from([1, 2])))
    ]
    blocks = selection_of(*[[8 * b for b in row] for row in rows]).blocks
    entered = torch.arange(0, 968, 8).expand(len(rows), -1)
    selection = Selection((None, entered), blocks, (blocks >= 0).sum(dim=1))
    before, until, n_same = plan_tail(start, selection, policy, 16), tail_until(start, policy), 0
    for q in range(start + 1, start + 40):
        fresh = plan_tail(q, selection, policy, 16)
        if q >= until:
            before, until = fresh, tail_until(q, policy)
            assert until > q
            continue
        n_same += 1
        assert (before is None) == (fresh is None)
        if fresh is None:
            continue
        for name in ("table", "runs", "run_tokens", "run_heads", "key_starts", "run_weights"):
            assert np.array_equal(getattr(before, name), getattr(fresh, name)), name
        assert fresh.base == base_of(q, selection, policy)
    assert n_same >= 20


def test_touched_pages():
    policy = LayerPolicy(
        stages=(Stage(chunk=8, keep=96),), sink=16, window=64, head_reduce="kv-group"
    )
    segments = plan_attend(1000, 24, selection_of([16, 40, 400], [24, 800]), policy, 16)
    touched = touched_pages(segments, 3, 64)
    assert touched.shape == (3, 64)
    segments = plan_attend(1000, 24, selection_of([16, 40, 400]), policy, 16)
    touched = touched_pages(segments, 3, 64)
    want = np.zeros((3, 64), dtype=bool)
    for segment in segments:
        want[:, [p for p in segment.pages[0] if p < 64]] = True
    assert np.array_equal(touched, want)


def test_a_pruning_policy_needs_a_selection():
    with pytest.raises(InternalError, match="no selection"):
        plan_attend(1000, 1, None, LayerPolicy(stages=(Stage(chunk=8, keep=96),)), 16)
