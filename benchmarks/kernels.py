"""Milliseconds of each kernel with SmolLM2's geometry: 12K context, 3K preset, float32 KV.

python benchmarks/kernels.py [threads]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.ops import (
    PagedKV,
    Rope,
    attend_segments,
    linear_rows,
    merge_partials,
    plan_attend,
    select_blocks,
)

N_HEADS, N_KV_HEADS, HEAD_DIM, PAGE_TOKENS, N_TOKENS = 9, 3, 64, 64, 12288
POLICY = LayerPolicy(
    stages=(
        Stage(chunk=256, keep=32768, query_stride=4),
        Stage(chunk=32, keep=8192, query_stride=4),
        Stage(chunk=8, keep=2048),
    )
)


def best_ms(call: Callable[[], object], n: int = 15) -> float:
    call()
    best = float("inf")
    for _ in range(n):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def report(name: str, call: Callable[[], object]) -> None:
    print(f"{name:34s} {best_ms(call):8.3f} ms")


def attention(rope: Rope, kv: torch.Tensor, n_queries: int) -> None:
    q_start = N_TOKENS - n_queries
    q = torch.randn(N_HEADS, n_queries, HEAD_DIM)
    row = torch.randperm(kv.shape[0]).view(N_KV_HEADS, -1)
    view = PagedKV((kv,), torch.zeros_like(row), row, PAGE_TOKENS, N_TOKENS)
    selection = select_blocks(q, q_start, view, POLICY, rope)
    name = "prefill block" if n_queries > 1 else "decode query"
    for level in range(3):
        report(
            f"{name}: select from stage {level + 1}",
            lambda level=level: select_blocks(q, q_start, view, POLICY, rope, selection, level),
        )
    report(f"{name}: plan", lambda: plan_attend(q_start, n_queries, selection, POLICY, PAGE_TOKENS))
    segments = plan_attend(q_start, n_queries, selection, POLICY, PAGE_TOKENS)
    o, lse = attend_segments(q, q_start, view, segments, POLICY, rope, 0.125)
    report(
        f"{name}: attend ({len(segments)} segments)",
        lambda: attend_segments(q, q_start, view, segments, POLICY, rope, 0.125),
    )
    report(f"{name}: merge", lambda: merge_partials(o, lse))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    print(f"{torch.get_num_threads()} threads, {N_TOKENS} tokens")
    rope = Rope(1 / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    kv = torch.randn(N_KV_HEADS * N_TOKENS // PAGE_TOKENS, 2, PAGE_TOKENS, HEAD_DIM)
    attention(rope, kv, 64)
    attention(rope, kv, 1)
    for n_out, n_in in ((576, 576), (1536, 576), (49152, 576)):
        w = torch.randn(n_out, n_in)
        for n_rows in (1, 8):
            x = torch.randn(n_rows, n_in)
            took = best_ms(lambda x=x, w=w: linear_rows(x, w))
            print(f"linear_rows {n_rows} x {n_in} -> {n_out:5d}     {took:8.3f} ms "
                  f"{4e-6 * w.numel() / took:6.1f} GB/s")  # fmt: skip


if __name__ == "__main__":
    main()
