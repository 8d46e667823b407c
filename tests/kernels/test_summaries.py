"""Summaries of pages, made in numba and in torch, and where they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import summaries
from longreach.kernels.paged import unpack
from longreach.kernels.summaries import (
    check_tables,
    fill_table,
    page_summaries,
    pieces,
    put,
    table_shape,
)

NAMES = [
    ("bounds", 8, 1.0),
    ("bounds", 64, 0.4),
    ("mean", 16, 1.0),
    ("tail", 32, 1.0),
    ("bounds", 128, 0.5),
    ("mean", 256, 1.0),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.uint8],
)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_both_paths_make_what_the_keys_say(paged, monkeypatch, name, dtype, head_dim):
    kind, chunk, spread = name
    k, v = torch.randn(2, 3, 700, head_dim).unbind(0)
    view, k, v = paged(k, v, 64, dtype, n_memories=2)
    rows = page_summaries(name, view, 2, 9)
    with monkeypatch.context() as patch:
        patch.setattr(summaries, "cpu_page_summaries", None)
        other = page_summaries(name, view, 2, 9)
    torch.testing.assert_close(rows, other, atol=1e-5, rtol=1e-5)
    # the last pages of the chunks that end among pages 2 to 8
    last_pages = {128: [3, 5, 7], 256: [3, 7]}.get(chunk, range(2, 9))
    assert len(rows) == len(last_pages)
    for i, page in enumerate(last_pages):
        first = (page + 1) * 64 - chunk if chunk > 64 else page * 64
        run = k[:, first : first + chunk]
        got = rows[i, :, :, 0] if kind == "tail" else rows[i, :, 0]
        mean = run.mean(dim=1)
        if kind == "bounds":
            for side, end in enumerate((run.amax(dim=1), run.amin(dim=1))):
                torch.testing.assert_close(got[:, side], mean + spread * (end - mean))
        else:
            torch.testing.assert_close(got[:, 0], mean)
        if kind == "tail":
            torch.testing.assert_close(got[:, 1], v[:, first : first + chunk].mean(dim=1))


def test_every_code_of_a_byte_is_read_as_torch_does(paged):
    """A mean of one token is what is stored there."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    view, _, _ = paged(*torch.randn(2, 1, 64, 32).unbind(0), 64, torch.float8_e4m3fn)
    view.memories[0].view(torch.uint8)[view.row[0, 0], 0, :8] = codes.view(8, 32)
    rows = page_summaries(("mean", 1, 1.0), view, 0, 1)[0, 0, :8, 0].reshape(256)
    assert torch.equal(
        rows.nan_to_num(1e6), codes.view(torch.float8_e4m3fn).float().nan_to_num(1e6)
    )
    view, _, _ = paged(*torch.randn(2, 1, 64, 32).unbind(0), 64, torch.uint8)
    leaf = view.memories[0][view.row[0, 0], 0]
    leaf[:16, :16] = codes.view(16, 16)
    rows = page_summaries(("mean", 1, 1.0), view, 0, 1)[0, 0, :, 0]
    assert torch.equal(rows[:16], unpack(leaf[:16]))
    assert len(rows[0].unique()) == 16


@pytest.mark.parametrize("name", NAMES)
def test_pages_at_once_and_one_by_one_fill_the_same_table(path, paged, name):
    k, v = torch.randn(2, 2, 640, 32).unbind(0)
    view, _, _ = paged(k, v)
    slots = torch.randperm(12).numpy()[:10]
    tables = [torch.zeros(table_shape(name, 12, 2, 64, 32)) for _ in range(2)]
    put(tables[0], name, slots, 0, page_summaries(name, view, 0, 10), 64)
    for page in range(10):
        put(tables[1], name, slots, page, page_summaries(name, view, page, page + 1), 64)
    torch.testing.assert_close(tables[0], tables[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 3, 4, 9])
def test_pieces_fill_what_one_sweep_does(path, paged, monkeypatch, name, first):
    monkeypatch.setattr(summaries, "PIECE_TOKENS", 192)
    k, v = torch.randn(2, 2, 1024, 32).unbind(0)
    view, _, _ = paged(k, v)
    slots, shape = np.arange(16)[::-1].copy(), table_shape(name, 16, 2, 64, 32)
    whole, parts = torch.zeros(shape), torch.zeros(shape)
    put(whole, name, slots, first, page_summaries(name, view, first, 15), 64)
    fill_table(parts, name, view, slots, first, 15)
    ranges = list(pieces(name, first, 15, 64))
    assert len(ranges) > 1
    assert [ranges[0][0], ranges[-1][1]] == [first, 15]
    torch.testing.assert_close(parts, whole)


def test_what_is_not_finite_shows(path, paged):
    k = torch.randn(1, 128, 16)
    k[0, 70, 3] = torch.nan
    view, _, _ = paged(k, k)
    rows = page_summaries(("bounds", 8, 0.4), view, 0, 2)
    assert bool(rows[1, 0, 0, :, 3].isnan().all())
    assert not bool(rows[0].isnan().any())


def test_an_absent_page_is_an_error(path, paged):
    k = torch.randn(1, 128, 16)
    view, _, _ = paged(k, k)
    view.row[0, 1] = -1
    with pytest.raises(InternalError, match="absent"):
        page_summaries(("bounds", 8, 1.0), view, 0, 2)


def test_chunks_that_do_not_fit_pages_are_named():
    policy = LayerPolicy(stages=(Stage(scorer="bounds", chunk=48, keep=96),), sink=96)
    problem = check_tables(summaries.tables_of(policy), 64, policy.sink)
    assert problem is not None
    assert "48" in problem
    assert "64" in problem
    assert check_tables([("mean", 256, 1.0)], 64, 128) is not None
    assert check_tables([("mean", 256, 1.0)], 64, 256) is None
    assert np.prod(table_shape(("mean", 256, 1.0), 5, 2, 64, 32)) == 5 * 2 * 32
