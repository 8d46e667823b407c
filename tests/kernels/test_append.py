"""Storing keys and values: rounded once, to the same bits as torch, and nothing hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longreach.kernels import append
from longreach.kernels.append import RAW, append_tokens, append_torch
from longreach.kernels.paged import pack, stored_items, unpack

FLOAT8, INT4 = torch.float8_e4m3fn, torch.uint8
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, FLOAT8, INT4]


def empty(dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    return torch.zeros(12, 2, 16, stored_items(head_dim, dtype), dtype=dtype)


def place(n_heads: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    token = np.arange(n_tokens) + 5
    slots = np.arange(n_heads)[:, None] * 3 + token[None] // 16
    return slots, token % 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_both_paths_store_the_same_bits(dtype, head_dim):
    assert append.cpu_append is not None
    most = 2 if dtype == FLOAT8 else 4  # powers of ten
    k, v = (torch.randn(2, 4, 30, head_dim) * torch.logspace(-6, most, 30)[:, None]).unbind(0)
    k[0, 3], v[1, 4] = 0.0, -0.0
    slots, offsets = place(4, 30)
    one, two = empty(dtype, head_dim), empty(dtype, head_dim)
    # k as the model hands it over: not contiguous
    k_view = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert append_tokens(one, slots, offsets, k_view, v) == -1
    assert append_torch(two, slots, offsets, k, v) == -1
    assert torch.equal(one.view(RAW[dtype]), two.view(RAW[dtype]))
    row = one[slots[2, 7], 1, offsets[7]]
    want = unpack(pack(v[2, 7], dtype))
    got = unpack(row)
    assert torch.equal(got, want)


def test_halfway_cases_round_to_even():
    for dtype, step in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        x = 1.0 + step * torch.arange(16)
        k = x.expand(1, 1, 16)
        leaves = empty(dtype, 16)
        append_tokens(leaves, np.array([[0]]), np.array([0]), k, k)
        assert torch.equal(leaves[0, 0, 0], x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_the_first_bad_token_is_named_and_others_are_stored(dtype, bad, side):
    kv = torch.randn(2, 3, 20, 16)
    kv[side, 1, 11, 3] = bad
    kv[side, 2, 17, 0] = bad
    slots, offsets = place(3, 20)
    for store in (append_tokens, append_torch):
        leaves = empty(dtype, 16)
        assert store(leaves, slots, offsets, kv[0], kv[1]) == 11
        good = leaves[slots[0, 12], side, offsets[12]]
        assert good.view(RAW[dtype]).any()


def test_numbers_beyond_float16_are_bad_there_alone():
    k = torch.full((1, 2, 16), 65504.0)
    k[0, 1, 5] = 70000.0
    for dtype, wrong in zip(DTYPES, (-1, 1, -1, -1, 0, -1), strict=True):
        for store in (append_tokens, append_torch):
            assert store(empty(dtype, 16), *place(1, 2), k, k) == wrong


def test_float8_rounds_as_torch_does_everywhere():
    codes = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((between, between * (1 + 2.0**-20), between * (1 - 2.0**-20), codes))
    x = torch.cat((near, -near, torch.randn(4096) * 1e-2))
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(1, -1, 16)
    leaves = torch.zeros(-(-x.shape[1] // 16), 2, 16, 16, dtype=FLOAT8)
    token = np.arange(x.shape[1])
    assert append_tokens(leaves, token[None] // 16, token % 16, x, x) == -1
    stored = leaves[:, 0].reshape(-1, 16)[: x.shape[1]]
    assert torch.equal(stored.view(torch.uint8), x[0].to(FLOAT8).view(torch.uint8))


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (INT4, 7)])
def test_the_error_of_whole_numbers_is_half_a_step(dtype, most):
    x = torch.randn(50, 64)
    step = x.abs().amax(dim=1, keepdim=True) / most
    assert bool(((unpack(pack(x, dtype)) - x).abs() <= 0.5001 * step).all())
