"""Scores by summaries from the device's kernels, in Triton's interpreter, against the specification."""

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
from longreach.kernels.summaries import table_of
from longreach.kernels.triton_lists import StageLists
from longreach.kernels.triton_queries import turn_queries
from longreach.kernels.triton_score import summary_scores
from longreach.kernels.triton_select import reduce_scores

pytestmark = pytest.mark.grid

STYLES = ["relative", "chunk-indexed", "streaming", "clamped", "none"]


def policy_of(stage: Stage, **more: Any) -> LayerPolicy:
    return LayerPolicy(stages=(stage,), **{"sink": 32, "window": 64, "select_span": 150, **more})


def got_scores(rows: Rows, *, n_ready: torch.Tensor | None = None) -> torch.Tensor:
    """Reduced scores of the first stage [R, Hsel, most]."""
    policy, stage = rows.policy, rows.policy.stages[0]
    lists = StageLists.of(
        policy, 0, rows.mask(), rows.q_start, rows.n_queries, rows.fresh, 0, rows.most_tokens
    )
    queries = turn_queries(rows.q, lists, stage, policy, rows.angles, rows.scratch)
    scores, ends = summary_scores(
        queries, lists, stage, policy, rows.pages, rows.tables.get(table_of(stage)), rows.angles,
        rows.scale, rows.scratch, page_row=rows.page_row, n_ready=n_ready, precision="ieee",
    )  # fmt: skip
    return reduce_scores(scores, ends, lists, rows.scale, rows.scratch).cpu()


def wanted_scores(rows: Rows, row: int) -> torch.Tensor:
    """[Hsel, C], logarithms for softmax."""
    policy, stage = rows.policy, rows.policy.stages[0]
    start = int(rows.q_start[row])
    n_lists = 1 if policy.head_reduce == "all" else rows.n_kv_heads
    starts = [reference.candidate_chunks(start, policy)] * n_lists
    scores = reference.stage_scores(
        rows.queries_of(row).double(), start, rows.keys[row].double(), starts, stage, policy, rows.rope,
        rows.scale,
    )  # fmt: skip
    both = torch.stack(scores)
    return both.log() if policy.reduce == "softmax" else both


def check(rows: Rows, **more: Any) -> None:
    got = got_scores(rows, **more)
    for row in rows.live():
        want = wanted_scores(rows, row)
        scored = got[row, :, : want.shape[1]].double()
        assert want.shape[1] > 4
        atol = 2e-5 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(scored, want.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scorer", ["bounds", "mean"])
@pytest.mark.parametrize("reduce", ["max", "softmax"])
def test_decode(paged, rope, style, scorer, reduce):
    """Rows of several lengths, an empty place, cut chunks and a page that is not full."""
    head_reduce, spread = ("all", 1.0) if reduce == "max" else ("kv-group", 0.4)
    stage = Stage(scorer=scorer, chunk=16, keep=32, query_stride=4, spread=spread)
    policy = policy_of(stage, select_rope=style, head_reduce=head_reduce, reduce=reduce)
    check(make_rows(paged, rope(64, 1.1), policy, [361, -1, 230]))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("scorer", "reduce"), [("bounds", "max"), ("bounds", "softmax"), ("mean", "softmax")]
)
def test_prefill(paged, rope, style, scorer, reduce):
    """Blocks of 8 queries, the last one shorter and no multiple of the stride."""
    stage = Stage(scorer=scorer, chunk=16, keep=32, query_stride=4, spread=0.4)
    policy = policy_of(stage, select_rope=style, head_reduce="all", reduce=reduce)
    check(make_rows(paged, rope(64), policy, [328, 336], [8, 5]))


