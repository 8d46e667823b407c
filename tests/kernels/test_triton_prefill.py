"""Prefill attention in Triton against the specification, and its exactness rules (DESIGN 6)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import reference

from .triton_attend_helpers import (
    CASES,
    DEVICE,
    angles_of,
    device_pages,
    mask_of,
    policy_of,
    some_blocks,
)

triton = pytest.importorskip("triton")

from longreach.kernels.triton_prefill import attend_prefill  # noqa: E402

from .triton_compile import compile_for_gpu  # noqa: E402

pytestmark = pytest.mark.grid

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def starts_of(q_start: int, n_queries: int, query_block: int) -> list[int]:
    """Blocks aligned to absolute positions, and the end."""
    first = q_start // query_block * query_block + query_block
    return [q_start, *range(first, q_start + n_queries, query_block), q_start + n_queries]


def run(
    q: torch.Tensor, starts: list[int], pages: Any, row: int, lists: Any, policy: Any, rope: Any,
    query_block: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q [T, H, D] -> out [T, H, D], lse [T, H]; lists: per block and mask head."""
    q = q.to(DEVICE)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, device=DEVICE)
    mask = None if lists is None else mask_of(policy, lists, pages.n_kv_heads)
    attend_prefill(
        q, torch.tensor(starts, dtype=torch.int32, device=DEVICE), pages, row, mask, policy,
        angles_of(rope), q.shape[2] ** -0.5, out, query_block, "ieee", lse,
    )  # fmt: skip
    return out.cpu(), lse.cpu()


def check(out, lse, q, starts, k, v, lists, policy, rope) -> None:
    scale = q.shape[2] ** -0.5
    for m, (first, end) in enumerate(itertools.pairwise(starts)):
        block = slice(first - starts[0], end - starts[0])
        mine = q[block].transpose(0, 1)
        if policy.dense:
            want, want_lse = reference.dense_attention(mine, first, k, v, rope, scale)
        else:
            want, want_lse = reference.sparse_attention(
                mine, first, k, v, lists[m], policy, rope, scale
            )
        torch.testing.assert_close(out[block].transpose(0, 1), want, **CLOSE)
        torch.testing.assert_close(lse[block].T, want_lse, **CLOSE)


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
@pytest.mark.parametrize(
    ("case", "query_block"), list(enumerate([64, 32, 64, 16, 16, 16, 32, 64, 32]))
)
def test_blocks_equal_the_specification(paged, rope, attend_rope, case, query_block):
    """A whole block, parts of blocks before and behind it; the second of two rows. The same bits alone."""
    dtype, group, head_dim, page_tokens = CASES[case]
    head_reduce = "all" if (case % 2 == 0) == (attend_rope == "none") else "kv-group"
    policy = policy_of(attend_rope=attend_rope, head_reduce=head_reduce)
    rotary, n_lists = rope(head_dim, 1.1), 1 if head_reduce == "all" else 2
    starts = [1405, 1408, 1408 + query_block, 1408 + query_block + 5]
    k, v = torch.randn(2, 2, starts[-1], head_dim).unbind(0)
    view, k, v = paged(k, v, page_tokens, dtype, n_memories=2)
    other, _, _ = paged(*torch.randn(2, 2, 40, head_dim).unbind(0), page_tokens, dtype)
    lists = [some_blocks(first, policy, n_lists, 17 - m) for m, first in enumerate(starts[:-1])]
    q = torch.randn(starts[-1] - starts[0], 2 * group, head_dim)
    pages = device_pages(other, view)
    out, lse = run(q, starts, pages, 1, lists, policy, rotary, query_block)
    check(out, lse, q, starts, k, v, lists, policy, rotary)
    # a block alone has the same bits
    rows = slice(starts[1] - starts[0], starts[2] - starts[0])
    alone, _ = run(
        q[rows], starts[1:3], device_pages(view), 0, lists[1:2], policy, rotary, query_block
    )
    assert torch.equal(alone, out[rows])


