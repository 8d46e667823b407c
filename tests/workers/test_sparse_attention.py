"""Attention of groups over keys of their own: the plain softmax, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import reference
from longreach.kernels.ops import Rope
from longreach.workers.sparse_attention import GroupKeys, sparse_attention

N, PAGE, WINDOW = 300, 64, 70
SPANS = ((0, 64), (64, 128), (128, 150), (150, 192), (192, 256), (256, 300))
PAGES = ([], [], [], [64], [64], [64, 128])
"""Of the second group on, a page is left out where two are there to choose."""


@pytest.fixture(params=["streaming", "none"])
def policy(request: pytest.FixtureRequest) -> LayerPolicy:
    stage = Stage(scorer="mean", chunk=PAGE, keep=2 * PAGE)
    return LayerPolicy(sink=PAGE, window=WINDOW, attend_rope=request.param, stages=(stage,))


def made() -> tuple[Tensor, Tensor, Tensor, Rope]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, N, 16, generator=generator) for n in (6, 2, 2))
    return q, k, v, Rope(10_000.0 ** (-torch.arange(8) / 8), 1.2)


def groups(policy: LayerPolicy) -> list[GroupKeys]:
    found = []
    for (start, end), pages in zip(SPANS, PAGES, strict=True):
        found.append(
            GroupKeys(start, end, *reference.attended_keys(start, end - start, pages, policy))
        )
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, rope: Rope, policy: LayerPolicy) -> Tensor:
    """The specification, which autograd can follow."""
    parts = []
    for group in groups(policy):
        where = torch.arange(group.start, group.end) - group.base
        keys = rope.rotate(k[:, group.ids], group.positions - group.base)
        keys = keys.repeat_interleave(3, dim=0)
        logits = rope.rotate(q[:, group.start : group.end], where) @ keys.mT * 0.3
        shares = logits.masked_fill(~group.seen, -torch.inf).softmax(dim=-1)
        parts.append(shares @ v[:, group.ids].repeat_interleave(3, dim=0))
    return torch.cat(parts, dim=1)


def test_it_is_the_reference(policy: LayerPolicy) -> None:
    q, k, v, rope = made()
    found = sparse_attention(q, k, v, groups(policy), rope, 0.3)
    for (start, end), pages in zip(SPANS, PAGES, strict=True):
        wanted, _ = reference.sparse_attention(
            q[:, start:end], start, k, v, [pages], policy, rope, 0.3
        )
        torch.testing.assert_close(found[:, start:end], wanted, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_the_plain_form(policy: LayerPolicy) -> None:
    *heads, rope = made()
    weights = torch.randn(6, N, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for attend in (sparse_attention, plain):
        own = [x.clone().requires_grad_() for x in heads]
        rest = (groups(policy), rope, 0.3) if attend is sparse_attention else (rope, policy)
        (attend(*own, *rest) * weights).sum().backward()  # type: ignore[operator]
        gradients.append([x.grad for x in own])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