def test_many_queries_of_a_head(paged, rope):
    """More rows than one block of a product."""
    for style in ("relative", "none"):
        for reduce in ("max", "softmax"):
            stage = Stage(scorer="bounds", chunk=16, keep=32)
            policy = policy_of(stage, select_rope=style, reduce=reduce)
            check(make_rows(paged, rope(64), policy, [256], [35], group=3, n_kv_heads=1))


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "page_tokens"),
    [
        (torch.float32, 1, 80, 16),
        (torch.float16, 3, 64, 32),
        (torch.bfloat16, 4, 128, 64),
        (torch.int8, 7, 64, 32),
        (torch.float8_e4m3fn, 4, 80, 32),
        (torch.uint8, 1, 64, 64),
    ],
)
@pytest.mark.parametrize("style", ["relative", "clamped"])
def test_formats_and_geometries(paged, rope, dtype, group, head_dim, page_tokens, style):
    stage = Stage(scorer="bounds", chunk=16, keep=32, spread=0.5)
    policy = policy_of(stage, select_rope=style, reduce="softmax")
    more = {"dtype": dtype, "group": group, "page_tokens": page_tokens}
    check(make_rows(paged, rope(head_dim), policy, [345], **more))


@pytest.mark.parametrize("scorer", ["bounds", "mean"])
@pytest.mark.parametrize("n_ready", [0, 5, 10])
def test_chunks_without_a_summary_come_from_their_keys(paged, rope, scorer, n_ready):
    stage = Stage(scorer=scorer, chunk=16, keep=32, spread=0.4)
    policy = policy_of(stage, head_reduce="kv-group")
    rows = make_rows(paged, rope(64), policy, [350, 345], dtype=torch.float16)
    for table in rows.tables.values():
        table[rows.pages.pages[0, n_ready:10].long()] = torch.nan
    check(rows, n_ready=ints([n_ready, 10]))
    without = make_rows(paged, rope(64), policy, [350], with_tables=False)
    check(without)


@pytest.mark.parametrize(("chunk", "page_tokens"), [(64, 32), (8, 64), (24, 64)])
def test_chunks_longer_and_shorter_than_a_page(paged, rope, chunk, page_tokens):
    """A size that no page holds is read from the keys."""
    stage = Stage(scorer="bounds", chunk=chunk, keep=chunk)
    policy = policy_of(stage, sink=64, window=64, select_rope="streaming")
    check(
        make_rows(paged, rope(64), policy, [401], page_tokens=page_tokens, with_tables=chunk != 24)
    )


def test_rows_may_share_pages(paged, rope):
    stage = Stage(scorer="bounds", chunk=16, keep=32)
    rows = make_rows(paged, rope(64), policy_of(stage), [300, 380])
    rows.keys.reverse()
    rows.q_start = torch.tensor([370, 300], device=DEVICE)
    rows.page_row = ints([1, 0])
    check(rows)


