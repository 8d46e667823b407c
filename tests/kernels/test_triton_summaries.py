"""Page summaries made by the device's kernel, in Triton's interpreter, against those made on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .triton_compile import compile_for_gpu
from .triton_rows import DEVICE, device_pages, ints

pytest.importorskip("triton")

from longreach.kernels.gpu_pages import KIND
from longreach.kernels.summaries import empty_table, fill_table, pages_of
from longreach.kernels.triton_common import warps_of
from longreach.kernels.triton_summaries import summarise_decoded, summarise_range

pytestmark = pytest.mark.grid

NAMES = [
    ("bounds", 8, 1.0),
    ("bounds", 16, 0.4),
    ("mean", 16, 1.0),
    ("tail", 8, 1.0),
    ("bounds", 64, 0.5),
    ("mean", 32, 1.0),
]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for the order of sums: one step of the table's type."""
    steps = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    torch.testing.assert_close(
        got, want, atol=steps[got.dtype] / 4, rtol=steps[got.dtype], equal_nan=True
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "name"),
    [
        *((torch.float16, 64, name) for name in NAMES),
        (torch.float32, 80, NAMES[4]),
        (torch.bfloat16, 128, NAMES[1]),
        (torch.int8, 64, NAMES[3]),
        (torch.float8_e4m3fn, 80, NAMES[2]),
        (torch.uint8, 64, NAMES[1]),
    ],
)
def test_a_range_of_pages(paged, dtype, head_dim, name):
    """Pages 3 to 5 of the second row; slots of other pages, NaN before, are NaN after."""
    k, v = torch.randn(2, 2, 200, head_dim).unbind(0)
    views = [paged(k[:, :100], v[:, :100], 32, dtype)[0], paged(k, v, 32, dtype, n_memories=2)[0]]
    pages = device_pages(views)
    want = empty_table(name, views[1], pages.address.shape[1]).fill_(torch.nan)
    got = want.to(DEVICE, copy=True)
    fill_table(want, name, views[1], pages.pages[1].cpu().numpy(), 3, 6)
    summarise_range(pages, {name: got}, 1, 3, 6)
    close(got.cpu(), want)
    if name[0] == "bounds" and name[2] == 1.0:
        assert torch.equal(got.cpu().nan_to_num(), want.nan_to_num())
    written = ~got.isnan().flatten(1).any(dim=1)
    step = pages_of(name[1], 32)
    last_pages = [p for p in range(3, 6) if (p + 1) % step == 0]
    assert written.nonzero().flatten().tolist() == pages.pages[1, last_pages].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_decoded_token_completes(paged, name):
    """Rows that end a page, a long chunk or nothing, a row whose pages are another's, an empty place."""
    k, v = torch.randn(2, 2, 256, 64).unbind(0)
    views = [paged(k[:, :n], v[:, :n], 32, torch.float16)[0] for n in (96, 128, 250)]
    pages = device_pages(views)
    position = torch.tensor([127, -1, 248, 95], device=DEVICE)
    page_row = ints([1, 0, 2, 0])
    want = empty_table(name, views[0], pages.address.shape[1]).fill_(torch.nan)
    got = want.to(DEVICE, copy=True)
    fill_table(want, name, views[1], pages.pages[1].cpu().numpy(), 3, 4)
    fill_table(want, name, views[0], pages.pages[0].cpu().numpy(), 2, 3)
    summarise_decoded(pages, {name: got}, position, page_row)
    close(got.cpu(), want)
    alone = torch.full_like(got, torch.nan)
    for row in (0, 3):
        summarise_decoded(pages, {name: alone}, position[row : row + 1], page_row[row : row + 1])
    assert torch.equal(alone.nan_to_num(), got.nan_to_num())


def test_a_key_that_is_no_number_shows(paged):
    k, v = torch.randn(2, 1, 64, 64).unbind(0)
    k[0, 40, 7] = torch.nan
    view, _, _ = paged(k, v, 32)
    pages = device_pages([view])
    for name in (("bounds", 8, 1.0), ("mean", 8, 1.0)):
        table = empty_table(name, view, 2)
        summarise_range(pages, {name: table}, 0, 0, 2)
        assert (
            np.argwhere(table.isnan().numpy())[:, [0, 2, 4]].tolist()
            == [[1, 1, 7]] * table.shape[3]
        )


def test_a_table_that_does_not_fit(paged):
    view, _, _ = paged(*torch.randn(2, 2, 64, 64).unbind(0), 32)
    pages = device_pages([view])
    for table in (torch.zeros(2, 2, 4, 1, 64), torch.zeros(2, 2, 4, 2, 64).to(torch.int8)):
        with pytest.raises(ValueError, match="table"):
            summarise_range(pages, {("bounds", 8, 1.0): table}, 0, 0, 2)


@pytest.mark.parametrize(("what", "chunk"), [(0, 8), (2, 64)])
def test_compiles_for_a_gpu(what, chunk):
    signature = {
        "table": "*bf16",
        "address": "*i64",
        "n_ids": "i32",
        "pages": "*i32",
        "n_pages": "i32",
        "page_row": "*i32",
        "position": "*i64",
        "row": "i32",
        "first_token": "i32",
    }
    constexprs = {
        "DECODE": True,
        "HAS_ROWS": True,
        "WHAT": what,
        "SPREAD": 0.4,
        "CHUNK": chunk,
        "PER_PAGE": max(1, 64 // chunk),
        "PAGE_TOKENS": 64,
        "HALF": 64,
        "BLOCK_HALF": 64,
        "RUN": min(32, chunk),
        "ROW_BYTES": 256,
        "KIND": KIND[torch.bfloat16],
    }
    made = compile_for_gpu(
        "longreach.kernels.triton_summaries", "_summarise_kernel", signature, constexprs,
        num_warps=warps_of(constexprs["RUN"] * 128),
    )  # fmt: skip
    assert made["shared"] <= 48 * 1024
    assert made["n_spills"] == 0
    assert any("ld.global.v4" in line for line in made["ptx_lines"])
