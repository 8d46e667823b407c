"""After a warm-up no request waits for the compiler."""

from __future__ import annotations

import numpy as np
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import (
    cpu_append,
    cpu_attend,
    cpu_attend_query,
    cpu_layers,
    cpu_linear,
    cpu_merge,
    cpu_seal,
    cpu_search,
    cpu_summary_scores,
    cpu_top,
)
from longreach.kernels.by_channel import DTYPE as INT4C
from longreach.kernels.ops import (
    PreparedDecode,
    append_tokens,
    attend_segments,
    linear_rows,
    merge_partials,
    plan_attend,
    run_layers,
    seal_blocks,
    select_blocks,
    summarise_pages,
    warm_up,
)

from .test_layers import N_LAYERS, POLICIES, Layers

WORKERS = (
    cpu_append.append,
    cpu_seal.seal,
    cpu_attend._worker,
    cpu_linear._worker,
    cpu_merge._merge_worker,
    cpu_attend_query.worker,
    cpu_layers.worker,
    cpu_top._top,
    cpu_search._worker,
    cpu_summary_scores.worker,
)


def test_requests_use_what_the_warm_up_compiled(paged, rope, threads):
    threads(2)  # one thread calls the inside of linear_rows directly
    warm_up()
    before = [len(worker.signatures) for worker in WORKERS]
    assert min(before) >= 1
    small = (torch.int8, torch.float8_e4m3fn, torch.uint8, INT4C)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, *small):
        view, _, _ = paged(*torch.randn(2, 2, 900, 64), 64, dtype, n_memories=2)
        k = torch.randn(30, 2, 64).transpose(0, 1)
        slots, offsets = np.arange(2)[:, None].repeat(30, axis=1), np.arange(30)
        if dtype == INT4C:
            block = torch.randn(64, 2, 64).transpose(0, 1)
            seal_blocks(view.memories[1], slots[:, :1], offsets[:1], block, block)
        else:
            append_tokens(view.memories[1], slots, offsets, k, k)
        for head_reduce, scorer in (("all", "search"), ("kv-group", "bounds"), ("all", "mean")):
            policy = LayerPolicy(
                stages=(Stage(scorer=scorer, chunk=64, keep=256), Stage(chunk=8, keep=64)),
                sink=64,
                window=128,
                head_reduce=head_reduce,
                attend_rope="none" if scorer == "mean" else "streaming",
            )
            ready = summarise_pages(view, policy)
            for n_queries in (64, 1):
                # as the engine gives them: a slice of a larger tensor
                q = torch.randn(6, 100, 64)[:, :n_queries]
                q_start = 900 - n_queries
                selection = select_blocks(q, q_start, view, policy, rope(64), summaries=ready)
                segments = plan_attend(q_start, n_queries, selection, policy, 64)
                o, lse = attend_segments(q, q_start, view, segments, policy, rope(64), 0.1)
                merge_partials(o, lse)
            prepared = PreparedDecode(view, segments, policy, rope(64), 0.1, 6)
            prepared.attend(q.contiguous(), q_start, segments.base)
        for n_rows in (1, 3):
            layers = Layers(paged, rope, n_rows, POLICIES["streaming"], dtype)
            run_layers(layers.rows(), layers.steps[1:], layers.calls(0, N_LAYERS))
    linear_rows(torch.randn(8, 576), torch.randn(1536, 576), torch.randn(1536))
    assert [len(worker.signatures) for worker in WORKERS] == before
