"""A run of layers has the bits of its parts, one after the other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.errors import InternalError
from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.by_channel import DTYPE as INT4C
from longreach.kernels.ops import (
    BlockRows,
    BlockStep,
    PagedKV,
    PreparedDecode,
    RowCall,
    append_tokens,
    plan_attend,
    run_layers,
    select_blocks,
    summarise_pages,
)
from longreach.kernels.paged import RAW

from .test_block import Sizes, norm, weights

S = Sizes(hidden=96, n_gated=160, n_heads=6, n_kv_heads=2, head_dim=32)
N_LAYERS, POSITION, PAGE = 3, 700, 64


def steps_of(n_layers: int) -> list[BlockStep]:
    """In front of the first layer, between layers, and the model's last norm."""
    parts = [weights(S) for _ in range(n_layers)]
    before = [b for _, b in parts] + [norm(S.hidden)]
    after = [None, *(a for a, _ in parts)]
    return [BlockStep(a, b) for a, b in zip(after, before, strict=True)]


class Layers:
    """Rows at different positions over pages of their own, in every layer."""

    def __init__(self, paged: Any, rope: Any, n_rows: int, policy: LayerPolicy, dtype: Any) -> None:
        self.steps = steps_of(N_LAYERS)
        self.policy, self.rope = policy, rope(S.head_dim)
        self.positions = [POSITION + 13 * r for r in range(n_rows)]
        self.start = torch.randn(n_rows, S.hidden)
        self.views: list[list[PagedKV]] = []
        self.prepared: list[list[PreparedDecode]] = []
        for _ in range(N_LAYERS):
            views, prepared = [], []
            for position in self.positions:
                k, v = torch.randn(2, S.n_kv_heads, position + 1, S.head_dim).unbind(0)
                view, _, _ = paged(k, v, PAGE, dtype, n_memories=1)
                q = torch.randn(S.n_heads, 1, S.head_dim)
                ready = summarise_pages(view, policy, position // PAGE)
                selection = None
                if not policy.dense:
                    selection = select_blocks(q, position, view, policy, self.rope, summaries=ready)
                # three tokens more than the one that is decoded
                segments = plan_attend(position, 4, selection, policy, PAGE)
                views.append(view)
                prepared.append(PreparedDecode(view, segments, policy, self.rope, 0.2, S.n_heads))
                self.base = segments.base
            self.views.append(views)
            self.prepared.append(prepared)
        self.bases = [[self._base(p) for p in row] for row in self.prepared]

    def _base(self, prepared: PreparedDecode) -> tuple[int, ...]:
        return prepared._parts[0][1].base

    def rows(self) -> BlockRows:
        rows = BlockRows(len(self.positions), self.steps)
        rows.x.copy_(self.start)
        self.steps[0].run(rows)
        return rows

    def calls(self, first: int, last: int) -> list[list[RowCall]]:
        return [
            [
                RowCall(self.prepared[layer][r], p, self.bases[layer][r], True)
                for r, p in enumerate(self.positions)
            ]
            for layer in range(first, last)
        ]

    def one_by_one(self) -> torch.Tensor:
        rows = self.rows()
        width = (S.n_heads + 2 * S.n_kv_heads) * S.head_dim
        for layer in range(N_LAYERS):
            qkv = rows.out_of(self.steps[layer]).view(-1, width // S.head_dim, S.head_dim)
            q, k, v = qkv.transpose(0, 1).split([S.n_heads, S.n_kv_heads, S.n_kv_heads])
            outs = []
            for r, position in enumerate(self.positions):
                view, at = self.views[layer][r], slice(r, r + 1)
                self.store(view, position, k[:, at], v[:, at])
                prepared = self.prepared[layer][r]
                outs.append(
                    prepared.attend(q[:, at], position, self.bases[layer][r]).transpose(0, 1)
                )
            self.steps[layer + 1].run(rows, torch.cat(outs).contiguous())
        return rows.out_of(self.steps[-1]).clone()

    def store(self, view: PagedKV, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if view.open is not None:
            view.open.kv[:, :, position % 64] = torch.stack((k[:, 0], v[:, 0]))
            return
        slots = view.row[:, position // PAGE : position // PAGE + 1].numpy()
        append_tokens(view.memories[0], slots, np.array([position % PAGE]), k, v)

    def forget(self) -> None:
        """What is stored already must not be needed."""
        for view, position in zip(
            itertools.chain(*self.views), itertools.cycle(self.positions), strict=False
        ):
            if view.open is not None:
                view.open.kv[:, :, position % 64] = 0.0
                continue
            at, memory = view.row[:, position // PAGE], view.memories[0]
            memory.view(RAW[memory.dtype])[at, :, position % PAGE] = 0

    def stored(self) -> list[torch.Tensor]:
        return [
            (view.memories[0] if view.open is None else view.open.kv).clone()
            for views in self.views
            for view in views
        ]


POLICIES = {
    "streaming": LayerPolicy(
        stages=(Stage(scorer="bounds", chunk=8, keep=96),), sink=64, window=128
    ),
    "per group, true positions": LayerPolicy(
        stages=(Stage(scorer="bounds", chunk=8, keep=96),),
        sink=64,
        window=128,
        head_reduce="kv-group",
        attend_rope="none",
    ),
    "dense": LayerPolicy(attend_rope="none"),
}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.float8_e4m3fn,
        torch.uint8,
        INT4C,
    ],
    ids=str,
)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_run_has_the_bits_of_its_parts(paged, rope, threads, dtype, name, n_rows):
    layers = Layers(paged, rope, n_rows, POLICIES[name], dtype)
    want = layers.one_by_one()
    stored = layers.stored()
    assert bool(torch.isfinite(want).all())
    for n_threads in (1, 2, 3):
        threads(n_threads)
        for cuts in ([0, 3], [0, 1, 3], [0, 1, 2, 3]):
            layers.forget()
            rows = layers.rows()
            for first, last in itertools.pairwise(cuts):
                done = run_layers(
                    rows, layers.steps[first + 1 : last + 1], layers.calls(first, last)
                )
                assert not done.not_finite
                assert 0 < done.attending < 1
            assert torch.equal(rows.out_of(layers.steps[-1]), want)
            for a, b in zip(layers.stored(), stored, strict=True):
                # as numbers where NaN pads them; float8 has no comparison
                same = torch.equal(a.view(RAW[a.dtype]), b.view(RAW[b.dtype]))
                assert same or torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_key_that_is_not_finite_is_named(paged, rope):
    layers = Layers(paged, rope, 2, POLICIES["streaming"], torch.float16)
    rows = layers.rows()
    rows.out_of(layers.steps[0])[1, S.n_heads * S.head_dim + 5] = 7e4  # beyond float16
    done = run_layers(rows, layers.steps[1:], layers.calls(0, N_LAYERS))
    assert done.not_finite[0] == (0, 1)
    assert all(row == 1 for _, row in done.not_finite)
    want = Layers.one_by_one(layers)[0]
    assert torch.equal(rows.out_of(layers.steps[-1])[0], want)  # the other row is as it was


def test_an_absent_page_is_an_error(paged, rope):
    layers = Layers(paged, rope, 1, POLICIES["streaming"], torch.float16)
    view = layers.views[1][0]
    view.row[0, 0] = -1
    policy = layers.policy
    segments = layers.prepared[1][0]._parts[0][1]
    layers.prepared[1][0] = PreparedDecode(view, segments, policy, layers.rope, 0.2, S.n_heads)
    with pytest.raises(InternalError, match="page"):
        run_layers(layers.rows(), layers.steps[1:], layers.calls(0, N_LAYERS))
