"""Decode attention in Triton against the specification, and its exactness rules (DESIGN 6)."""

from __future__ import annotations

import builtins
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import reference
from longreach.kernels.gpu_pages import DeviceScratch
from longreach.kernels.ops import PagedKV

from .triton_attend_helpers import (
    CASES,
    DEVICE,
    angles_of,
    device_pages,
    mask_of,
    no_work,
    policy_of,
    some_blocks,
)

triton = pytest.importorskip("triton")

from longreach.kernels import triton_attend  # noqa: E402
from longreach.kernels.triton_attend import attend_decode, splits_of  # noqa: E402

from .triton_compile import compile_for_gpu  # noqa: E402

pytestmark = pytest.mark.grid

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def run(
    q: torch.Tensor,
    positions: list[int],
    pages: Any,
    lists: Any,
    policy: Any,
    rope: Any,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, D] -> out [B, H, D], lse [B, H]; lists: per row and mask head, None for a dense policy."""
    q = q.to(DEVICE)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, device=DEVICE)
    mask = None if lists is None else mask_of(policy, lists, pages.n_kv_heads)
    scratch = more.pop("scratch", None) or DeviceScratch(DEVICE)
    attend_decode(
        q, torch.tensor(positions, device=DEVICE), pages, mask, policy, angles_of(rope),
        q.shape[2] ** -0.5, out, scratch, precision="ieee", lse=lse, **more,
    )  # fmt: skip
    return out.cpu(), lse.cpu()


def wanted(q, p, k, v, lists, policy, rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row: q [H, D] -> out [H, D], lse [H]."""
    scale = q.shape[1] ** -0.5
    if policy.dense:
        out, lse = reference.dense_attention(q[:, None], p, k, v, rope, scale)
    else:
        out, lse = reference.sparse_attention(q[:, None], p, k, v, lists, policy, rope, scale)
    return out[:, 0], lse[:, 0]


@pytest.mark.parametrize("attend_rope", ["streaming", "none"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rows_equal_the_specification(paged, rope, attend_rope, case):
    """Rows of two lengths and an empty place between them; the same bits alone."""
    dtype, group, head_dim, page_tokens = CASES[case]
    head_reduce = "all" if (case % 2 == 0) == (attend_rope == "none") else "kv-group"
    policy = policy_of(attend_rope=attend_rope, head_reduce=head_reduce)
    rotary, n_lists = rope(head_dim, 1.1), 1 if head_reduce == "all" else 2
    positions, views, lists, kept = [1409, -1, 700], [], [], []
    for seed, (p, n_most) in enumerate(zip(positions, (17, 0, 11), strict=True)):
        k, v = torch.randn(2, 2, max(p, 0) + 1, head_dim).unbind(0)
        view, k, v = paged(k, v, page_tokens, dtype, n_memories=2, seed=seed)
        views.append(view)
        kept.append((k, v))
        lists.append(some_blocks(p, policy, n_lists, n_most))
    q = torch.randn(3, 2 * group, head_dim)
    out, lse = run(q, positions, device_pages(*views), lists, policy, rotary)
    assert bool((out[1] == 0).all())
    assert bool((lse[1] == -torch.inf).all())
    for b in (0, 2):
        want, want_lse = wanted(q[b], positions[b], *kept[b], lists[b], policy, rotary)
        torch.testing.assert_close(out[b], want, **CLOSE)
        torch.testing.assert_close(lse[b], want_lse, **CLOSE)
    alone, alone_lse = run(q[2:], [700], device_pages(views[2]), lists[2:], policy, rotary)
    assert torch.equal(alone[0], out[2])
    assert torch.equal(alone_lse[0], lse[2])


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "page_tokens"), [CASES[i] for i in (0, 1, 2, 6, 7)]
)
def test_dense_rows_equal_the_specification(
    monkeypatch, paged, rope, dtype, group, head_dim, page_tokens
):
    monkeypatch.setattr(triton_attend, "MOST_SPLITS", 3)
    policy, rotary = LayerPolicy(sink=0, window=0), rope(head_dim, 1.1)
    positions, views, kept = [413, 63, -1, 0], [], []
    for p in positions:
        k, v = torch.randn(2, 2, max(p, 0) + 1, head_dim).unbind(0)
        view, k, v = paged(k, v, page_tokens, dtype)
        views.append(view)
        kept.append((k, v))
    q = torch.randn(4, 2 * group, head_dim)
    out, lse = run(q, positions, device_pages(*views), None, policy, rotary)
    assert bool((out[2] == 0).all())
    for b in (0, 1, 3):
        want, want_lse = wanted(q[b], positions[b], *kept[b], None, policy, rotary)
        torch.testing.assert_close(out[b], want, **CLOSE)
        torch.testing.assert_close(lse[b], want_lse, **CLOSE)
    alone, _ = run(q[:1], positions[:1], device_pages(views[0]), None, policy, rotary)
    assert torch.equal(alone[0], out[0])


