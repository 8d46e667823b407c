"""Targets and losses of training, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from longreach.workers.train_capture import CELL
from longreach.workers.train_losses import (
    NEXT_TOKENS,
    QUERY_TOKENS,
    candidates,
    contrastive_loss,
    kl_loss,
    page_mass,
    recall,
)

N_TOKENS = 640


def test_candidates_ended_before_the_block_and_are_not_the_first_page() -> None:
    ends = torch.arange(127, N_TOKENS, 128)
    found = candidates(ends, torch.tensor([127, 319, 383, 639]))
    assert found.tolist() == [
        [False, False, False, False, False],
        [False, True, False, False, False],
        [False, True, False, False, False],
        [False, True, True, True, False],
    ]
    assert candidates(ends, torch.tensor([639]), window=256).tolist() == [
        [False, True, True, False, False]
    ]


@pytest.mark.parametrize("offset", [0, 48])
def test_page_mass_sums_the_tokens_it_says(offset: int) -> None:
    torch.manual_seed(0)
    shares = torch.rand(2, N_TOKENS, N_TOKENS).tril()
    n = N_TOKENS // CELL
    cells = shares.view(2, n, CELL, n, CELL).sum(dim=(2, 4))
    ends = torch.arange(offset + 127, N_TOKENS, 128)
    positions = torch.tensor([15, 207, 623, 639])
    block, after = page_mass(cells, ends, 128, positions)
    for i, position in enumerate(positions.tolist()):
        for j, end in enumerate(ends.tolist()):
            pages = shares[:, :, end - 127 : end + 1]
            first = max(0, position + 1 - QUERY_TOKENS)
            wanted = pages[:, first : position + 1].sum(dim=(1, 2))
            torch.testing.assert_close(block[:, i, j], wanted, rtol=1e-4, atol=1e-2)
            wanted = pages[:, position + 1 : position + 1 + NEXT_TOKENS].sum(dim=(1, 2))
            torch.testing.assert_close(after[:, i, j], wanted, rtol=1e-4, atol=1e-2)


def test_kl_is_zero_for_the_true_shares_only() -> None:
    torch.manual_seed(1)
    mass = torch.rand(3, 4, 6)
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[0], allowed[1, 3:] = False, False
    both = torch.stack((mass, mass * 5))
    assert kl_loss(mass.log(), both, allowed).abs().max() < 1e-6
    assert (kl_loss(-mass.log(), both, allowed) > 0.01).all()
    # without tokens after it, a query's block alone is the target
    assert kl_loss(mass.log(), torch.stack((mass, mass * 0)), allowed).abs().max() < 1e-6


def test_contrastive_is_the_share_of_the_gold_pages() -> None:
    torch.manual_seed(2)
    scores, others = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    allowed = torch.ones(3, 5, dtype=torch.bool)
    allowed[1, 0] = False
    gold = torch.zeros(3, 5, dtype=torch.bool)
    gold[0, 2] = gold[0, 4] = gold[1, 0] = gold[2, 1] = (
        True  # of the second the gold is no candidate
    )
    for layer, loss in enumerate(contrastive_loss(scores, gold, allowed, others)):
        terms = []
        for row, pages in ((0, [2, 4]), (2, [1])):
            e = scores[layer, row].exp()
            terms.append(-(e[pages].sum() / (e.sum() + others[layer, row].exp().sum())).log())
        torch.testing.assert_close(loss, torch.stack(terms).mean())
    none = contrastive_loss(scores.requires_grad_(), gold & False, allowed)
    assert none.tolist() == [0.0, 0.0]
    none.sum().backward()


def test_recall_of_the_best_pages() -> None:
    mass = torch.tensor([[9.0, 4, 3, 2, 1], [1, 0, 0, 0, 0]])
    allowed = torch.tensor([[False, True, True, True, True]]).expand(2, 5)
    scores = torch.tensor([[9.0, 1, 1, 5, 0]]).expand(2, 5)
    found = recall(scores, mass, allowed, 0.5)
    assert found[0] == pytest.approx((2 + 4) / 10)  # the tie goes to the lower page
    assert found[1].isnan()
    assert recall(mass, mass, allowed, 0.25)[0] == pytest.approx(0.4)
