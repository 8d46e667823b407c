"""A block step equals the model's formulas, and a row's bits are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import cpu_block, cpu_block_book
from longreach.kernels.block_weights import AfterAttention, BeforeAttention, Norm, Product
from longreach.kernels.ops import BlockRows, BlockStep, warm_up


@dataclass(frozen=True)
class Sizes:
    hidden: int = 64
    n_gated: int = 100
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    bias: bool = False
    head_norms: bool = False


SIZES = [
    Sizes(),
    Sizes(hidden=577, n_gated=1003, n_heads=9, n_kv_heads=3, head_dim=64),
    Sizes(hidden=72, n_gated=7, n_heads=6, n_kv_heads=1, head_dim=24, bias=True),
    Sizes(hidden=80, n_gated=129, n_heads=3, n_kv_heads=3, head_dim=20, head_norms=True),
    Sizes(hidden=1100, n_gated=1650, n_heads=2, head_dim=128, bias=True, head_norms=True),
    Sizes(hidden=9, n_gated=17, n_heads=1, n_kv_heads=1, head_dim=2, bias=True, head_norms=True),
]


def product(n_out: int, n_in: int, bias: bool) -> Product:
    return Product(torch.randn(n_out, n_in) / n_in**0.5, torch.randn(n_out) if bias else None)


def norm(n: int, eps: float = 1e-5) -> Norm:
    return Norm(torch.rand(n) + 0.5, eps)


def weights(s: Sizes) -> tuple[AfterAttention, BeforeAttention]:
    width = s.n_heads * s.head_dim
    after = AfterAttention(
        product(s.hidden, width, s.bias),
        norm(s.hidden),
        product(2 * s.n_gated, s.hidden, s.bias),
        product(s.hidden, s.n_gated, s.bias),
    )
    before = BeforeAttention(
        norm(s.hidden, 1e-3),
        product(width + 2 * s.n_kv_heads * s.head_dim, s.hidden, s.bias),
        s.n_heads,
        s.n_kv_heads,
        s.head_dim,
        norm(s.head_dim, 1e-2) if s.head_norms else None,
        norm(s.head_dim, 1e-6) if s.head_norms else None,
    )
    return after, before


def linear_of(x: Tensor, p: Product) -> Tensor:
    return x @ p.weight.double().T + (0 if p.bias is None else p.bias.double())


def normed(x: Tensor, n: Norm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + n.eps).sqrt() * n.weight.double()


def expected(
    x: Tensor, attended: Tensor | None, after: AfterAttention | None, before: Any
) -> tuple[Tensor, Tensor]:
    """x and out in float64, by the formulas of the models."""
    x = x.double()
    if after is not None and attended is not None:
        x = x + linear_of(attended.double(), after.out)
        gate, up = linear_of(normed(x, after.norm), after.gate_up).chunk(2, dim=-1)
        x = x + linear_of(gate * gate.sigmoid() * up, after.down)
    if isinstance(before, Norm):
        return x, normed(x, before)
    out = linear_of(normed(x, before.norm), before.qkv)
    heads = out.view(len(x), -1, before.head_dim)
    q, k, v = heads.split([before.n_heads, before.n_kv_heads, before.n_kv_heads], dim=1)
    q = q if before.q_norm is None else normed(q, before.q_norm)
    k = k if before.k_norm is None else normed(k, before.k_norm)
    return x, torch.cat([q, k, v], dim=1).flatten(1)


def run(step: BlockStep, x: Tensor, attended: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """New x and out."""
    rows = BlockRows(len(x), [step])
    rows.x.copy_(x)
    out = rows.out_of(step).fill_(torch.nan)
    step.run(rows, attended)
    return rows.x, out


def inputs(s: Sizes, n_rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n_rows, s.hidden), torch.randn(n_rows, s.n_heads * s.head_dim)


@pytest.fixture(params=["one task", "many tasks"])
def tasks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also as large models are cut, whatever the size."""
    if request.param == "many tasks":
        monkeypatch.setattr(cpu_block_book, "TASK_BYTES", 1)
        monkeypatch.setattr(cpu_block, "SHARED_BYTES", 0)
    return str(request.param)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_step_equals_the_formulas(tasks, threads, sizes):
    threads(3)
    after, before = weights(sizes)
    x, attended = inputs(sizes, 5)
    for a, b in (
        (after, before),
        (None, before),
        (after, norm(sizes.hidden)),
        (None, norm(sizes.hidden)),
    ):
        given = None if a is None else attended
        got = run(BlockStep(a, b), x, given)
        for mine, want in zip(got, expected(x, given, a, b), strict=True):
            torch.testing.assert_close(mine.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(tasks, threads, sizes):
    after, before = weights(sizes)
    step = BlockStep(after, before)
    x, attended = inputs(sizes, 19)
    threads(1)
    alone = [run(step, x[i : i + 1], attended[i : i + 1]) for i in range(19)]
    whole = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    assert not torch.isnan(whole[1]).any()
    for n_threads in (1, 2, 3):
        threads(n_threads)
        for n_rows in (*range(1, 10), 17):
            for first in (0, 19 - n_rows):
                at = slice(first, first + n_rows)
                for got, want in zip(run(step, x[at], attended[at]), whole, strict=True):
                    assert torch.equal(got, want[at]), (n_threads, n_rows, first)


def test_rows_of_other_numbers_do_not_touch_a_row(threads):
    """NaN in x of one row, infinity in the attention of another."""
    threads(2)
    sizes = SIZES[1]
    step = BlockStep(*weights(sizes))
    x, attended = inputs(sizes, 6)
    want = run(step, x, attended)
    x[2], attended[4] = torch.nan, torch.inf
    got = run(step, x, attended)
    others = [0, 1, 3, 5]
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[others], theirs[others])
        assert torch.isnan(mine[[2, 4]]).all()


