"""New tokens into pages in Triton: the bytes of `append.append_torch`, in every format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longreach.kernels.append import append_torch
from longreach.kernels.gpu_pages import KIND, DevicePages
from longreach.kernels.paged import MOST_OF, RAW, stored_items

from .triton_attend_helpers import DEVICE, no_work

triton = pytest.importorskip("triton")

from longreach.kernels.triton_append import append_chunk_device, append_device  # noqa: E402

from .triton_compile import compile_for_gpu  # noqa: E402

pytestmark = pytest.mark.grid

FORMATS = [
    (torch.float32, 64, 64),
    (torch.float16, 80, 16),
    (torch.bfloat16, 128, 32),
    (torch.int8, 80, 128),
    (torch.float8_e4m3fn, 96, 64),
    (torch.uint8, 64, 16),
]


def empty_leaves(dtype: torch.dtype, head_dim: int, page_tokens: int) -> torch.Tensor:
    """32 leaves whose bytes nobody may touch but where a token goes."""
    n_bytes = stored_items(head_dim, dtype) * dtype.itemsize
    raw = torch.arange(32 * 2 * page_tokens * n_bytes, dtype=torch.int32).to(torch.uint8)
    return raw.view(32, 2, page_tokens, n_bytes).view(dtype).contiguous()


def pages_of(leaves: torch.Tensor, slots: torch.Tensor, pages: list[list[int]]) -> DevicePages:
    """slots: [Hkv, n_page_ids], leaf of every page."""
    n_bytes = leaves.shape[-1] * leaves.element_size()
    address = leaves.data_ptr() + slots * (2 * leaves.shape[2] * n_bytes)
    head_dim = {torch.uint8: 2 * (n_bytes - 4), torch.int8: n_bytes - 4}
    return DevicePages(
        address.to(DEVICE), torch.tensor(pages, dtype=torch.int32, device=DEVICE), leaves.shape[2],
        head_dim.get(leaves.dtype, leaves.shape[-1]), leaves.dtype, n_bytes, (leaves,),
    )  # fmt: skip


def some_numbers(n: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, D]: usual sizes, and rows of ties, tiny and large numbers, zeros."""
    x = torch.randn(n, head_dim) * torch.logspace(-3, 2, n)[:, None]
    x[0] = 0.0
    x[1] = (torch.arange(head_dim) - head_dim // 2) / 2  # ties of whole numbers
    x[2] = x[2].to(torch.bfloat16).float() * (1 + 2**-9)
    x[3] = torch.arange(head_dim) * 2.0**-11  # ties and steps of the smallest float8
    x[4] = torch.randn(head_dim) * 1e-40
    x[5] = torch.randn(head_dim) * 2e-6
    x[6] = 8.0 + torch.arange(head_dim) / 2  # ties of float8
    x[7] = x[7].half().float() * (1 + 2**-11)
    x[8, ::2] = -0.0
    x[9] = torch.linspace(-1, 1, head_dim) * MOST_OF[dtype]
    x[10, 3], x[10, 4] = MOST_OF[dtype], -MOST_OF[dtype]
    return x


@pytest.mark.parametrize(("dtype", "head_dim", "page_tokens"), FORMATS)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_per_row_has_the_bytes_of_torch(dtype, head_dim, page_tokens, given):
    """Rows before their last stored token and empty places store nothing."""
    n_rows, n_heads = 24, 2
    k, v = (
        some_numbers(n_rows * n_heads, head_dim, dtype)
        .clamp(-torch.finfo(given).max, torch.finfo(given).max)
        .view(n_heads, n_rows, head_dim).transpose(0, 1).to(given)
        for _ in range(2)
    )  # fmt: skip
    for x in (k, v):
        x[x.float().abs() > MOST_OF[dtype]] = 0.0  # what 16 bit rounded beyond the format
        if given == torch.bfloat16:  # the interpreter misreads the smallest ones
            x[x.float().abs() < 2.0**-126] = 0.0
    leaves = empty_leaves(dtype, head_dim, page_tokens).to(DEVICE)
    want = leaves.clone().cpu()
    slots = torch.randperm(32)[: n_heads * 16].view(n_heads, 16)
    # rows have pages 0 to 15; three of them share a page at other offsets
    position = torch.arange(n_rows) * (page_tokens // 8 + 1) % (2 * page_tokens)
    place = [[b % 8, 8 + b % 8] for b in range(n_rows)]
    position[5], n_existing = -1, torch.zeros(n_rows, dtype=torch.int64)
    n_existing[7] = position[7] + 1
    n_existing[8] = position[8]
    bad = torch.zeros(n_rows, dtype=torch.int32, device=DEVICE)
    pages = pages_of(leaves, slots, place)
    append_device(
        pages, position.to(DEVICE), k.to(DEVICE), v.to(DEVICE), n_existing.to(DEVICE), bad
    )
    for b in range(n_rows):
        if b in (5, 7):
            continue
        page = place[b][int(position[b]) // page_tokens]
        append_torch(
            want, slots[:, page : page + 1].numpy(), np.array([int(position[b]) % page_tokens]),
            k[b].float()[:, None], v[b].float()[:, None],
        )  # fmt: skip
    assert torch.equal(leaves.cpu().view(RAW[dtype]), want.view(RAW[dtype]))
    assert not bool(bad.any())


@pytest.mark.parametrize(("dtype", "head_dim", "page_tokens"), FORMATS)
@pytest.mark.parametrize(("start", "n_tokens"), [(0, 1), (13, 45), (60, 16)])
def test_a_chunk_has_the_bytes_of_torch(dtype, head_dim, page_tokens, start, n_tokens):
    """Of the second row; k and v as parts of wider tensors."""
    x = some_numbers(2 * 3 * n_tokens + 11, head_dim, dtype)[-2 * 3 * n_tokens :]
    k, v = x.view(2, n_tokens, 3, head_dim).permute(0, 2, 1, 3).to(DEVICE).unbind(0)
    leaves = empty_leaves(dtype, head_dim, page_tokens).to(DEVICE)
    want = leaves.clone().cpu()
    slots = torch.randperm(32)[: 3 * 8].view(3, 8)
    row = [7, 6, 1, 3, 0, 2, 5, 4]
    pages = pages_of(leaves, slots, [[0] * 8, row])
    bad = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    append_chunk_device(pages, 1, start, k, v, bad)
    token = torch.arange(start, start + n_tokens)
    at = slots[:, torch.tensor(row)[token // page_tokens]]
    append_torch(want, at.numpy(), (token % page_tokens).numpy(), k.cpu(), v.cpu())
    assert torch.equal(leaves.cpu().view(RAW[dtype]), want.view(RAW[dtype]))
    assert bad.tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "head_dim", "page_tokens"), FORMATS)
def test_numbers_that_are_not_finite_once_stored_are_told(dtype, head_dim, page_tokens):
    with np.errstate(over="ignore"):
        beyond = float(np.nextafter(np.float32(MOST_OF[dtype]), np.float32(np.inf)))
    values = [torch.nan, torch.inf, -torch.inf, beyond, MOST_OF[dtype], 1.0]
    n_rows = 2 * len(values)
    k, v = torch.randn(2, n_rows, 2, head_dim).unbind(0)
    for i, value in enumerate(values):
        k[2 * i, 1, 7] = value
        v[2 * i + 1, 0, head_dim - 1] = value
    leaves = empty_leaves(dtype, head_dim, page_tokens).to(DEVICE)
    want = leaves.clone().cpu()
    slots, position = torch.arange(32).view(2, 16), torch.full((n_rows,), 3)
    pages = pages_of(leaves, slots, [[b] for b in range(n_rows)])
    bad = torch.zeros(n_rows, dtype=torch.int32, device=DEVICE)
    bad[11] = 1  # never cleared
    none = torch.zeros(n_rows, dtype=torch.int64, device=DEVICE)
    append_device(pages, position.to(DEVICE), k.to(DEVICE), v.to(DEVICE), none, bad)
    # the largest float32 has nothing finite beyond it: `beyond` is infinite
    assert bad.tolist() == [1, 1] * 4 + [0, 0, 0, 1]
    for b in range(n_rows):
        append_torch(want, slots[:, b : b + 1].numpy(), np.array([3]), k[b, :, None], v[b, :, None])
    if dtype in (torch.int8, torch.uint8):
        # scales show what happened; the bits of a NaN are not promised
        got, want = leaves.cpu().view(torch.uint8), want.view(torch.uint8)
        assert torch.equal(got[..., :-4], want[..., :-4])
        got, want = (x[..., -4:].contiguous().view(torch.float32) for x in (got, want))
    else:
        got, want = leaves.cpu().float(), want.float()
    assert bool(((got == want) | (got.isnan() & want.isnan()))[:24].all())


@pytest.mark.parametrize(("dtype", "kind", "row_bytes"), [("bf16", 2, 256), ("fp8", 4, 128)])
@pytest.mark.parametrize("chunk", [False, True])
def test_the_kernels_compile_for_a_gpu(dtype, kind, row_bytes, chunk):
    """8B geometry: 8 KV heads, head dim 128."""
    pointers: dict[str, Any] = {
        "k": "*bf16", "v": "*bf16", "bad": "*i32", "address": "*i64", "pages": "*i32",
        "most": "fp32", "k_head": "i32:16", "v_head": "i32:16", "n_page_ids": "i32:16",
        "most_pages": "i32:16",
    }  # fmt: skip
    sizes = {
        "HALF": 64, "BLOCK_HALF": 64, "KIND": kind, "PAGE_TOKENS": 64, "ROW_BYTES": row_bytes,
        "k_item": 1, "v_item": 1,
    }  # fmt: skip
    if chunk:
        pointers |= {"row": "i32", "start": "i32", "n_tokens": "i32"}
        pointers |= {"k_token": "i32:16", "v_token": "i32:16"}
        sizes["TOKENS"] = 16
    else:
        pointers |= {"position": "*i64", "n_existing": "*i64", "k_row": "i32:16", "v_row": "i32:16"}
    made = compile_for_gpu(
        "longreach.kernels.triton_append",
        "append_chunk_kernel" if chunk else "append_kernel",
        pointers,
        sizes,
        num_warps=4 if chunk else 1,
    )
    print({name: value for name, value in made.items() if name != "ptx_lines"})  # noqa: T201
    assert made["shared"] <= 16 << 10
    assert made["n_spills"] == 0
    if chunk:
        assert any("st.global" in line and ".v" in line for line in made["ptx_lines"])


def test_a_step_neither_waits_nor_allocates(monkeypatch):
    leaves = empty_leaves(torch.bfloat16, 64, 16).to(DEVICE)
    pages = pages_of(leaves, torch.arange(32).view(2, 16), [[0, 1], [2, 3]])
    k, position = torch.randn(2, 2, 64, device=DEVICE), torch.tensor([3, 17], device=DEVICE)
    bad = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with no_work(monkeypatch):
        append_device(pages, position, k, k, position, bad)
    got = leaves[[0, 3], 0, [3, 1]].float()
    torch.testing.assert_close(got, k[:, 0], atol=0.0, rtol=2**-8)


def test_every_format_is_tested():
    assert {dtype for dtype, _, _ in FORMATS} == set(KIND)