@pytest.mark.parametrize(("attend_rope", "most_splits"), [("streaming", 2), ("none", 32)])
def test_early_contexts_equal_dense(monkeypatch, paged, rope, attend_rope, most_splits):
    """Shorter than sink + window + budget: everything is attended, in any style."""
    monkeypatch.setattr(triton_attend, "MOST_SPLITS", most_splits)
    policy, rotary = policy_of((Stage(chunk=64, keep=512),), attend_rope=attend_rope), rope(32)
    positions = [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 159, 160, 161, 230, 448]
    k, v = torch.randn(2, 1, 449, 32).unbind(0)
    view, k, v = paged(k, v, 16)
    lists = [
        [reference.select(torch.randn(2, 1, 32), p, k, policy, rotary)[1][0]] for p in positions
    ]
    q = torch.randn(len(positions), 2, 32)
    pages = device_pages(*[view] * len(positions))
    out, lse = run(q, positions, pages, lists, policy, rotary)
    for b, p in enumerate(positions):
        want, want_lse = reference.dense_attention(q[b, :, None], p, k, v, rotary, 32**-0.5)
        torch.testing.assert_close(out[b], want[:, 0], **CLOSE)
        torch.testing.assert_close(lse[b], want_lse[:, 0], **CLOSE)


@pytest.mark.parametrize(
    ("sink", "window", "chunk", "keep"),
    [(0, 64, 8, 72), (5, 131, 16, 160), (200, 64, 64, 128), (64, 0, 128, 384), (0, 300, 4, 20)],
)
def test_other_sinks_windows_and_blocks(monkeypatch, paged, rope, sink, window, chunk, keep):
    """Parts that end within a tile, blocks larger than a tile, no window; several tiles in a split, and
    heads merged two at a time."""
    monkeypatch.setattr(triton_attend, "MOST_SPLITS", 3)
    monkeypatch.setattr(triton_attend, "MERGE_FLOATS", 256)
    k, v = torch.randn(2, 2, 1334, 64).unbind(0)
    view, k, v = paged(k, v, 32)
    stages = (Stage(chunk=chunk, keep=keep),)
    rotary, positions = rope(64), [1333, 640]
    for attend_rope in ("streaming", "none"):
        # no window is outside what a policy of such blocks may have
        policy = policy_of(stages, sink=sink, window=max(window, chunk), attend_rope=attend_rope)
        policy = policy.model_copy(update={"window": window})
        lists = [some_blocks(p, policy, 1, keep // chunk) for p in positions]
        q = torch.randn(2, 6, 64)
        out, lse = run(q, positions, device_pages(view, view), lists, policy, rotary)
        for b, p in enumerate(positions):
            want, want_lse = wanted(q[b], p, k, v, lists[b], policy, rotary)
            torch.testing.assert_close(out[b], want, **CLOSE)
            torch.testing.assert_close(lse[b], want_lse, **CLOSE)


def test_a_row_that_sees_nothing(paged, rope):
    k, v = torch.randn(2, 1, 100, 64).unbind(0)
    view, _, _ = paged(k, v, 32)
    policy = policy_of((Stage(chunk=8, keep=64),), sink=0, window=8)
    policy = policy.model_copy(update={"window": 0})
    out, lse = run(torch.randn(1, 3, 64), [99], device_pages(view), [[[]]], policy, rope(64))
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


def test_either_merge_and_any_order_give_the_same_bits(monkeypatch, paged, rope):
    k, v = torch.randn(2, 2, 900, 96).unbind(0)
    view, _, _ = paged(k, v)
    policy, rotary, positions = policy_of(), rope(96), [899, -1, 300]
    q, pages = torch.randn(3, 10, 96), device_pages(view, view, view)
    lists = [some_blocks(p, policy, 1, 17) for p in positions]
    scratch = DeviceScratch(DEVICE)
    made = [
        run(q, positions, pages, lists, policy, rotary, merge=merge, scratch=scratch)
        for merge in ("launch", "second", "launch")
    ]
    if DEVICE == "cpu":
        backwards = lambda *args: reversed(builtins.range(*args))  # noqa: E731
        monkeypatch.setattr("triton.runtime.interpreter.range", backwards, raising=False)
        made.append(run(q, positions, pages, lists, policy, rotary, scratch=scratch))
    for out, lse in made[1:]:
        assert torch.equal(out, made[0][0])
        assert torch.equal(lse, made[0][1])
    assert not bool(scratch.buffers["attend_arrived"].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_16_bit_and_any_strides(paged, rope, dtype):
    """q and out as parts of larger tensors; out rounds once."""
    k, v = torch.randn(2, 2, 500, 64).unbind(0)
    view, k, v = paged(k, v, 64, dtype)
    policy, rotary = policy_of(), rope(64)
    lists = [some_blocks(499, policy, 1, 17)]
    wide = torch.randn(1, 6, 3, 64).to(dtype).to(DEVICE)
    q, out = wide[:, :, 1], torch.zeros(2, 1, 9, 64, dtype=dtype, device=DEVICE)[1, :, :6]
    attend_decode(
        q, torch.tensor([499], device=DEVICE), device_pages(view), mask_of(policy, lists, 2),
        policy, angles_of(rotary), 0.125, out, DeviceScratch(DEVICE), precision="ieee",
    )  # fmt: skip
    want, _ = wanted(q[0].float().cpu(), 499, k, v, lists[0], policy, rotary)
    # the interpreter cuts bfloat16 off where a GPU rounds it
    close = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(out[0].float().cpu(), want, **close)


def test_nan_keys_are_not_hidden(paged, rope):
    k, v = torch.randn(2, 2, 512, 64).unbind(0)
    k[0, 505] = torch.nan
    view, _, _ = paged(k, v)
    policy, lists = policy_of(), [[[32, 48]]]
    out, lse = run(torch.randn(1, 4, 64), [511], device_pages(view), lists, policy, rope(64))
    assert bool(out[0, :2].isnan().all())
    assert bool(lse[0, :2].isnan().all())
    assert not bool(out[0, 2:].isnan().any())
    out, _ = run(torch.randn(1, 4, 64), [504], device_pages(view), lists, policy, rope(64))
    assert not bool(out.isnan().any())


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is not touched")
def test_addresses_and_page_ids_are_of_64_bits(paged, rope):
    """Leaves more than 4 GiB apart, and a table of addresses with ids far apart."""
    k, v = torch.randn(2, 2, 200, 64).unbind(0)
    view, k, v = paged(k, v, 64)
    leaf_bytes = 2 * 64 * view.row_bytes
    n_leaves = (6 << 30) // leaf_bytes
    no_reserve = 0x4000  # of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(
        mmap.mmap(-1, n_leaves * leaf_bytes, flags=flags), dtype=torch.float32
    )
    memory = memory.view(n_leaves, 2, 64, 64)
    row = torch.linspace(0, n_leaves - 1, view.row.numel()).long().view_as(view.row)
    for here, there in zip(view.row.flatten().tolist(), row.flatten().tolist(), strict=True):
        memory[there] = view.memories[0][here]
    far = device_pages(PagedKV((memory,), view.memory, row, 64, 200))
    step = 5_000_000
    address = torch.frombuffer(mmap.mmap(-1, 2 * 4 * step * 8, flags=flags), dtype=torch.int64)
    address = address.view(2, 4 * step)
    address[:, ::step] = far.address
    far = replace(far, address=address, pages=far.pages * step)
    policy, rotary, q = policy_of(), rope(64), torch.randn(1, 4, 64)
    lists = [some_blocks(199, policy, 1, 17)]
    out, _ = run(q, [199], far, lists, policy, rotary)
    want, _ = run(q, [199], device_pages(view), lists, policy, rotary)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dense", [False, True])
def test_a_second_call_neither_waits_nor_allocates(monkeypatch, paged, rope, dense):
    k, v = torch.randn(2, 2, 300, 64).unbind(0)
    view, _, _ = paged(k, v)
    policy = LayerPolicy(sink=0, window=0) if dense else policy_of()
    pages, angles, scratch = device_pages(view, view), angles_of(rope(64)), DeviceScratch(DEVICE)
    lists = [some_blocks(p, policy_of(), 1, 17) for p in (299, 200)]
    mask = None if dense else mask_of(policy, lists, 2)
    q, position = torch.randn(2, 6, 64, device=DEVICE), torch.tensor([299, 200], device=DEVICE)
    first, second = torch.zeros_like(q), torch.zeros_like(q)
    lse = torch.zeros(2, 6, device=DEVICE)
    for merge in ("launch", "second"):
        attend_decode(q, position, pages, mask, policy, angles, 0.125, first, scratch)
        with no_work(monkeypatch):
            attend_decode(
                q,
                position,
                pages,
                mask,
                policy,
                angles,
                0.125,
                second,
                scratch,
                merge=merge,
                lse=lse,
            )
        assert torch.equal(first, second)


def test_what_does_not_fit_is_refused(paged, rope):
    k, v = torch.randn(2, 2, 100, 64).unbind(0)
    view, _, _ = paged(k, v)
    q, pages = torch.randn(1, 4, 64), device_pages(view)
    with pytest.raises(ValueError, match="needs a mask"):
        run(q, [99], pages, None, policy_of(), rope(64))
    mask = mask_of(policy_of(), [[[]]], 2)
    small = policy_of((Stage(chunk=8, keep=64),))
    with pytest.raises(ValueError, match="room for 17 blocks"):
        attend_decode(
            q,
            torch.tensor([99]),
            pages,
            mask,
            small,
            angles_of(rope(64)),
            1.0,
            q,
            DeviceScratch(DEVICE),
        )


def test_splits_fill_the_multiprocessors_about_twice():
    stages = (Stage(chunk=256, keep=32768), Stage(chunk=32, keep=8192), Stage(chunk=8, keep=2048))
    assert splits_of(LayerPolicy(stages=stages)) == (27, 2)
    wide = (Stage(chunk=64, keep=32768), Stage(chunk=16, keep=4096))
    assert splits_of(LayerPolicy(stages=wide)) == (29, 3)
    assert splits_of(LayerPolicy()) == (32, 0)


@pytest.mark.parametrize(("dtype", "kind", "row_bytes"), [("bf16", 2, 256), ("fp8", 4, 128)])
@pytest.mark.parametrize("dense", [False, True])
def test_the_kernel_compiles_for_a_gpu(dtype, kind, row_bytes, dense):
    """8B geometry: 32 query heads, 8 KV heads, head dim 128."""
    pointers = {
        "q": "*bf16", "position": "*i64", "address": "*i64", "pages": "*i32", "partial": "*fp32",
        "top": "*fp32", "arrived": "*i32", "out": "*bf16", "fine_cos": "*fp32", "fine_sin": "*fp32",
        "coarse_cos": "*fp32", "coarse_sin": "*fp32", "to_log2": "fp32", "q_row": "i32:16",
        "q_head": "i32:16", "out_row": "i32:16", "out_head": "i32:16", "n_page_ids": "i32:16",
        "most_pages": "i32:16", "block_row": "i32:16", "block_list": "i32:16",
    }  # fmt: skip
    sizes = {
        "GROUP": 4, "ROWS": 16, "HALF": 64, "BLOCK_HALF": 64, "KIND": kind, "PAGE_TOKENS": 64,
        "ROW_BYTES": row_bytes, "SINK": 256, "WINDOW": 1024, "BLOCK": 8, "KEEP": 2048, "LISTS": 1,
        "STREAMING": True, "DENSE": dense, "N_SPLITS": 32 if dense else 27, "TILES": 2,
        "BLOCK_SPLITS": 32, "MERGE_HEADS": 4, "MERGE": True, "PRECISION": "tf32x3", "lse": None,
    }  # fmt: skip
    if dense:
        sizes |= {"blocks": None, "n_blocks": None}
    else:
        pointers |= {"blocks": "*i32", "n_blocks": "*i32"}
    made = compile_for_gpu(
        "longreach.kernels.triton_attend",
        "decode_kernel",
        pointers,
        sizes,
        num_warps=4,
        num_stages=1,
    )
    print({name: value for name, value in made.items() if name != "ptx_lines"})  # noqa: T201
    assert made["shared"] <= 100 << 10  # two programs on a multiprocessor
    assert made["n_spills"] <= 192
    assert any("ld.global" in line and ".v4" in line for line in made["ptx_lines"])