def test_gates_of_any_size_are_gated(threads):
    """silu far out: neither overflow nor a wrong tail."""
    threads(1)
    values = torch.tensor([-1e30, -200.0, -90.0, -20.0, -1.0, -1e-20, 0.0, 1e-20, 3.0, 200.0, 1e30])
    n = len(values)
    # the normed x is 1 in its first place, so gate i is value i; up is 1; down hands all on
    x, first = torch.zeros(1, 16), Norm(torch.full((16,), 0.25), 0.0)
    x[0, 0] = 0.25
    gate_up, down = torch.zeros(2 * n, 16), torch.zeros(16, n)
    gate_up[:n, 0], gate_up[n:, 0] = values, 1.0
    down[:n, :n] = torch.eye(n)
    after = AfterAttention(Product(torch.zeros(16, 16)), first, Product(gate_up), Product(down))
    got, _ = run(BlockStep(after, norm(16)), x, torch.zeros(1, 16))
    want = torch.nn.functional.silu(values.double())
    want[0] += 0.25
    torch.testing.assert_close(got[0, :n].double(), want, atol=1e-30, rtol=1e-6)


def test_several_steps_share_their_rows(threads):
    """As a model's do: x goes through, and each width of result has one buffer."""
    threads(2)
    sizes = SIZES[4]
    layers = [weights(sizes) for _ in range(3)]
    last = norm(sizes.hidden)
    steps = [
        BlockStep(None, layers[0][1]),
        BlockStep(layers[0][0], layers[1][1]),
        BlockStep(layers[1][0], last),
    ]
    x, attended = inputs(sizes, 3)
    rows, want = BlockRows(3, steps), x.double()
    rows.x.copy_(x)
    pairs = [(None, layers[0][1]), (layers[0][0], layers[1][1]), (layers[1][0], last)]
    for step, (after, before) in zip(steps, pairs, strict=True):
        given = None if after is None else attended
        step.run(rows, given)
        want, out = expected(want, given, after, before)
        torch.testing.assert_close(rows.x.double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(rows.out_of(step).double(), out, atol=2e-5, rtol=2e-5)
    assert rows.out_of(steps[0]) is rows.out_of(steps[1])


def test_no_tensor_is_read_that_does_not_fit():
    sizes = Sizes()
    after, before = weights(sizes)
    step = BlockStep(after, before)
    rows, (_, attended) = BlockRows(3, [step]), inputs(sizes, 3)
    for wrong in (attended[:2], attended[:, :-1], attended.double(), attended.T, None):
        with pytest.raises(ValueError, match=r"a block .*wants"):
            step.run(rows, wrong)
    for bad in (after.out.weight.T, after.out.weight.double(), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="block wants"):
            BlockStep(AfterAttention(Product(bad), after.norm, after.gate_up, after.down), before)


def test_the_warm_up_compiles_the_block(threads):
    threads(2)
    warm_up()
    before = len(cpu_block._worker.signatures)
    assert before
    sizes = SIZES[1]
    x, attended = inputs(sizes, 3)
    run(BlockStep(*weights(sizes)), x, attended)
    assert len(cpu_block._worker.signatures) == before