@pytest.mark.parametrize(("case", "query_block"), [(0, 64), (1, 32), (2, 16), (6, 32), (7, 64)])
def test_dense_blocks_equal_the_specification(paged, rope, case, query_block):
    dtype, group, head_dim, page_tokens = CASES[case]
    k, v = torch.randn(2, 2, 205, head_dim).unbind(0)
    view, k, v = paged(k, v, page_tokens, dtype)
    policy, rotary, starts = LayerPolicy(sink=0, window=0), rope(head_dim, 1.1), [128, 192, 205]
    if query_block < 64:
        starts = starts_of(128, 77, query_block)
    q = torch.randn(77, 2 * group, head_dim)
    out, lse = run(q, starts, device_pages(view), 0, None, policy, rotary, query_block)
    check(out, lse, q, starts, k, v, None, policy, rotary)


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
def test_early_contexts_equal_dense(paged, rope, attend_rope):
    """A whole prompt shorter than sink + window + budget: everything is attended, in any style."""
    policy, rotary = policy_of((Stage(chunk=64, keep=512),), attend_rope=attend_rope), rope(32)
    k, v = torch.randn(2, 1, 449, 32).unbind(0)
    view, k, v = paged(k, v, 16)
    starts = starts_of(0, 449, 64)
    q = torch.randn(449, 2, 32)
    lists = [
        [reference.select(torch.randn(2, 1, 32), first, k, policy, rotary)[1][0]]
        for first in starts[:-1]
    ]
    out, lse = run(q, starts, device_pages(view), 0, lists, policy, rotary)
    want, want_lse = reference.dense_attention(q.transpose(0, 1), 0, k, v, rotary, 32**-0.5)
    torch.testing.assert_close(out.transpose(0, 1), want, **CLOSE)
    torch.testing.assert_close(lse.T, want_lse, **CLOSE)


