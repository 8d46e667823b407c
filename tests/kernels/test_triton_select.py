"""Top-k, stage transitions and the whole selection of the device, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.core.stage import LayerPolicy, Stage

from .triton_compile import compile_for_gpu
from .triton_rows import DEVICE, Rows, ints, lists_of, make_rows

pytest.importorskip("triton")

from longreach.kernels import (
    gpu_select,
    triton_queries,
    triton_score,
    triton_search,
    triton_select,
    triton_summaries,
)
from longreach.kernels import reference_select as reference
from longreach.kernels.gpu_pages import DeviceMask, DeviceScratch
from longreach.kernels.gpu_select import select_device
from longreach.kernels.selection import chunk_shares, first_chunks, split_chunks, top_chunks
from longreach.kernels.triton_lists import StageLists
from longreach.kernels.triton_select import keep_best, reduce_scores

pytestmark = pytest.mark.grid


def keep(
    policy: LayerPolicy, scores: torch.Tensor, starts: torch.Tensor, n: torch.Tensor, position: int,
    n_rows: int = 2,
) -> tuple[DeviceMask, int]:  # fmt: skip
    """Runs the second stage's top-k on lists [Hsel, most] for every row."""
    mask = DeviceMask.empty(policy, n_rows, 2, DEVICE)
    assert mask.inputs[0].shape[2] >= starts.shape[1]
    most = mask.inputs[0].shape[2]
    mask.inputs[0][:, :, : starts.shape[1]] = starts
    mask.n_inputs[0][:] = n
    for x in (*mask.inputs[1:], *mask.n_inputs[1:], mask.blocks, mask.n_blocks):
        x.fill_(-7)
    q_start = torch.tensor([position] * (n_rows - 1) + [-1], device=DEVICE)
    fresh = ints([1] * n_rows)
    lists = StageLists.of(policy, 1, mask, q_start, None, fresh, 0, position + 1)
    padded = torch.full((n_rows, mask.n_lists, most), torch.nan, device=DEVICE)
    padded[:, :, : scores.shape[1]] = scores
    stage, child = policy.stages[1], policy.stages[1].chunk
    kept, n_kept = mask.blocks, mask.n_blocks
    if len(policy.stages) > 2:
        kept, n_kept, child = mask.inputs[1], mask.n_inputs[1], policy.stages[2].chunk
    keep_best(padded, lists, stage, child, kept, n_kept, 0.3)
    assert bool((kept[-1] == -7).all())
    assert bool((n_kept[-1] == -7).all())
    return mask, child


@pytest.mark.parametrize("n_chunks", [1, 33, 100, 259])
@pytest.mark.parametrize("what", ["ties", "numbers", "odd"])
@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
def test_the_best_chunks_exactly(monkeypatch, n_chunks, what, head_reduce):
    """Many equal scores, all kinds of floats, and the second list shorter than the first."""
    monkeypatch.setattr(triton_select, "TILE", 128)
    n_lists = 1 if head_reduce == "all" else 2
    if what == "ties":
        scores = torch.randint(-2, 3, (n_lists, n_chunks)).float()
    else:
        scores = (
            torch.randn(n_lists, n_chunks)
            * 10 ** torch.randint(-30, 30, (n_lists, n_chunks)).float()
        )
        if what == "odd":
            odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45])
            place = torch.rand(scores.shape) < 0.6
            scores[place] = odd[torch.randint(0, 7, (int(place.sum()),))]
    n = torch.tensor([n_chunks, max(1, n_chunks - 5)][:n_lists], dtype=torch.int32)
    starts = 32 + 8 * torch.stack(
        [torch.randperm(1000)[:n_chunks].sort()[0] for _ in range(n_lists)]
    )
    starts[torch.arange(n_chunks) >= n[:, None]] = -1
    for n_keep in (1, 20, 150):
        stages = (Stage(chunk=8, keep=8 * 300), Stage(chunk=8, keep=8 * n_keep))
        policy = LayerPolicy(stages=stages, sink=32, window=64, head_reduce=head_reduce)
        want = top_chunks(starts, scores, n_keep)
        mask, _ = keep(policy, scores, starts.int(), n, 9000)
        wanted = [[b for b in row if b >= 0] for row in want.tolist()]
        assert lists_of(mask.blocks[0], mask.n_blocks[0]) == wanted


