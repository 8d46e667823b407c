"""The binary-search scorer of the device, in Triton's interpreter, against the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage

from .triton_compile import compile_for_gpu
from .triton_rows import DEVICE, Rows, ints, make_rows

pytest.importorskip("triton")

from longreach.kernels import reference_select as reference
from longreach.kernels.gpu_pages import KIND
from longreach.kernels.triton_lists import StageLists
from longreach.kernels.triton_queries import turn_queries
from longreach.kernels.triton_search import search_scores

pytestmark = pytest.mark.grid

STYLES = ["relative", "chunk-indexed", "streaming", "clamped", "none"]


def check(rows: Rows) -> None:
    """Scores of every query head, equal to those of a descent over all tokens' scores."""
    policy, stage = rows.policy, rows.policy.stages[0]
    lists = StageLists.of(
        policy, 0, rows.mask(), rows.q_start, rows.n_queries, rows.fresh, 0, rows.most_tokens
    )
    queries = turn_queries(rows.q, lists, stage, policy, rows.angles, rows.scratch)
    got, ends = search_scores(
        queries, lists, stage, policy, rows.pages, rows.angles, rows.scale, rows.scratch,
        page_row=rows.page_row, precision="ieee",
    )  # fmt: skip
    for row in rows.live():
        start = int(rows.q_start[row])
        starts = reference.candidate_chunks(start, policy)
        tokens = reference.chunk_tokens(starts, stage.chunk, start, policy)
        assert len(starts) > 4
        grouped = rows.queries_of(row).unflatten(0, (rows.n_kv_heads, -1))
        want = torch.cat(
            [
                reference.search_scores(grouped[j], k, tokens, start, stage, policy, rows.rope)
                for j, k in enumerate(rows.keys[row])
            ]
        )
        scored = got[row, :, : len(starts)].cpu()
        atol = 2e-5 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(scored, want, atol=atol, rtol=0)
        if ends is not None:
            most, total = ends[row].cpu().unbind(-1)
            top = most.amax(dim=1)
            sums = top + (total * (most - top[:, None]).exp()).sum(dim=1).log()
            torch.testing.assert_close(
                sums, (want * rows.scale).logsumexp(dim=1), atol=1e-4, rtol=0
            )


def policy_of(style: str, stage: Stage, **more: Any) -> LayerPolicy:
    return LayerPolicy(
        stages=(stage,),
        **{"sink": 20, "window": 64, "select_rope": style, "select_span": 150, **more},
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_decode(paged, rope, style, variant):
    """The last row's last chunk has one token; the second place is empty."""
    stage = Stage(chunk=16, keep=32, query_stride=4, variant=variant)
    policy = policy_of(style, stage, reduce="softmax")
    check(make_rows(paged, rope(64, 1.1), policy, [309, -1, 245], dtype=torch.float16))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_prefill(paged, rope, style, variant):
    stage = Stage(chunk=16, keep=32, query_stride=2, variant=variant)
    policy = policy_of(style, stage)
    check(make_rows(paged, rope(64), policy, [229, 237], [8, 5]))


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "page_tokens", "chunk"),
    [
        (torch.float32, 1, 80, 16, 8),
        (torch.float16, 3, 64, 32, 12),
        (torch.bfloat16, 4, 128, 64, 1),
        (torch.int8, 7, 64, 32, 16),
        (torch.float8_e4m3fn, 1, 80, 32, 32),
        (torch.uint8, 4, 64, 64, 16),
    ],
)
@pytest.mark.parametrize("style", ["relative", "clamped"])
def test_formats_and_geometries(paged, rope, dtype, group, head_dim, page_tokens, chunk, style):
    stage = Stage(chunk=chunk, keep=chunk)
    more = {"dtype": dtype, "group": group, "page_tokens": page_tokens}
    policy = policy_of(style, stage)
    check(make_rows(paged, rope(head_dim), policy, [245 if chunk > 1 else 90], **more))


def test_rows_may_share_pages(paged, rope):
    rows = make_rows(paged, rope(64), policy_of("none", Stage(chunk=16, keep=32)), [200, 280])
    rows.keys.reverse()
    rows.q_start = torch.tensor([270, 200], device=DEVICE)
    rows.page_row = ints([1, 0])
    check(rows)


@pytest.mark.parametrize(("style", "pooled"), [(0, 1), (3, 1), (2, 64)])
def test_compiles_for_a_gpu(style, pooled):
    signature = {
        "queries": "*fp32", "scores": "*fp32", "ends": "*fp32", "q_start": "*i64", "n_queries": "*i32",
        "fresh": "*i32", "starts": "*i32", "n_starts": "*i32", "offset": "i32", "address": "*i64",
        "n_ids": "i32", "pages": "*i32", "n_pages": "i32", "page_row": "*i32", "fine_cos": "*fp32",
        "fine_sin": "*fp32", "coarse_cos": "*fp32", "coarse_sin": "*fp32", "scale": "fp32",
    }  # fmt: skip
    constexprs = {
        "LEAST": 128, "SOFTMAX": True, "PAPER": False, "LEVELS": 8, "SPAN": 4096, "STYLE": style,
        "N_HEADS": 32, "GROUP": 4, "STRIDE": 4, "TP": pooled, "SIDES": 2 if style == 0 else 1,
        "PAGE_TOKENS": 64, "HALF": 64, "ROW_BYTES": 256, "KIND": KIND[torch.bfloat16],
        "HAS_ROWS": True, "HAS_COUNT": pooled > 1, "BLOCK_N": 32, "BLOCK_T": max(16, pooled),
        "BLOCK_HALF": 64, "SPLITS": 64, "PRECISION": "tf32", "FIRST": True, "SINK": 256, "OVERLAP": 768,
        "CHUNK": 256, "REFRESH": 16, "LISTS": 1, "MOST": 12288,
    }  # fmt: skip
    made = compile_for_gpu(
        "longreach.kernels.triton_search", "_search_kernel", signature, constexprs
    )
    assert made["shared"] <= 200 * 1024
    assert made["n_spills"] <= 64
    assert any("ld.global.v4" in line for line in made["ptx_lines"])
