"""linear_rows: close to torch, and a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from longreach.kernels import reference
from longreach.kernels.ops import linear_rows


@pytest.mark.parametrize("n_in", [1, 15, 16, 64, 577, 1536])
@pytest.mark.parametrize("n_out", [1, 2, 3, 103, 1024])
def test_close_to_the_specification(path, n_in, n_out):
    x, w, bias = torch.randn(5, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
    for b in (None, bias):
        want = reference.linear(x.double(), w.double(), None if b is None else b.double())
        torch.testing.assert_close(linear_rows(x, w, b).double(), want, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 64), (103, 577), (1025, 576), (4099, 80)])
def test_a_row_has_the_same_bits_in_any_company(path, threads, shape):
    x, w, bias = torch.randn(19, shape[1]), torch.randn(shape), torch.randn(shape[0])
    threads(1)
    whole = linear_rows(x, w, bias)
    for n_threads in (1, 2, 3):
        threads(n_threads)
        for n_rows in range(1, 9):
            for first in (0, 3, 19 - n_rows):
                rows = x[first : first + n_rows]
                assert torch.equal(linear_rows(rows, w, bias), whole[first : first + n_rows])


def test_strided_and_empty_inputs(path):
    x, w = torch.randn(4, 64), torch.randn(64, 100)
    torch.testing.assert_close(linear_rows(x, w.T), x @ w, atol=1e-4, rtol=1e-5)
    assert linear_rows(torch.randn(0, 64), torch.randn(8, 64)).shape == (0, 8)