def test_nothing_is_lost_that_is_no_number(paged, rope):
    for style in ("relative", "none"):
        for scorer in ("bounds", "mean"):
            stage = Stage(scorer=scorer, chunk=16, keep=32)
            rows = make_rows(paged, rope(64), policy_of(stage, select_rope=style), [350])
            table = rows.tables[table_of(stage)]
            table[rows.pages.pages[0, 4].long(), 1, 1, 0, 5] = torch.nan
            got = got_scores(rows)[0, 0, :17]
            assert got.isnan().nonzero().flatten().tolist() == [(4 * 32 + 16 - 32) // 16]


@pytest.mark.parametrize("reduce", ["max", "softmax"])
def test_keys_of_bookmarks(paged, rope, reduce):
    """RetroLM: queries that somebody else projected and a table of trained keys, nothing is rotated."""
    stage = Stage(scorer="mean", chunk=32, keep=64)
    policy = policy_of(stage, head_reduce="kv-group", reduce=reduce)
    rows = make_rows(paged, rope(64), policy, [353, 321], dtype=torch.float16, with_tables=False)
    table = torch.randn(rows.pages.address.shape[1], 2, 1, 1, 64).to(DEVICE)
    lists = StageLists.of(
        policy, 0, rows.mask(), rows.q_start, None, rows.fresh, 0, rows.most_tokens
    )
    queries = turn_queries(rows.q, lists, stage, policy, rows.angles, rows.scratch, rotate=False)
    scores, ends = summary_scores(
        queries, lists, stage, policy, rows.pages, table, rows.angles, rows.scale, rows.scratch,
        precision="ieee",
    )  # fmt: skip
    got = reduce_scores(scores, ends, lists, rows.scale, rows.scratch).cpu()
    for row, end in ((0, 321), (1, 289)):
        n = (end - 32) // 32  # the cut chunk has no bookmark
        keys = table[rows.pages.pages[row, 1 : n + 1].long(), :, 0, 0].cpu()
        raw = torch.einsum("hgd,chd->hgc", rows.queries_of(row)[:, 0].view(2, 2, 64), keys)
        if reduce == "max":
            torch.testing.assert_close(got[row, :, :n], raw.amax(dim=1), atol=1e-4, rtol=0)
        else:
            assert torch.equal(queries[row, :, 0], rows.q[row])
            torch.testing.assert_close(
                scores[row, :, :n].cpu().reshape(2, 2, n), raw, atol=1e-4, rtol=0
            )


SCORE = {
    "queries": "*fp32",
    "table": "*bf16",
    "scores": "*fp32",
    "ends": "*fp32",
    "q_start": "*i64",
    "n_queries": "*i32",
    "fresh": "*i32",
    "starts": "*i32",
    "n_starts": "*i32",
    "offset": "i32",
    "address": "*i64",
    "n_ids": "i32",
    "pages": "*i32",
    "n_pages": "i32",
    "page_row": "*i32",
    "n_ready": "*i32",
    "fine_cos": "*fp32",
    "fine_sin": "*fp32",
    "coarse_cos": "*fp32",
    "coarse_sin": "*fp32",
    "scale": "fp32",
}
LIST = {
    "FIRST": True,
    "SINK": 256,
    "OVERLAP": 960,
    "CHUNK": 64,
    "REFRESH": 16,
    "LISTS": 1,
    "MOST": 49152,
}


@pytest.mark.parametrize(
    ("kernel", "mode", "style", "pooled", "bounds"),
    [
        ("_products_kernel", 2, 0, 1, True),
        ("_products_kernel", 1, 0, 32, True),
        ("_products_kernel", 0, 2, 1, False),
        ("_turned_bounds_kernel", 3, 2, 16, True),
    ],
)
def test_compiles_for_a_gpu(kernel, mode, style, pooled, bounds):
    turned = kernel == "_turned_bounds_kernel"
    constexprs = {
        "LEAST": 512, "MODE": mode, "SPAN": 4096, "STYLE": style, "KV_HEADS": 8, "GROUP": 4, "STRIDE": 4,
        "TP": pooled, "BOUNDS": bounds, "SPREAD": 0.4, "PER_PAGE": 1, "PAGE_TOKENS": 64, "HALF": 64,
        "ROW_BYTES": 256, "KIND": KIND[torch.bfloat16], "HAS_TABLE": True, "HAS_READY": False,
        "HAS_ROWS": True, "HAS_COUNT": pooled > 1, "BLOCK_N": 32,
        "BLOCK_M": 4 * pooled if turned else (16 if pooled == 1 else 64), "BLOCK_HALF": 64, "RUN": 16,
        "SPLITS": 64, "BLOCK_SPLITS": 64, "PRECISION": "tf32", **LIST,
    }  # fmt: skip
    made = compile_for_gpu("longreach.kernels.triton_score", kernel, SCORE, constexprs, num_warps=8)
    assert made["shared"] <= 200 * 1024
    assert made["n_spills"] <= 64
    assert any("ld.global.v4" in line for line in made["ptx_lines"])


def test_queries_compile_for_a_gpu():
    signature = {name: SCORE[name] for name in SCORE if "coarse" in name or "fine" in name}
    signature |= {"q": "*bf16", "out": "*fp32", "q_start": "*i64", "n_queries": "*i32", "fresh": "*i32",
                  "n_starts": "*i32", "offset": "i32", "factor": "fp32", "stride_row": "i32:16",
                  "stride_head": "i32:16", "stride_query": "i32:16"}  # fmt: skip
    constexprs = {"LEAST": 512, "STYLE": 3, "N_HEADS": 32, "TQ": 64, "TP": 16, "STRIDE": 4, "SIDES": 1,
                  "HALF": 64, "BLOCK_HALF": 64, "BLOCK_T": 64, "HAS_COUNT": True, "ROTATE": True,
                  **LIST}  # fmt: skip
    made = compile_for_gpu(
        "longreach.kernels.triton_queries", "_turn_kernel", signature, constexprs
    )
    assert made["shared"] <= 200 * 1024
    assert made["n_spills"] == 0
