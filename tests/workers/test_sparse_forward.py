"""The forward over retrieved pages: dense where everything is read, the engine's attention for the same
pages, and blind to whatever comes later, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longreach.core.stage import DENSE
from longreach.kernels.ops import PagedKV, Selection, attend_block
from longreach.workers.bookmark_file import shape_for
from longreach.workers.bookmarks import Bookmarks, run_bookmarks
from longreach.workers.lora import add_lora
from longreach.workers.model import ModelAdapter
from longreach.workers.post_run import decoder_of
from longreach.workers.post_training import PostPlan, by_layer, policies_for
from longreach.workers.sparse_forward import Groups, SparseForward, groups_of

from .tiny import KINDS, VOCAB, hf_logits, make_tiny

PAGE, N_TOKENS, N_LAYERS = 64, 700, 4
PLAN = PostPlan(budget=320, window=96, dense_layers="0")


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_tiny(request.param, folder, num_hidden_layers=N_LAYERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=N_LAYERS)


def text(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(seed))


def forward_of(directory: Path, plan: PostPlan = PLAN) -> SparseForward:
    decoder = decoder_of(directory)
    torch.manual_seed(0)
    bookmarks = Bookmarks(shape_for(decoder.model.config, PAGE, 8))
    for parameter in bookmarks.parameters():
        parameter.data.normal_(std=0.2)
    bookmarks.requires_grad_(False)
    policies = by_layer(policies_for(plan, PAGE), len(decoder.layers))
    return SparseForward(decoder, bookmarks, policies)


def read(
    forward: SparseForward, token_ids: Tensor, cuts: Sequence[int] = ()
) -> tuple[Tensor, dict[tuple[int, int], list[int]], Groups]:
    """Logits, what was chosen, and for whom."""
    groups = groups_of(len(token_ids), PAGE, cuts)
    chosen: dict[tuple[int, int], list[int]] = {}
    with torch.no_grad():
        logits = forward.logits(forward.hidden(token_ids, groups, chosen))
    return logits, chosen, groups


@pytest.mark.parametrize("dense_layers", ["0", ""])
def test_a_budget_for_everything_gives_the_dense_model(directory: Path, dense_layers: str) -> None:
    plan = PostPlan(budget=1024, window=96, dense_layers=dense_layers)
    forward, token_ids = forward_of(directory, plan), text()
    logits, _, groups = read(forward, token_ids, cuts=(300, 645))
    wanted = hf_logits(directory, token_ids.tolist())
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    losses = forward.losses(forward.hidden(token_ids, groups, {}), token_ids)
    expected = torch.nn.functional.cross_entropy(wanted[:-1], token_ids[1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    far, *_ = read(forward_of(directory), token_ids)
    assert float((far - wanted).abs().max()) > 0.1  # a small budget is noticed


@dataclass
class EngineStep:
    """The engine's attention kernels for given pages, in blocks of the same queries."""

    forward: SparseForward
    chosen: dict[tuple[int, int], list[int]]
    groups: Groups

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        policy = self.forward.policies[layer]
        parts = []
        for group, (start, end) in enumerate(self.groups.spans):
            selection = None
            if not policy.dense:
                blocks = torch.tensor([self.chosen[layer, group]], dtype=torch.int64)
                selection = Selection((None,), blocks, torch.tensor([blocks.shape[1]]))
            for at in range(start, end, 64):
                queries = q[:, at : min(at + 64, end)]
                view = paged(k[:, :end], v[:, :end])
                rope = self.forward.decoder.rope
                out, _ = attend_block(queries, at, view, selection, policy, rope, scale)
                parts.append(out.transpose(0, 1))
        return torch.cat(parts)


