"""After a warm-up no request waits for the compiler."""

from __future__ import annotations

import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels import cpu_attend, cpu_linear, cpu_merge, cpu_search
from longreach.kernels.ops import (
    attend_segments,
    linear_rows,
    merge_partials,
    plan_attend,
    select_blocks,
    warm_up,
)

WORKERS = (cpu_attend._worker, cpu_linear._worker, cpu_merge._merge_worker, cpu_search._worker)


def test_requests_use_what_the_warm_up_compiled(paged, rope, threads):
    threads(2)  # one thread calls the inside of linear_rows directly
    warm_up()
    before = [len(worker.signatures) for worker in WORKERS]
    assert min(before) >= 1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        view, _, _ = paged(*torch.randn(2, 2, 900, 64), 64, dtype, n_memories=2)
        for head_reduce in ("all", "kv-group"):
            policy = LayerPolicy(
                stages=(Stage(chunk=64, keep=256), Stage(chunk=8, keep=64)),
                sink=32,
                window=128,
                head_reduce=head_reduce,
            )
            for n_queries in (64, 1):
                # as the engine gives them: a slice of a larger tensor
                q = torch.randn(6, 100, 64)[:, :n_queries]
                q_start = 900 - n_queries
                selection = select_blocks(q, q_start, view, policy, rope(64))
                segments = plan_attend(q_start, n_queries, selection, policy, 64)
                o, lse = attend_segments(q, q_start, view, segments, policy, rope(64), 0.1)
                merge_partials(o, lse)
    linear_rows(torch.randn(8, 576), torch.randn(1536, 576), torch.randn(1536))
    assert [len(worker.signatures) for worker in WORKERS] == before
