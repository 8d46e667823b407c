"""Bookmarks: a token of the model's own at a page's end, which sees that page and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.bookmark import choose_pages, whole_pages
from longreach.workers.bookmark_file import shape_for
from longreach.workers.bookmarks import Bookmarks, bookmark_scores, project, run_bookmarks
from longreach.workers.model import ModelAdapter
from longreach.workers.train_capture import MassStep
from longreach.workers.train_losses import page_distances

from .tiny import VOCAB, make_tiny

PAGE = 32


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelAdapter:
    return ModelAdapter(directory, own_kernels=False)


def random_bookmarks(model: ModelAdapter, rank: int | None = 4) -> Bookmarks:
    torch.manual_seed(1)
    made = Bookmarks(shape_for(model.config, PAGE, rank))
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return made.requires_grad_(False)


def keys_values(model: ModelAdapter, token_ids: torch.Tensor) -> torch.Tensor:
    """[L, 2, Hkv, T, D] float32 of dense attention."""
    shape = (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim)
    step = MassStep(model.rope, shape, len(token_ids), full=True)
    step.kv, step.keys = step.kv.float(), step.keys.float()
    model.hidden(token_ids, step, decode=False)
    return torch.stack((step.keys, step.kv[:, 1]), dim=1)


def run(model: ModelAdapter, bookmarks: Bookmarks, kv: torch.Tensor, positions: torch.Tensor):  # type: ignore[no-untyped-def]
    where = (positions[:, None] + torch.arange(1 - PAGE, 1)).clamp(min=0)

    def pages(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = kv[layer][:, :, where].transpose(1, 2)
        return k, v

    n_tokens = (positions + 1).clamp(max=PAGE)
    with torch.no_grad():
        return run_bookmarks(bookmarks, model.layers, model.rope, pages, n_tokens)


def test_nothing_added_is_one_more_token_of_the_model(directory: Path, model: ModelAdapter) -> None:
    """Transformers reads a page and the bookmark's embedding at the last token's position: same queries and
    keys in every layer."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, VOCAB, (PAGE,), generator=torch.Generator().manual_seed(0))
    bookmarks = Bookmarks(shape_for(model.config, PAGE, 4))
    bookmarks.embedding.data.copy_(torch.randn(bookmarks.shape.hidden) * 0.02)
    own = run(model, bookmarks, keys_values(model, ids), torch.tensor([PAGE - 1]))

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().model
    embedded = torch.cat((plain.embed_tokens(ids), bookmarks.embedding.detach()[None]))[None]
    where = torch.arange(PAGE + 1).clamp(max=PAGE - 1)[None]
    with torch.no_grad():
        hidden = plain(
            inputs_embeds=embedded, position_ids=where, output_hidden_states=True
        ).hidden_states
        for i, layer in enumerate(plain.layers):
            normed = layer.input_layernorm(hidden[i][0, -1:])
            q, k, _ = project(bookmarks, i, layer.self_attn, normed)
            torch.testing.assert_close(own.queries[i], q, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own.keys[i], k, rtol=1e-4, atol=1e-4)


def test_a_bookmark_depends_on_its_own_page_alone(model: ModelAdapter) -> None:
    """Other pages, its place in the text and who runs beside it change nothing."""
    torch.manual_seed(2)
    kv = torch.randn(model.n_layers, 2, model.n_kv_heads, 4 * PAGE, model.head_dim)
    bookmarks = random_bookmarks(model)
    ends = torch.arange(PAGE - 1, 4 * PAGE, PAGE)
    together = run(model, bookmarks, kv, ends)
    other = torch.randn_like(kv)
    other[..., PAGE : 2 * PAGE, :] = kv[..., 2 * PAGE : 3 * PAGE, :]
    moved = run(model, bookmarks, other, ends)
    torch.testing.assert_close(moved.keys[:, 1], together.keys[:, 2])
    torch.testing.assert_close(moved.queries[:, 1], together.queries[:, 2])
    assert not torch.allclose(moved.keys[-1, 3], together.keys[-1, 3])
    # all are equal before anything of the page was seen
    torch.testing.assert_close(together.keys[0], together.keys[0, :1].expand_as(together.keys[0]))


def test_near_the_start_only_what_is_there_counts(model: ModelAdapter) -> None:
    torch.manual_seed(3)
    kv = torch.randn(model.n_layers, 2, model.n_kv_heads, PAGE, model.head_dim)
    bookmarks = random_bookmarks(model)
    found = run(model, bookmarks, kv, torch.tensor([5]))
    later = kv.clone()
    later[..., 6:, :] = torch.nan
    later[..., :1, :] = kv[..., :1, :]
    again = run(model, bookmarks, later, torch.tensor([5]))
    torch.testing.assert_close(again.keys, found.keys)
    assert bool(found.keys.isfinite().all())


def test_whole_and_low_rank_projections_add_the_same(model: ModelAdapter) -> None:
    low = random_bookmarks(model, rank=4)
    whole = Bookmarks(shape_for(model.config, PAGE, None))
    whole.embedding.data.copy_(low.embedding)
    for side in ("q", "k", "v"):
        whole.up[side].data.copy_(low.up[side] @ low.down[side])
    torch.manual_seed(4)
    kv = torch.randn(model.n_layers, 2, model.n_kv_heads, PAGE, model.head_dim)
    end = torch.tensor([PAGE - 1])
    torch.testing.assert_close(
        run(model, whole, kv, end).keys, run(model, low, kv, end).keys, rtol=1e-3, atol=1e-3
    )


def test_kernels_choose_by_what_training_ranks_by(model: ModelAdapter) -> None:
    bookmarks = random_bookmarks(model)
    torch.manual_seed(6)
    shape = bookmarks.shape
    query = torch.randn(1, shape.n_heads, shape.head_dim)
    stage = Stage(scorer="bookmark", chunk=PAGE, keep=7 * PAGE, top_p=0.6)
    policy = LayerPolicy(stages=(stage,), sink=0, window=PAGE)
    position = 41 * PAGE - 1
    pages = whole_pages(position + 1, policy)
    keys = torch.randn(len(pages), shape.n_kv_heads, shape.head_dim)
    ends = torch.arange(pages.start, pages.stop, PAGE) + PAGE - 1
    distances = page_distances(ends, torch.tensor([position]), PAGE)
    content = bookmark_scores(query, keys).expand(shape.n_layers, -1, -1)
    for layer, row in enumerate(bookmarks.ranked(content, distances)[:, 0].detach()):
        shares, order = row.softmax(dim=0).sort(descending=True)
        n = min(7, int((shares.cumsum(0) < 0.6).sum()) + 1)
        weights = (float(bookmarks.log_scale[layer]), float(bookmarks.nearness[layer]))
        got = choose_pages(query[0], keys.numpy(), position + 1, policy, *weights)
        assert got[0].tolist() == sorted((order[:n] * PAGE).tolist())


def test_scores_are_sums_over_query_heads() -> None:
    torch.manual_seed(5)
    queries, keys = torch.randn(3, 6, 8), torch.randn(5, 2, 8)
    by_head = torch.stack([queries[:, h] @ keys[:, h // 3].T for h in range(6)])
    torch.testing.assert_close(bookmark_scores(queries, keys), by_head.sum(0) / (8**0.5 * 6))
    grouped = bookmark_scores(queries, keys, per_kv_head=True)
    torch.testing.assert_close(grouped[1], by_head[3:].sum(0) / (8**0.5 * 3))