@pytest.mark.parametrize("chunk", [64, 8])
def test_three_million_tokens(chunk):
    """As many chunks as the longest context has, in a table of the first stage's size."""
    n_tokens = 3 << 20
    stages = (Stage(chunk=chunk, keep=32768),)
    policy = LayerPolicy(stages=stages, sink=256, window=1024)
    mask = DeviceMask.empty(policy, 1, 2, DEVICE)
    q_start = torch.tensor([n_tokens - 1], device=DEVICE)
    lists = StageLists.of(policy, 0, mask, q_start, None, ints([1]), 0, n_tokens)
    starts = first_chunks(n_tokens - 1, policy)[None]
    scores = torch.randn(1, 1, lists.most).half().float()  # many are equal
    want = top_chunks(starts, scores[0, :, : starts.shape[1]], 32768 // chunk)
    keep_best(scores.to(DEVICE), lists, stages[0], chunk, mask.blocks, mask.n_blocks, 1.0)
    assert lists_of(mask.blocks[0], mask.n_blocks[0]) == want.tolist()


@pytest.mark.parametrize("end", [700, 708, 712, 5000])
def test_children_of_the_kept_chunks(end):
    """Those at or beyond the end of the candidates are dropped."""
    stages = (Stage(chunk=48, keep=4800), Stage(chunk=24, keep=240), Stage(chunk=8, keep=80))
    policy = LayerPolicy(stages=stages, sink=24, window=48, head_reduce="kv-group")
    starts = (24 + 24 * torch.arange(29)).expand(2, -1)
    scores = torch.randn(2, 29)
    scores[0, -1] = 9.0
    n = torch.tensor([29, 29], dtype=torch.int32)
    mask, child = keep(policy, scores, starts.int(), n, end)
    want = split_chunks(top_chunks(starts, scores, 10), 24, child, end)
    wanted = [[b for b in row if b >= 0] for row in want.tolist()]
    assert lists_of(mask.inputs[1][0], mask.n_inputs[1][0]) == wanted


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("reduce", ["max", "softmax"])
@pytest.mark.parametrize("size", [0.0, 1.0, 12.0])
def test_an_adaptive_budget(top_p, reduce, size):
    stages = (Stage(chunk=8, keep=8192), Stage(chunk=8, keep=8 * 40, top_p=top_p))
    policy = LayerPolicy(stages=stages, sink=32, window=64, head_reduce="kv-group", reduce=reduce)
    n = torch.tensor([60, 51], dtype=torch.int32)
    raw = (size * torch.randn(2, 60)).round(decimals=1)
    starts = (32 + 8 * torch.arange(60)).repeat(2, 1)
    starts[torch.arange(60) >= n[:, None]] = -1
    scores = raw
    if reduce == "softmax":  # logarithms of shares there, shares here
        scores = raw.exp()
        raw = raw / 0.3
    want = top_chunks(starts, scores, 40, chunk_shares(starts, scores, policy, 0.3), top_p)
    mask, _ = keep(policy, raw, starts.int(), n, 9000)
    for i, row in enumerate(want.tolist()):
        wanted, got = [b for b in row if b >= 0], mask.blocks[0, i, : mask.n_blocks[0, i]].tolist()
        if top_p < 1.0 and size:
            assert got == wanted
        else:  # whose last shares are within a rounding of the target
            assert abs(len(got) - len(wanted)) <= (40 if top_p == 1.0 else 1)
            assert set(got) <= set(wanted) or set(wanted) <= set(got)


def test_no_number_among_the_shares_is_kept_alone():
    stages = (Stage(chunk=8, keep=800), Stage(chunk=8, keep=80, top_p=0.9))
    policy = LayerPolicy(stages=stages, sink=32, window=64)
    scores = torch.randn(1, 30)
    scores[0, 17] = torch.nan
    starts = (32 + 8 * torch.arange(30))[None].int()
    mask, _ = keep(policy, scores, starts, torch.tensor([30], dtype=torch.int32), 9000)
    assert lists_of(mask.blocks[0], mask.n_blocks[0]) == [[32 + 8 * 17]]


@pytest.mark.parametrize("softmax", [True, False])
def test_the_best_of_the_heads(softmax):
    stages = (Stage(chunk=8, keep=16),)
    for head_reduce, n_lists in (("all", 1), ("kv-group", 2)):
        policy = LayerPolicy(stages=stages, sink=32, window=64, head_reduce=head_reduce)
        mask = DeviceMask.empty(policy, 1, 2, DEVICE)
        q_start = torch.tensor([1600], device=DEVICE)
        lists = StageLists.of(policy, 0, mask, q_start, None, ints([1]), 0, 1700)
        scores = torch.randn(1, 6, lists.most)
        scores[0, 3, 5] = torch.nan
        n = (1600 - 56 - 32) // 8
        ends, sums = None, torch.zeros(6)
        if softmax:
            halves = (scores[0, :, :90] * 0.3, scores[0, :, 90:n] * 0.3)
            ends = torch.stack(
                [torch.stack([h.amax(1), (h - h.amax(1, True)).exp().sum(1)], -1) for h in halves],
                1,
            )[None]
            sums = (scores[0, :, :n] * 0.3).logsumexp(1)
        ends = None if ends is None else ends.to(DEVICE)
        got = reduce_scores(scores.to(DEVICE), ends, lists, 0.3, DeviceScratch(DEVICE)).cpu()
        want = scores[0, :, :n] * 0.3 - sums[:, None] if softmax else scores[0, :, :n]
        want = want.view(n_lists, -1, n).amax(dim=1)
        torch.testing.assert_close(got[0, :, :n], want, atol=1e-5, rtol=1e-5, equal_nan=True)


def policy_of(stages: tuple[Stage, ...], **more: Any) -> LayerPolicy:
    return LayerPolicy(stages=stages, **{"sink": 32, "window": 64, "select_span": 150, **more})


def chain(scorer: str = "search", variant: str = "authors", **last: Any) -> tuple[Stage, ...]:
    """The three stages of InfiniteHiP in small."""
    return (
        Stage(
            chunk=32,
            keep=96,
            query_stride=4,
            scorer=scorer,
            variant=variant,
            refresh=8,
            spread=0.5,
        ),
        Stage(
            chunk=16, keep=64, query_stride=2, scorer=scorer, variant=variant, refresh=4, spread=0.5
        ),
        Stage(chunk=8, keep=24, variant=variant, scorer=scorer, refresh=2, **last),
    )


def select(rows: Rows, mask: DeviceMask, offset: int = 0, **more: Any) -> None:
    select_device(
        rows.q, rows.q_start, rows.n_queries, rows.pages, mask, rows.tables, rows.policy, rows.angles,
        rows.scale, rows.scratch, fresh=rows.fresh, offset=offset, most_tokens=rows.most_tokens,
        page_row=rows.page_row, precision="ieee", **more,
    )  # fmt: skip


def check(rows: Rows, query_block: int = 64) -> DeviceMask:
    """Lists of every stage are the specification's, and an empty place is not touched."""
    mask = rows.mask()
    select(rows, mask, query_block=query_block)
    for row, start in enumerate(rows.q_start.tolist()):
        if start < 0:
            assert all(
                bool((x[row] == -7).all()) for x in (*mask.inputs, mask.blocks, mask.n_blocks)
            )
            continue
        inputs, blocks = reference.select(
            rows.queries_of(row), start, rows.keys[row], rows.policy, rows.rope, scale=rows.scale,
            query_block=query_block,
        )  # fmt: skip
        for i, want in enumerate(inputs[1:]):
            assert lists_of(mask.inputs[i][row], mask.n_inputs[i][row]) == want
        assert lists_of(mask.blocks[row], mask.n_blocks[row]) == blocks
    return mask


@pytest.mark.parametrize(
    ("style", "scorer", "variant"),
    [
        ("relative", "search", "authors"),
        ("relative", "bounds", "paper"),
        ("chunk-indexed", "search", "paper"),
        ("chunk-indexed", "mean", "paper"),
        ("streaming", "search", "authors"),
        ("streaming", "bounds", "paper"),
        ("clamped", "search", "paper"),
        ("clamped", "bounds", "paper"),
        ("none", "search", "authors"),
        ("none", "mean", "paper"),
    ],
)
def test_decode_equals_the_specification(paged, rope, style, scorer, variant):
    """Rows of several lengths: a short one keeps everything, one selects nothing, a place is empty."""
    head_reduce = "all" if style in ("relative", "none") else "kv-group"
    reduce = "softmax" if variant == "authors" or scorer == "bounds" else "max"
    policy = policy_of(
        chain(scorer, variant), select_rope=style, head_reduce=head_reduce, reduce=reduce
    )
    check(make_rows(paged, rope(64), policy, [300, -1, 150, 20]))


@pytest.mark.parametrize(
    ("style", "scorer", "reduce"),
    [
        ("relative", "bounds", "softmax"),
        ("relative", "search", "max"),
        ("chunk-indexed", "search", "softmax"),
        ("clamped", "bounds", "max"),
        ("streaming", "mean", "softmax"),
    ],
)
def test_prefill_equals_the_specification(paged, rope, style, scorer, reduce):
    """Whole and short blocks of one row, whose pages are those of the last."""
    policy = policy_of(chain(scorer), select_rope=style, reduce=reduce, head_reduce="kv-group")
    rows = make_rows(paged, rope(64), policy, [272, 280], [8, 5])
    rows.q_start[0] = 272
    rows.keys[0] = rows.keys[1]
    rows.page_row = ints([1, 1])
    check(rows, query_block=64 if scorer == "search" else 16)
    if scorer == "bounds":
        check(rows)


@pytest.mark.parametrize("top_p", [0.3, 0.9])
@pytest.mark.parametrize(("scorer", "reduce"), [("search", "softmax"), ("bounds", "max")])
def test_an_adaptive_budget_in_a_chain(paged, rope, top_p, scorer, reduce):
    policy = policy_of(chain(scorer, top_p=top_p), reduce=reduce, head_reduce="kv-group")
    check(make_rows(paged, rope(64), policy, [310], size=2.0))


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        (torch.float16, 4, 64),
        (torch.bfloat16, 7, 64),
        (torch.int8, 3, 80),
        (torch.float8_e4m3fn, 1, 128),
        (torch.uint8, 4, 64),
    ],
)
def test_formats(paged, rope, dtype, group, head_dim):
    stages = (chain("bounds")[0], chain("mean")[1], chain("search")[2])
    policy = policy_of(stages, reduce="softmax")
    check(make_rows(paged, rope(head_dim), policy, [290], dtype=dtype, group=group))


