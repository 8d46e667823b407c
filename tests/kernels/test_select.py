"""Selection on pages against the specification, and the rules it must keep."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import by_channel, cpu_top
from longreach.kernels import reference_select as reference
from longreach.kernels.ops import (
    PagedKV,
    Rope,
    Selection,
    candidate_end,
    select_blocks,
    summarise_pages,
)
from longreach.kernels.selection import reduce_heads, top_chunks

STYLES = ["chunk-indexed", "relative", "streaming", "none", "clamped"]


def lists(selection: Selection) -> list[list[int]]:
    for row, count in zip(selection.blocks.tolist(), selection.counts.tolist(), strict=True):
        assert all(b == -1 for b in row[count:])
        assert row[:count] == sorted(set(row[:count]))
        assert min(row[:count], default=0) >= 0
    return [[b for b in row if b >= 0] for row in selection.blocks.tolist()]


def policy_of(style: str, stages: tuple[Stage, ...], **more: Any) -> LayerPolicy:
    return LayerPolicy(stages=stages, **{"sink": 32, "window": 128, "select_rope": style, **more})


def chain(variant: str = "authors", scorer: str = "search") -> tuple[Stage, ...]:
    return (
        Stage(chunk=64, keep=512, query_stride=4, variant=variant, scorer=scorer),
        Stage(chunk=16, keep=256, query_stride=2, variant=variant),
        Stage(chunk=8, keep=96, variant=variant),
    )


_SPECIFIED: dict[bytes, Any] = {}
"""What the specification said: both paths ask for the same, and it is slow."""


def specified(
    q: torch.Tensor, q_start: int, k: torch.Tensor, policy: LayerPolicy, rope: Rope
) -> Any:
    asked = hashlib.sha256(f"{q_start} {policy} {rope.attention_scaling}".encode())
    for numbers in (q, k, rope.inv_freq):
        asked.update(f"{numbers.shape}".encode() + numbers.numpy().tobytes())
    if asked.digest() not in _SPECIFIED:
        _SPECIFIED[asked.digest()] = reference.select(q, q_start, k, policy, rope)
    return _SPECIFIED[asked.digest()]


def compare(
    q: torch.Tensor, q_start: int, k: torch.Tensor, view: PagedKV, policy: LayerPolicy, rope: Rope
) -> None:
    inputs, blocks = specified(q, q_start, k, policy, rope)
    got = select_blocks(q, q_start, view, policy, rope)
    assert lists(got) == blocks
    assert got.inputs[0] is None
    for mine, theirs in zip(got.inputs[1:], inputs[1:], strict=True):
        assert mine is not None
        assert [[b for b in row if b >= 0] for row in mine.tolist()] == theirs


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", ["paper", "authors"])
@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_search_equals_the_specification(path, paged, rope, style, variant, head_reduce):
    k, v = torch.randn(2, 2, 1500, 64).unbind(0)
    view, k, _ = paged(k, v, 64, n_memories=3)
    policy = policy_of(style, chain(variant), head_reduce=head_reduce)
    q_start = 1408
    compare(torch.randn(6, 64, 64), q_start, k, view, policy, rope(64))


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "page_tokens"),
    [
        (torch.float32, 1, 80, 16),
        (torch.float16, 2, 64, 32),
        (torch.bfloat16, 3, 128, 64),
        (torch.float16, 5, 96, 64),
        (torch.bfloat16, 8, 64, 128),
        (torch.int8, 3, 64, 64),
        (torch.float8_e4m3fn, 3, 80, 64),
        (torch.uint8, 3, 80, 64),
        (by_channel.DTYPE, 3, 64, 64),
        (by_channel.DTYPE, 2, 96, 128),
        (torch.float32, 4, 24, 64),  # a head size that the fast path leaves to torch
    ],
)
def test_formats_and_geometries(path, paged, rope, dtype, group, head_dim, page_tokens):
    k, v = torch.randn(2, 2, 1111, head_dim).unbind(0)
    view, k, _ = paged(k, v, page_tokens, dtype, n_memories=2)
    for style, n_queries in (("relative", 23), ("chunk-indexed", 1), ("none", 64)):
        q_start = 1111 - n_queries
        q = torch.randn(2 * group, n_queries, head_dim)
        compare(q, q_start, k, view, policy_of(style, chain()), rope(head_dim, 1.2))


@pytest.mark.parametrize("scorer", ["bounds", "mean"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize("reduce", ["max", "softmax"])
def test_summary_scorers_equal_the_specification(
    path, paged, rope, scorer, style, head_reduce, reduce
):
    k, v = torch.randn(2, 2, 1200, 32).unbind(0)
    view, k, _ = paged(k, v, 64)
    more = {"head_reduce": head_reduce, "reduce": reduce, "select_span": 400}
    policy = policy_of(style, chain(scorer=scorer), **more)
    for q_start, n_queries in ((1088, 64), (1190, 3), (1199, 1)):
        compare(torch.randn(4, n_queries, 32), q_start, k, view, policy, rope(32))


@pytest.mark.parametrize("scorer", ["search", "bounds"])
def test_a_finer_block_averages_fewer_queries(path, paged, rope, scorer):
    k, v = torch.randn(2, 2, 1500, 64).unbind(0)
    view, k, _ = paged(k, v, 64)
    policy, rotary = policy_of("relative", chain(scorer=scorer)), rope(64)
    q = torch.randn(6, 16, 64)
    _, want = reference.select(q, 1484, k, policy, rotary, query_block=16)
    assert lists(select_blocks(q, 1484, view, policy, rotary, query_block=16)) == want
    assert lists(select_blocks(q, 1484, view, policy, rotary)) != want


@pytest.mark.parametrize("n_queries", [64, 1])
@pytest.mark.parametrize("spread", [0.4, 0.05])
def test_spread_equals_the_specification(path, paged, rope, n_queries, spread):
    """From the keys, and from tables of float32."""
    k, v = torch.randn(2, 2, 1500, 64).unbind(0)
    view, k, _ = paged(k, v, 64)
    stages = [s.model_copy(update={"spread": spread}) for s in chain(scorer="bounds")]
    stages[2] = stages[2].model_copy(update={"scorer": "bounds"})
    policy = policy_of("clamped", tuple(stages), sink=64, select_span=300)
    q, q_start, rotary = torch.randn(6, n_queries, 64), 1500 - n_queries, rope(64)
    compare(q, q_start, k, view, policy, rotary)
    got = select_blocks(q, q_start, view, policy, rotary)
    ready = summarise_pages(view, policy)
    again = select_blocks(q, q_start, view, policy, rotary, summaries=ready)
    assert torch.equal(again.blocks, got.blocks)
    whole = policy.model_copy(update={"stages": chain(scorer="bounds")})
    assert not torch.equal(select_blocks(q, q_start, view, whole, rotary).blocks, got.blocks)


@pytest.mark.parametrize("variant", ["paper", "authors"])
@pytest.mark.parametrize("reduce", ["max", "softmax"])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.97, 1.0])
def test_top_p_and_softmax_equal_the_specification(path, paged, rope, variant, reduce, top_p):
    k, v = torch.randn(2, 2, 1500, 64).unbind(0)
    view, k, _ = paged(k, v, 64, torch.float16)
    for scorer, head_reduce in (("search", "all"), ("bounds", "kv-group"), ("search", "kv-group")):
        stages = chain(variant, scorer)
        stages = (*stages[:2], stages[2].model_copy(update={"top_p": top_p, "scorer": scorer}))
        policy = policy_of("clamped", stages, reduce=reduce, head_reduce=head_reduce)
        for q_start, n_queries in ((1408, 64), (1499, 1)):
            compare(3 * torch.randn(6, n_queries, 64), q_start, k, view, policy, rope(64))


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "page_tokens"),
    [
        (torch.float32, 1, 80, 64),
        (torch.float16, 2, 64, 32),
        (torch.bfloat16, 3, 128, 16),
        (torch.float16, 5, 96, 64),
        (torch.bfloat16, 8, 64, 128),
        (torch.int8, 7, 256, 64),
        (torch.uint8, 3, 80, 64),
        (torch.float8_e4m3fn, 2, 64, 64),
        (by_channel.DTYPE, 2, 96, 128),
        (torch.float32, 4, 24, 64),  # a head size that the fast path leaves to torch
    ],
)
@pytest.mark.parametrize("reduce", ["max", "softmax"])
def test_ready_summaries_select_what_the_keys_do(
    path, paged, rope, dtype, group, head_dim, page_tokens, reduce
):
    """Tables of whole chunks, shorter and longer than a page; the rest comes from the keys."""
    k, v = torch.randn(2, 2, 1111, head_dim).unbind(0)
    view, k, _ = paged(k, v, page_tokens, dtype, n_memories=2)
    chunks = (64, 16, 8)
    stages = tuple(
        Stage(chunk=c, keep=n, scorer=scorer)
        for c, n, scorer in zip(chunks, (512, 256, 96), ("mean", "bounds", "bounds"), strict=True)
    )
    for style, n_queries in (("relative", 23), ("chunk-indexed", 1), ("clamped", 64), ("none", 1)):
        policy = policy_of(style, stages, sink=64, reduce=reduce)
        n_pages = (1111 - n_queries) // page_tokens
        ready = summarise_pages(view, policy, n_pages)
        q_start = 1111 - n_queries
        q = torch.randn(2 * group, n_queries, head_dim)
        want = select_blocks(q, q_start, view, policy, rope(head_dim, 1.2))
        got = select_blocks(q, q_start, view, policy, rope(head_dim, 1.2), summaries=ready)
        if dtype.is_floating_point and dtype.itemsize > 1:  # bounds of others are kept in 16 bit
            assert torch.equal(got.blocks, want.blocks)
        if path == "numba" and head_dim % 16 == 0:
            # no key of a page with ready summaries is touched
            row = view.row.clone()
            row[:, : (candidate_end(q_start, policy) // 64 * 64) // page_tokens] = -1
            blind = replace(view, row=row)
            again = select_blocks(q, q_start, blind, policy, rope(head_dim, 1.2), summaries=ready)
            assert torch.equal(again.blocks, got.blocks)


def test_coarse_stage_scored_elsewhere(paged, rope):
    k, v = torch.randn(2, 2, 1200, 32).unbind(0)
    view, k, _ = paged(k, v, 64)
    policy = policy_of("relative", chain())
    q = torch.randn(4, 64, 32)
    whole = select_blocks(q, 1088, view, policy, rope(32))
    kept = torch.unique(whole.inputs[1][0] - (whole.inputs[1][0] - 32) % 64)
    again = select_blocks(q, 1088, view, policy, rope(32), coarse=kept)
    assert torch.equal(whole.blocks, again.blocks)


@pytest.mark.parametrize("q_start", [0, 1, 31, 64, 128, 159, 160, 161, 192, 200, 224, 320, 448])
@pytest.mark.parametrize("n_queries", [1, 7, 64])
def test_early_contexts(path, paged, rope, q_start, n_queries):
    n_tokens = q_start + n_queries
    k, v = torch.randn(2, 2, n_tokens, 32).unbind(0)
    view, k, _ = paged(k, v, 16)
    policy = policy_of("chunk-indexed", chain())
    compare(torch.randn(4, n_queries, 32), q_start, k, view, policy, rope(32))


@pytest.mark.parametrize("chunks", [(1,), (2, 1), (48, 12), (100, 20, 4), (7,)])
def test_odd_chunks_and_sinks(path, paged, rope, chunks):
    k, v = torch.randn(2, 1, 700, 32).unbind(0)
    view, k, _ = paged(k, v, 32)
    stages = tuple(
        Stage(chunk=c, keep=c * n, variant=variant)
        for c, n, variant in zip(chunks, (5, 7, 9), ("authors", "paper", "authors"), strict=False)
    )
    for sink in (0, 5, 33):
        policy = policy_of("streaming", stages, sink=sink, window=131)
        compare(torch.randn(2, 9, 32), 691, k, view, policy, rope(32))


def test_a_budget_beyond_the_context_keeps_all_without_reading(paged, rope):
    k = torch.full((2, 900, 32), torch.nan)  # scoring anything would show
    view, _, _ = paged(k, k)
    policy = policy_of("relative", (Stage(chunk=64, keep=1024), Stage(chunk=8, keep=1024)))
    got = lists(select_blocks(torch.randn(4, 64, 32), 832, view, policy, rope(32)))
    assert got == [list(range(32, 832 - 64, 8))]


def test_what_lies_in_the_block_or_after_it_never_matters(path, paged, rope):
    k, v = torch.randn(2, 2, 1300, 32).unbind(0)
    policy = policy_of("relative", chain())
    q = torch.randn(4, 64, 32)
    want = select_blocks(q, 1088, paged(k, v)[0], policy, rope(32))
    end = 1088 - (128 - 64)
    k[:, end:] = torch.nan
    got = select_blocks(q, 1088, paged(k, v, n_memories=2, seed=5)[0], policy, rope(32))
    assert torch.equal(got.blocks, want.blocks)


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_equal_scores_go_to_the_lower_index(path, paged, head_reduce):
    still = Rope(torch.zeros(16))  # no rotation: small integers stay exact
    k = torch.zeros(2, 1000, 32)
    view, k, _ = paged(k, k)
    policy = policy_of(
        "relative", (Stage(chunk=64, keep=192), Stage(chunk=8, keep=40)), head_reduce=head_reduce
    )
    got = lists(select_blocks(torch.ones(4, 5, 32), 995, view, policy, still))
    assert got == [[32, 40, 48, 56, 64]] * len(got)
    k[:, 400:480] = 1.0  # chunks 5 and 6 of the grid, equal and better than the rest
    k[:, 700:740] = 1.0
    view, k, _ = paged(k, k)
    q = torch.ones(4, 5, 32)
    _, want = reference.select(q, 995, k, policy, still)
    assert lists(select_blocks(q, 995, view, policy, still)) == want


def test_top_chunks_ties_and_padding():
    starts = torch.tensor([[0, 8, 16, 24, 32], [0, 8, 16, -1, -1]])
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0, -0.0, 5.0, 9.0, 9.0]])
    assert top_chunks(starts, scores, 3).tolist() == [[0, 8, 24], [0, 8, 16]]
    assert top_chunks(starts, scores, 2).tolist() == [[8, 24], [0, 16]]


@pytest.mark.parametrize("n_lists", [1, 3])
@pytest.mark.parametrize("n_chunks", [1, 2, 7, 500, 4096])
def test_compiled_top_chunks_equal_plain_ones(n_lists, n_chunks):
    """Ties, zeros of both signs, infinities, NaN and padding included."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(3, n_chunks, generator=generator)
        if seed % 2:
            scores = (scores * 2).round() / 2 * torch.tensor([[1.0], [-1.0], [1e-20]])
        odd = torch.rand(3, n_chunks, generator=generator)
        for i, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
            scores[(odd > 0.02 * i) & (odd < 0.02 * (i + 1))] = value
        starts = 8 * torch.arange(n_chunks).repeat(n_lists, 1)
        for i in range(n_lists):
            starts[i, n_chunks - (i * n_chunks) // 5 :] = -1
        for n_keep in (1, 2, n_chunks // 3 + 1, n_chunks, n_chunks + 5):
            reduced = reduce_heads(scores, "all" if n_lists == 1 else "kv-group")
            want = top_chunks(starts, reduced, n_keep)
            assert torch.equal(cpu_top.top_chunks(starts, scores, n_keep), want)


def test_reduce_heads():
    scores = torch.tensor([[2.0, 9.0], [3.0, 4.0]])
    assert reduce_heads(scores, "all").tolist() == [[3.0, 9.0]]
    assert reduce_heads(scores, "kv-group").tolist() == [[2.0, 9.0], [3.0, 4.0]]


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_cached_stages(path, paged, rope, head_reduce):
    k, v = torch.randn(2, 2, 1500, 32).unbind(0)
    view, k, _ = paged(k, v)
    policy = policy_of("chunk-indexed", chain(), head_reduce=head_reduce)
    q = torch.randn(4, 1, 32)
    first = select_blocks(q, 1400, view, policy, rope(32))
    assert select_blocks(q, 1450, view, policy, rope(32), first, level=3) is first
    for level in (0, 1, 2):
        again = select_blocks(q, 1400, view, policy, rope(32), first, level=level)
        assert torch.equal(again.blocks, first.blocks)
        assert torch.equal(again.counts, first.counts)
    # a later query on the cached input of a stage: the specification from the same lists
    later = torch.randn(4, 1, 32)
    inputs, _ = reference.select(q, 1400, k, policy, rope(32))
    for level in (1, 2):
        got = select_blocks(later, 1431, view, policy, rope(32), first, level=level)
        _, want = reference.select(later, 1431, k, policy, rope(32), inputs, level)
        assert lists(got) == want
        assert torch.equal(got.inputs[level], first.inputs[level])


@pytest.mark.parametrize("style", STYLES)
def test_a_planted_needle_is_found(path, paged, rope, style):
    """Every probe of the needle's chunk leads to it: its neighbourhood leans towards the query."""
    rotary = rope(64)
    k, v = torch.randn(2, 2, 4000, 64).unbind(0)
    q = torch.randn(4, 64, 64) * 0.1
    direction = torch.zeros(64)
    direction[31], direction[63] = 6.0, 3.0  # the slowest pair hardly turns
    q += direction
    k[:, 1000:1072] += 0.5 * direction  # hint
    k[:, 1032:1040] += 4.0 * direction  # needle
    view, k, _ = paged(k, v)
    stages = (Stage(chunk=64, keep=512, query_stride=4), Stage(chunk=8, keep=64))
    got = lists(select_blocks(q, 3904, view, policy_of(style, stages), rotary))
    assert 1032 in got[0]


def test_bits_depend_on_neither_memory_nor_threads(path, paged, rope, threads):
    k, v = torch.randn(2, 3, 2000, 64).unbind(0)
    policy = policy_of("relative", chain())
    q = torch.randn(9, 64, 64)
    results = []
    for n_memories, n_threads in ((1, 1), (3, 1), (3, 2), (2, 4)):
        threads(n_threads)
        view, _, _ = paged(k, v, n_memories=n_memories, seed=n_memories)
        results.append(select_blocks(q, 1920, view, policy, rope(64)))
    assert all(torch.equal(r.blocks, results[0].blocks) for r in results)


def test_wrong_calls_are_refused(path, paged, rope):
    k, v = torch.randn(2, 2, 900, 32).unbind(0)
    view, _, _ = paged(k, v)
    policy, rotary = policy_of("relative", chain()), rope(32)
    with pytest.raises(InternalError, match="dense policy"):
        select_blocks(torch.randn(4, 1, 32), 800, view, LayerPolicy(), rotary)
    with pytest.raises(InternalError, match="65 queries"):
        select_blocks(torch.randn(4, 65, 32), 800, view, policy, rotary)
    with pytest.raises(InternalError, match="only 900 tokens"):
        select_blocks(torch.randn(4, 64, 32), 896, view, policy, rotary)
    with pytest.raises(InternalError, match="cached selection"):
        select_blocks(torch.randn(4, 1, 32), 800, view, policy, rotary, level=1)
    view.row[1, 5] = -1
    with pytest.raises(InternalError, match="absent"):
        select_blocks(torch.randn(4, 1, 32), 899, view, policy, rotary)
