"""Pages chosen by bookmarks: against the plain statement of it, exact where numbers are whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import bookmark, cpu_bookmark
from longreach.kernels.bookmark import choose_pages, page_scores, summed_products, whole_pages
from longreach.kernels.ops import PagedKV, Rope, select_blocks
from longreach.workers.bookmarks import bookmark_scores

PAGE = 128


def policy_of(keep: int, **more) -> LayerPolicy:
    top_p = more.pop("top_p", None)
    stage = Stage(scorer="bookmark", chunk=PAGE, keep=keep * PAGE, top_p=top_p)
    return LayerPolicy(**{"sink": PAGE, "window": 2 * PAGE, "stages": (stage,), **more})


def whole_numbers(n_pages: int, n_heads: int, n_kv_heads: int, dim: int, seed: int):
    """Of which any order of adding gives the same bits."""
    rng = np.random.default_rng(seed)
    query = torch.from_numpy(rng.integers(-3, 4, (n_heads, dim)).astype(np.float32))
    return query, rng.integers(-3, 4, (n_pages, n_kv_heads, dim)).astype(np.float32)


@given(st.integers(1, 20), st.sampled_from([(4, 2, 16), (9, 3, 5), (2, 2, 7), (6, 1, 8)]))
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_scores_are_inner_products_summed_over_heads(
    per_kv_head: bool, n_pages: int, shape: tuple[int, int, int]
) -> None:
    query, keys = whole_numbers(n_pages, *shape, seed=n_pages)
    got = page_scores(query, keys, per_kv_head=per_kv_head)
    want = bookmark_scores(query[None], torch.from_numpy(keys), per_kv_head=per_kv_head)
    torch.testing.assert_close(got.reshape(-1), want.reshape(-1), rtol=1e-6, atol=1e-6)


def test_a_score_does_not_depend_on_the_other_pages() -> None:
    rng = np.random.default_rng(0)
    query = torch.from_numpy(rng.standard_normal((9, 64)).astype(np.float32))
    keys = rng.standard_normal((300, 3, 64)).astype(np.float32)
    for per_kv_head in (False, True):
        whole = page_scores(query, keys, per_kv_head=per_kv_head)
        for first, last in [(0, 1), (17, 19), (100, 300)]:
            part = page_scores(query, keys[first:last], per_kv_head=per_kv_head)
            assert torch.equal(part, whole[:, first:last])


@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize(
    ("n_pages", "n_heads", "n_kv_heads", "dim"),
    [
        (0, 4, 2, 16),
        (1, 9, 3, 64),
        (2049, 9, 3, 64),
        (70, 5, 5, 80),
        (300, 14, 2, 7),
        (40, 8, 1, 1),
    ],
)
def test_compiled_code_gives_the_bits_of_numpy(
    n_pages: int, n_heads: int, n_kv_heads: int, dim: int, per_kv_head: bool
) -> None:
    rng = np.random.default_rng(n_pages)
    summed = rng.standard_normal((n_kv_heads, dim)).astype(np.float32)
    table = rng.standard_normal((n_pages + 5, n_kv_heads, dim)).astype(np.float32)
    slots = rng.permutation(n_pages + 5)[:n_pages]
    table[np.setdiff1d(np.arange(n_pages + 5), slots)] = np.nan
    want = summed_products(summed, table, slots, per_kv_head=per_kv_head)
    got = cpu_bookmark.summed_products(summed, table, slots, per_kv_head=per_kv_head)
    assert got.tobytes() == want.tobytes()
    query = torch.from_numpy(rng.standard_normal((n_heads, dim)).astype(np.float32))
    placed = page_scores(query, table, per_kv_head=per_kv_head, slots=slots)
    assert torch.equal(placed, page_scores(query, table[slots], per_kv_head=per_kv_head))
    assert bool(placed.isfinite().all())


@pytest.mark.parametrize("top_p", [None, 0.7])
@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_without_numba_the_same_pages_are_chosen(
    monkeypatch: pytest.MonkeyPatch, head_reduce: str, top_p: float | None
) -> None:
    policy, q_start = policy_of(6, head_reduce=head_reduce, top_p=top_p), 70 * PAGE
    n = len(whole_pages(q_start, policy))
    rng = np.random.default_rng(1)
    query = torch.from_numpy(rng.standard_normal((4, 8)).astype(np.float32))
    keys = rng.standard_normal((n, 2, 8)).astype(np.float32)
    got = choose_pages(query, keys, q_start, policy, 0.3, 0.2)
    for name in ("cpu_bookmark", "cpu_top"):
        monkeypatch.setattr(bookmark, name, None)
    assert torch.equal(choose_pages(query, keys, q_start, policy, 0.3, 0.2), got)


@given(st.integers(0, 3000), st.integers(128, 700), st.integers(0, 3))
def test_candidates_are_whole_pages_between_sinks_and_window(
    q_start: int, window: int, n_sinks: int
) -> None:
    """And no token is missed: what is no candidate is a sink, or in the window of the whole block."""
    q_start = q_start // 64 * 64
    policy = policy_of(1, sink=n_sinks * PAGE, window=window)
    starts = list(whole_pages(q_start, policy))
    assert all(start % PAGE == 0 and start + PAGE <= q_start for start in starts)
    assert starts == list(range(n_sinks * PAGE, n_sinks * PAGE + len(starts) * PAGE, PAGE))
    seen = max(n_sinks * PAGE, n_sinks * PAGE + len(starts) * PAGE)
    last_query = q_start + 63
    assert seen > last_query - window or seen >= q_start


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize("keep", [1, 3, 7, 100])
def test_the_best_pages_are_chosen_and_ties_go_to_the_lower(head_reduce: str, keep: int) -> None:
    policy = policy_of(keep, head_reduce=head_reduce)
    q_start = 20 * PAGE + 64
    pages = list(whole_pages(q_start, policy))
    for seed in range(20):
        query, keys = whole_numbers(len(pages), 4, 2, 3, seed)
        keys[5] = keys[2]
        scores = page_scores(query, keys, per_kv_head=head_reduce == "kv-group")
        assert len(set(scores[0].tolist())) < len(pages)  # there are ties
        got = choose_pages(query, keys, q_start, policy)
        for mine, row in zip(got.tolist(), scores.tolist(), strict=True):
            ranked = sorted(range(len(pages)), key=lambda i: (-row[i], i))[:keep]
            assert mine == sorted(pages[i] for i in ranked)


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_a_page_twice_as_far_away_loses_by_nearness(head_reduce: str) -> None:
    policy, q_start = policy_of(5, head_reduce=head_reduce), 40 * PAGE + 64
    pages = list(whole_pages(q_start, policy))
    query, keys = whole_numbers(len(pages), 4, 2, 3, seed=3)
    scores = page_scores(query, keys, per_kv_head=head_reduce == "kv-group")
    distances = torch.tensor([(q_start - start) / PAGE for start in pages])
    far = int(distances.argmax())
    for log_scale, nearness in [(0.0, 0.7), (-1.0, 0.7), (2.0, 0.1), (0.0, -3.0), (-3.0, 50.0)]:
        wanted = scores * math.exp(log_scale) - nearness * distances.log2()
        got = choose_pages(query, keys, q_start, policy, log_scale, nearness)
        for mine, row in zip(got, wanted, strict=True):
            assert mine.tolist() == sorted(pages[i] for i in row.topk(5).indices)
    nearest = choose_pages(query, keys, q_start, policy, -3.0, 50.0)[0].tolist()
    assert nearest == pages[-5:]
    assert pages[far] in choose_pages(query, keys, q_start, policy, 0.0, -50.0)[0].tolist()


def test_of_equal_pages_without_nearness_the_lower_wins() -> None:
    policy, q_start = policy_of(5), 40 * PAGE
    pages = list(whole_pages(q_start, policy))
    query, keys = torch.ones(4, 3), np.ones((len(pages), 2, 3), np.float32)
    assert choose_pages(query, keys, q_start, policy)[0].tolist() == pages[:5]
    assert choose_pages(query, keys, q_start, policy, 0.0, 1e-3)[0].tolist() == pages[-5:]


def test_top_p_ends_with_the_page_that_reaches_it() -> None:
    query, keys = whole_numbers(18, 4, 2, 16, seed=1)
    q_start = 20 * PAGE
    for top_p, log_scale in [(0.5, 0.0), (0.9, 0.0), (0.9, -2.0), (1.0, 0.0)]:
        policy = policy_of(12, top_p=top_p)
        got = choose_pages(query, keys, q_start, policy, log_scale)[0].tolist()
        pages = list(whole_pages(q_start, policy))
        scores = page_scores(query, keys[: len(pages)], per_kv_head=False)[0]
        shares = (scores * math.exp(log_scale)).softmax(dim=0).double()
        ranked = sorted(range(len(pages)), key=lambda i: (-float(scores[i]), i))[:12]
        n = next((n for n in range(1, 12) if float(shares[ranked[:n]].sum()) >= top_p), 12)
        assert got == sorted(pages[i] for i in ranked[:n])


def test_selection_needs_the_chosen_pages_and_goes_on_from_them() -> None:
    later = Stage(scorer="search", chunk=8, keep=64)
    policy = policy_of(2).model_copy(update={"stages": (policy_of(2).stages[0], later)})
    n_pages, dim = 8, 16
    torch.manual_seed(0)
    leaves = torch.randn(n_pages, 2, PAGE, dim)
    row = torch.arange(n_pages)[None]
    view = PagedKV((leaves,), torch.zeros_like(row), row, PAGE, n_pages * PAGE)
    q, rope = torch.randn(2, 64, dim), Rope(torch.ones(dim // 2))
    with pytest.raises(InternalError, match="chosen by bookmarks"):
        select_blocks(q, 7 * PAGE, view, policy, rope)
    coarse = torch.tensor([[2 * PAGE, 4 * PAGE]])
    blocks = select_blocks(q, 7 * PAGE, view, policy, rope, coarse=coarse).blocks
    assert blocks.shape == (1, 8)
    assert set((blocks // PAGE).flatten().tolist()) <= {2, 4}