def test_tables_of_16_bits_lose_little(paged, rope):
    """Scores of what is kept instead are almost as good."""
    policy = policy_of(
        (Stage(scorer="bounds", chunk=8, keep=80, spread=0.4),), head_reduce="kv-group"
    )
    rows = make_rows(paged, rope(64), policy, [600], dtype=torch.bfloat16)
    rows.tables = {name: table.bfloat16() for name, table in rows.tables.items()}
    mask = rows.mask()
    select(rows, mask)
    starts = [reference.candidate_chunks(600, policy)] * 2
    scores = reference.stage_scores(
        rows.queries_of(0),
        600,
        rows.keys[0],
        starts,
        policy.stages[0],
        policy,
        rows.rope,
        rows.scale,
    )
    _, want = reference.select(rows.queries_of(0), 600, rows.keys[0], policy, rows.rope)
    for j in range(2):
        kept = scores[j][(mask.blocks[0, j, :10].cpu() - 32) // 8]
        best = scores[j][(torch.tensor(want[j]) - 32) // 8]
        assert float((best.sum() - kept.sum()) / best.abs().sum()) < 1e-3


def test_only_stages_that_are_due_are_recomputed(paged, rope):
    """A row whose second stage is due, one whose last is, one with nothing due, one in its first step."""
    policy = policy_of(chain("bounds"), select_rope="clamped")
    offset = 3
    starts = [268 - offset, 262 - offset, 265 - offset, 261]
    rows = make_rows(paged, rope(64), policy, starts)
    levels = [
        next((i for i, n in enumerate(policy.refreshes) if (s + offset) % n == 0), 3)
        for s in starts
    ]
    rows.fresh = ints([0, 0, 0, 1])
    levels[3] = 0
    assert sorted(levels) == [0, 1, 2, 3]
    # what an earlier step left: lists of another query
    mask, before = rows.mask(), []
    rows.fresh.fill_(1)
    q = rows.q
    rows.q = torch.randn_like(q)
    select(rows, mask, offset)
    for row in range(4):
        before.append(
            (
                [lists_of(x[row], n[row]) for x, n in zip(mask.inputs, mask.n_inputs, strict=True)],
                lists_of(mask.blocks[row], mask.n_blocks[row]),
            )
        )
    rows.q, rows.fresh = q, ints([0, 0, 0, 1])
    select(rows, mask, offset)
    for row, level in enumerate(levels):
        old_inputs, old_blocks = before[row]
        inputs, blocks = old_inputs, old_blocks
        if level < 3:
            found, blocks = reference.select(
                q[row].cpu(), starts[row], rows.keys[row], policy, rope(64), [[], *old_inputs], level,
                scale=rows.scale,
            )  # fmt: skip
            inputs = found[1:]
        got = [lists_of(x[row], n[row]) for x, n in zip(mask.inputs, mask.n_inputs, strict=True)]
        assert got == inputs
        assert lists_of(mask.blocks[row], mask.n_blocks[row]) == blocks
        assert (got == old_inputs and blocks == old_blocks) == (level == 3)


@pytest.mark.parametrize("scorer", ["bounds", "search"])
def test_the_same_bits_alone_and_in_company(paged, rope, scorer):
    policy = policy_of(
        chain(scorer), select_rope="streaming", reduce="softmax", head_reduce="kv-group"
    )
    rows = make_rows(paged, rope(64), policy, [301, -1, 130, 270], dtype=torch.float16)
    mask = rows.mask()
    select(rows, mask)
    company = {name: buffer.clone() for name, buffer in rows.scratch.buffers.items()}
    whole = (rows.q, rows.q_start, rows.fresh)
    for row in (0, 3):
        rows.q, rows.q_start, rows.fresh = (x[row : row + 1] for x in whole)
        rows.page_row = ints([row])
        rows.scratch = DeviceScratch(DEVICE)
        alone = rows.mask()
        select(rows, alone)
        for mine, theirs in zip(
            (*alone.inputs, alone.blocks), (*mask.inputs, mask.blocks), strict=True
        ):
            assert torch.equal(mine[0], theirs[row])
        one = rows.scratch.buffers["select.reduced" if scorer == "bounds" else "select.scores"]
        last = policy.stages[2]
        n = int(alone.n_inputs[1][0, 0])
        assert n > last.keep // last.chunk
        many = company["select.reduced" if scorer == "bounds" else "select.scores"]
        # the last stage's scores of the first head or list, where both buffers hold them
        most, heads = mask.inputs[1].shape[2], 2 if scorer == "bounds" else 4
        assert torch.equal(one[:n], many[row * heads * most :][:n])


class Watched(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked.add(str(func))
        return func(*args, **(kwargs or {}))


class Skipped:
    """A kernel that does nothing: the interpreter itself copies arguments with torch."""

    def __getitem__(self, grid: Any) -> Any:
        assert all(isinstance(n, int) for n in grid)
        return lambda *args, **kwargs: None


def test_a_second_call_neither_allocates_nor_waits(paged, rope, monkeypatch):
    for module in (triton_queries, triton_score, triton_search, triton_select, triton_summaries):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Skipped())
    stages = (chain("bounds")[0], chain("mean")[1], chain("search")[2])
    for reduce, n_queries in (("max", None), ("softmax", None), ("softmax", [8])):
        policy = policy_of(stages, reduce=reduce, head_reduce="kv-group")
        rows = make_rows(paged, rope(64), policy, [200], n_queries)
        mask = rows.mask()
        select(rows, mask)
        with Watched() as watched:
            select(rows, mask)
            triton_summaries.summarise_decoded(rows.pages, rows.tables, rows.q_start)
        assert watched.asked <= {"aten.view.default", "aten.slice.Tensor"}


def test_what_does_not_fit_is_refused(paged, rope):
    rows = make_rows(paged, rope(64), policy_of(chain("bounds")), [200])
    mask = rows.mask()
    rows.most_tokens = 100000
    with pytest.raises(ValueError, match="angles"):
        select(rows, mask)
    rows.most_tokens, rows.policy = 300, LayerPolicy()
    with pytest.raises(ValueError, match="dense"):
        select(rows, mask)
    rows.policy = policy_of(chain("bounds"))
    rows.tables = {name: table[:, :1] for name, table in rows.tables.items()}
    with pytest.raises(ValueError, match="table"):
        select(rows, mask)
    assert gpu_select.QUERY_BLOCK == 64


LIST = {
    "FIRST": True,
    "SINK": 256,
    "OVERLAP": 960,
    "CHUNK": 64,
    "REFRESH": 16,
    "LISTS": 1,
    "MOST": 49152,
}
SIGNATURE = {
    "scores": "*fp32", "ends": "*fp32", "out": "*fp32", "kept": "*i32", "n_kept": "*i32",
    "q_start": "*i64", "fresh": "*i32", "starts": "*i32", "n_starts": "*i32", "offset": "i32",
    "scale": "fp32", "top_p": "fp32",
}  # fmt: skip


@pytest.mark.parametrize(("adaptive", "block"), [(False, 4096), (True, 1024)])
def test_top_k_compiles_for_a_gpu(adaptive, block):
    constexprs = {
        "ADAPTIVE": adaptive,
        "KEEP": 512,
        "CHILD": 8,
        "PER_ROW": 4096,
        "BLOCK": block,
        **LIST,
    }
    signature = {k: v for k, v in SIGNATURE.items() if k not in ("ends", "out")}
    made = compile_for_gpu(
        "longreach.kernels.triton_select", "_keep_kernel", signature, constexprs,
        num_warps=8,
    )  # fmt: skip
    assert made["shared"] <= 200 * 1024
    assert made["n_spills"] <= 64


def test_the_reduction_compiles_for_a_gpu():
    constexprs = {"LEAST": 512, "SOFTMAX": True, "SPLITS": 64, "BLOCK_SPLITS": 64, "ROWS": 32,
                  "BLOCK_ROWS": 32, "BLOCK": 128, **LIST}  # fmt: skip
    names = ("scores", "ends", "out", "q_start", "fresh", "n_starts", "offset", "scale")
    signature = {name: SIGNATURE[name] for name in names}
    made = compile_for_gpu(
        "longreach.kernels.triton_select", "_reduce_kernel", signature, constexprs
    )
    assert made["shared"] <= 200 * 1024
    assert made["n_spills"] == 0