@pytest.mark.parametrize(
    ("sink", "window", "chunk", "keep"),
    [(0, 64, 8, 72), (5, 131, 16, 160), (200, 64, 64, 128), (64, 0, 128, 384), (0, 300, 4, 20)],
)
def test_other_sinks_windows_and_blocks(paged, rope, sink, window, chunk, keep):
    k, v = torch.randn(2, 2, 1340, 64).unbind(0)
    view, k, v = paged(k, v, 32)
    rotary, starts = rope(64), [1280, 1333, 1340]
    for attend_rope in ("streaming", "none"):
        policy = policy_of(
            (Stage(chunk=chunk, keep=keep),), sink=sink, window=max(window, chunk),
            attend_rope=attend_rope,
        ).model_copy(update={"window": window})  # fmt: skip
        lists = [some_blocks(first, policy, 1, keep // chunk) for first in starts[:-1]]
        q = torch.randn(60, 6, 64)
        out, lse = run(q, starts, device_pages(view), 0, lists, policy, rotary)
        check(out, lse, q, starts, k, v, lists, policy, rotary)


def test_blocks_of_no_queries_and_queries_that_see_nothing(paged, rope):
    k, v = torch.randn(2, 1, 128, 64).unbind(0)
    view, k, v = paged(k, v)
    policy = policy_of((Stage(chunk=8, keep=64),), sink=4, window=8)
    policy = policy.model_copy(update={"sink": 0, "window": 0})
    q = torch.randn(20, 3, 64)
    out, lse = run(q, [108, 108, 128], device_pages(view), 0, [[[]], [[]]], policy, rope(64), 32)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


def test_nan_keys_are_not_hidden(paged, rope):
    k, v = torch.randn(2, 2, 512, 64).unbind(0)
    v[0, 505, 3] = torch.nan
    view, _, _ = paged(k, v)
    q, starts = torch.randn(64, 4, 64), [448, 512]
    out, _ = run(q, starts, device_pages(view), 0, [[[32, 48]]], policy_of(), rope(64))
    assert bool(out[57:, :2, 3].isnan().all())
    assert not bool(out[:, 2:].isnan().any())


def test_queries_of_16_bit_and_any_strides(paged, rope):
    """q and out as parts of larger tensors."""
    k, v = torch.randn(2, 2, 512, 64).unbind(0)
    view, k, v = paged(k, v, 64, torch.float16)
    policy, rotary = policy_of(), rope(64)
    lists = [some_blocks(448, policy, 1, 17)]
    q = torch.randn(64, 6, 3, 64).half().to(DEVICE)[:, :, 1]
    out = torch.zeros(64, 9, 64, dtype=torch.float16, device=DEVICE)[:, :6]
    attend_prefill(
        q, torch.tensor([448, 512], dtype=torch.int32, device=DEVICE), device_pages(view), 0,
        mask_of(policy, lists, 2), policy, angles_of(rotary), 0.125, out, precision="ieee",
    )  # fmt: skip
    mine = q.float().cpu().transpose(0, 1)
    want, _ = reference.sparse_attention(mine, 448, k, v, lists[0], policy, rotary, 0.125)
    torch.testing.assert_close(out.float().cpu().transpose(0, 1), want, atol=2e-3, rtol=2e-3)


def test_what_does_not_fit_is_refused(paged, rope):
    k, v = torch.randn(2, 2, 100, 64).unbind(0)
    view, _, _ = paged(k, v)
    q, pages = torch.randn(8, 4, 64), device_pages(view)
    with pytest.raises(ValueError, match="query_block"):
        run(q, [92, 100], pages, 0, [[[]]], policy_of(), rope(64), 8)
    with pytest.raises(ValueError, match="needs a mask"):
        run(q, [92, 100], pages, 0, None, policy_of(), rope(64))


@pytest.mark.parametrize(("dtype", "kind", "row_bytes"), [("bf16", 2, 256), ("fp8", 4, 128)])
@pytest.mark.parametrize("dense", [False, True])
def test_the_kernel_compiles_for_a_gpu(dtype, kind, row_bytes, dense):
    """8B geometry: 32 query heads, 8 KV heads, head dim 128: two heads of 64 queries in a program."""
    pointers = {
        "q": "*bf16", "starts": "*i32", "address": "*i64", "pages": "*i32", "row": "i32",
        "out": "*bf16", "fine_cos": "*fp32", "fine_sin": "*fp32", "coarse_cos": "*fp32",
        "coarse_sin": "*fp32", "to_log2": "fp32", "q_row": "i32:16", "q_head": "i32:16",
        "out_row": "i32:16", "out_head": "i32:16", "n_heads": "i32:16", "n_page_ids": "i32:16",
        "most_pages": "i32:16", "block_row": "i32:16", "block_list": "i32:16",
    }  # fmt: skip
    sizes = {
        "GROUP": 4, "HEADS": 2, "QUERIES": 64, "HALF": 64, "BLOCK_HALF": 64, "KIND": kind,
        "PAGE_TOKENS": 64, "ROW_BYTES": row_bytes, "SINK": 256, "WINDOW": 1024, "BLOCK": 8,
        "KEEP": 2048, "LISTS": 1, "STREAMING": True, "DENSE": dense, "PRECISION": "tf32x3",
        "lse": None,
    }  # fmt: skip
    if dense:
        sizes |= {"blocks": None, "n_blocks": None}
    else:
        pointers |= {"blocks": "*i32", "n_blocks": "*i32"}
    made = compile_for_gpu(
        "longreach.kernels.triton_prefill",
        "prefill_kernel",
        pointers,
        sizes,
        num_warps=8,
        num_stages=1,
    )
    print({name: value for name, value in made.items() if name != "ptx_lines"})  # noqa: T201
    assert made["shared"] <= 200 << 10
    assert made["n_spills"] <= 64
    assert any("ld.global" in line and ".v4" in line for line in made["ptx_lines"])
