"""Reading pages, and rotary positions."""

from __future__ import annotations

import pytest
import torch

from longreach.core.errors import InternalError
from longreach.kernels.ops import Rope, gather_blocks, gather_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_tokens", [8, 16, 64])
def test_gather(paged, dtype, page_tokens):
    k, v = torch.randn(2, 3, 333, 24).unbind(0)
    view, k, v = paged(k, v, page_tokens, dtype, n_memories=3)
    ids = torch.randint(0, 333, (50,))
    assert torch.equal(gather_tokens(view, ids), k[:, ids])
    assert torch.equal(gather_tokens(view, ids, "v"), v[:, ids])
    per_head = torch.randint(0, 333, (3, 50))
    want = torch.stack([v[h, per_head[h]] for h in range(3)])
    assert torch.equal(gather_tokens(view, per_head, "v"), want)
    # padding and slots beyond the context are zeros, never what lies there
    got = gather_blocks(view, torch.tensor([8, 330, -1]), 8)
    assert torch.equal(got[:, :8], k[:, 8:16])
    assert torch.equal(got[:, 8:11], k[:, 330:])
    assert bool((got[:, 11:] == 0).all())


def test_an_absent_page_is_an_error(paged):
    k, v = torch.randn(2, 2, 100, 16).unbind(0)
    view, _, _ = paged(k, v, 16)
    view.row[1, 3] = -1
    assert bool(torch.isfinite(gather_tokens(view, torch.arange(48))).all())
    with pytest.raises(InternalError, match="absent"):
        gather_tokens(view, torch.arange(49))


def test_rotation_is_complex_multiplication_of_paired_halves():
    rope = Rope(torch.tensor([1.0, 0.3, 0.01]), attention_scaling=1.5)
    x = torch.randn(2, 5, 6)
    positions = torch.tensor([0, 1, -4, 1000, 77])
    z = torch.complex(x[..., :3], x[..., 3:]).to(torch.complex128)
    turn = torch.exp(1j * positions[:, None].double() * rope.inv_freq.double())
    want = z * turn * 1.5
    got = rope.rotate(x, positions)
    torch.testing.assert_close(got[..., :3].double(), want.real, atol=3e-4, rtol=0)
    torch.testing.assert_close(got[..., 3:].double(), want.imag, atol=3e-4, rtol=0)
    torch.testing.assert_close(rope.rotate(x, 7), rope.rotate(x, torch.full((5,), 7)))


def test_the_table_has_the_bits_of_single_positions(rope):
    rotary = rope(64, 1.1)
    rotary.table(10)
    cos, sin = rotary.table(3000)
    one_cos, one_sin = rotary.cos_sin(torch.arange(cos.shape[0]))
    assert cos.shape[0] >= 3000
    assert torch.equal(cos, one_cos)
    assert torch.equal(sin, one_sin)
    with pytest.raises(ValueError, match="exceed the table limit"):
        rotary.table(1 << 30)