def paged(k: Tensor, v: Tensor) -> PagedKV:
    n_kv_heads, n_tokens, dim = k.shape
    n_pages = -(-n_tokens // PAGE)
    padded = torch.zeros(2, n_kv_heads, n_pages * PAGE, dim)
    padded[:, :, :n_tokens] = torch.stack((k, v))
    leaves = padded.unflatten(2, (n_pages, PAGE)).permute(1, 2, 0, 3, 4).flatten(0, 1)
    row = torch.arange(n_kv_heads * n_pages).view(n_kv_heads, n_pages)
    return PagedKV((leaves.contiguous(),), torch.zeros_like(row), row, PAGE, n_tokens)


def test_the_same_pages_give_what_the_engine_computes(directory: Path) -> None:
    forward, token_ids = forward_of(directory), text()
    logits, chosen, groups = read(forward, token_ids, cuts=(645,))
    assert any(
        len(chosen[1, group]) * PAGE + PAGE + 96 < end - PAGE
        for group, (_, end) in enumerate(groups.spans)
    )  # something was left out
    model = ModelAdapter(directory)
    step = EngineStep(forward, chosen, groups)
    wanted = model.logits(model.hidden(token_ids, step, decode=False))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_pages_are_chosen_by_the_bookmark_before_the_group(llama: Path) -> None:
    """By `run_bookmarks` over the keys and values that this very forward made, at any start."""
    forward, token_ids = forward_of(llama), text()
    _, chosen, groups = read(forward, token_ids, cuts=(645,))
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    whole = forward._sparse

    def spy(i: int, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        kept[i] = (k, v)
        return whole(i, q, k, v, *rest)  # type: ignore[arg-type]

    forward._sparse = spy  # type: ignore[method-assign]
    dense = forward._dense
    forward._dense = lambda q, k, v, scale: (kept.setdefault(0, (k, v)), dense(q, k, v, scale))[1]  # type: ignore[method-assign]
    read(forward, token_ids, cuts=(645,))
    ids = groups.positions[:, None] + torch.arange(1 - PAGE, 1)
    assert int(ids.min()) >= 0

    def pages(layer: int) -> tuple[Tensor, Tensor]:
        k, v = kept[layer]
        return k[:, ids].transpose(0, 1), v[:, ids].transpose(0, 1)

    n_seen = torch.full((len(groups.positions),), PAGE)
    with torch.no_grad():
        states = run_bookmarks(
            forward.bookmarks, forward.decoder.layers, forward.decoder.rope, pages, n_seen
        )
    pruned = 0
    for (layer, group), found in chosen.items():
        start = groups.spans[group][0]
        wanted = plainly(forward, layer, states.queries[layer], states.keys[layer], groups, group)
        assert found == wanted, (layer, start)
        pruned += len(found) < len(candidates(start))
    assert pruned > N_LAYERS


def candidates(start: int) -> list[int]:
    """Pages after the first that end before the group and are not wholly inside its window."""
    return [p for p in range(PAGE, start // PAGE * PAGE, PAGE) if p < start - (96 - PAGE)]


def plainly(
    forward: SparseForward, layer: int, q: Tensor, k: Tensor, groups: Groups, group: int
) -> list[int]:
    start = groups.spans[group][0]
    pages = candidates(start)
    row = groups.asking[group]
    summed = q[row].unflatten(0, (k.shape[1], -1)).sum(dim=1)
    content = torch.stack([(summed * k[page // PAGE]).sum() for page in pages] or [torch.zeros(())])
    content = content / (q.shape[1] * q.shape[2] ** 0.5)
    away = torch.tensor([(start - page) / PAGE for page in pages] or [1.0])
    rank = content * forward.bookmarks.log_scale[layer].exp()
    rank = rank - forward.bookmarks.nearness[layer] * away.log2()
    n_keep = (320 - PAGE - 96) // PAGE
    best = rank.argsort(descending=True)[:n_keep].tolist() if pages else []
    return sorted(pages[i] for i in best)


# --- nothing leaks --------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [255, 256, 400, 646])
def test_a_later_token_changes_no_earlier_bit(llama: Path, changed: int) -> None:
    """Neither a logit nor a gradient of the tokens before it."""
    forward = forward_of(llama)
    torch.manual_seed(1)
    learned = add_lora(forward.decoder.layers, 4, 8.0)
    for parameter in learned.values():
        parameter.data.normal_(std=0.1)
    groups = groups_of(N_TOKENS, PAGE, (645,))
    found = []
    for seed in (None, 1, 2):
        token_ids = text()
        if seed is not None:
            token_ids[changed:] = text(seed)[changed:]
        for parameter in learned.values():
            parameter.grad = None
        hidden = forward.hidden(token_ids, groups, {})
        losses = forward.losses(hidden, token_ids)
        losses[: changed - 1].sum().backward()  # of the tokens up to changed - 1
        gradients = [parameter.grad for parameter in learned.values()]
        assert any(bool(grad.abs().max() > 1e-4) for grad in gradients if grad is not None)
        found.append((forward.logits(hidden[:changed]).detach(), gradients, losses[changed:]))
    for logits, gradients, later in found[1:]:
        assert torch.equal(logits, found[0][0])
        for grad, wanted in zip(gradients, found[0][1], strict=True):
            assert (grad is None) == (wanted is None)
            assert grad is None or torch.equal(grad, wanted)
        assert not torch.equal(later, found[0][2])


def test_gradients_are_those_of_a_forward_kept_whole(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers computed again for their gradients read the pages that were chosen the first time."""
    forward, token_ids, groups = forward_of(llama), text(), groups_of(N_TOKENS, PAGE)
    learned = add_lora(forward.decoder.layers, 4, 8.0)
    for parameter in learned.values():
        parameter.data.normal_(std=0.1)

    def gradients() -> list[Tensor]:
        for parameter in learned.values():
            parameter.grad = None
        forward.losses(forward.hidden(token_ids, groups, {}), token_ids).mean().backward()
        return [p.grad.clone() for p in learned.values() if p.grad is not None]

    again = gradients()
    monkeypatch.setattr(
        "longreach.workers.sparse_forward.checkpoint", lambda f, *args, **_: f(*args)
    )
    for grad, wanted in zip(again, gradients(), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_a_dense_policy_is_dense(llama: Path) -> None:
    forward, token_ids = forward_of(llama), text()
    dense = SparseForward(forward.decoder, forward.bookmarks, [DENSE] * N_LAYERS)
    logits, chosen, _ = read(dense, token_ids)
    torch.testing.assert_close(logits, hf_logits(llama, token_ids.tolist()), rtol=1e-4, atol=1e-4)
    assert not chosen


def test_policies_say_what_the_budget_buys() -> None:
    dense, sparse = policies_for(PostPlan(), 128)
    assert dense.dense
    assert (dense.layers, sparse.layers) == ("0-1", "rest")
    assert (sparse.sink, sparse.window, sparse.stages[0].keep) == (128, 256, 1664)
    assert sparse.by_bookmark
