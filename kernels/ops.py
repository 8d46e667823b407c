"""The kernels' public names: the one place the engine imports from."""

from __future__ import annotations

from .append import append_tokens, first_not_finite, seal_blocks
from .attend import attend_block, attend_segments, merge_partials, tail_view
from .audit import MassAudit
from .block import BlockRows, BlockStep, has_block_kernel
from .block_weights import AfterAttention, BeforeAttention, Norm, Product
from .bookmark import choose_pages, keeps_all_pages, whole_pages
from .decode import PreparedDecode
from .delta import delta_correction
from .layers import LayersDone, RowCall, run_layers
from .linear import linear_rows
from .paged import TORCH_DTYPE, OpenBlock, PagedKV, block_start, gather_blocks, gather_tokens
from .plan import base_of, plan_attend, plan_tail, tail_until
from .rope import Rope
from .segments import Segment, Segments, touched_pages
from .select import select_blocks
from .selection import Selection, candidate_end, overlap_window
from .summaries import (
    Summaries,
    TableName,
    bookmark_table,
    check_tables,
    empty_table,
    fill_table,
    page_summaries,
    pages_of,
    pieces,
    summarise_pages,
    tables_of,
)
from .summaries import put as put_summaries
from .warm import warm_up

__all__ = [
    "TORCH_DTYPE",
    "AfterAttention",
    "BeforeAttention",
    "BlockRows",
    "BlockStep",
    "LayersDone",
    "MassAudit",
    "Norm",
    "OpenBlock",
    "PagedKV",
    "PreparedDecode",
    "Product",
    "Rope",
    "RowCall",
    "Segment",
    "Segments",
    "Selection",
    "Summaries",
    "TableName",
    "append_tokens",
    "attend_block",
    "attend_segments",
    "base_of",
    "block_start",
    "bookmark_table",
    "candidate_end",
    "check_tables",
    "choose_pages",
    "delta_correction",
    "empty_table",
    "fill_table",
    "first_not_finite",
    "gather_blocks",
    "gather_tokens",
    "has_block_kernel",
    "keeps_all_pages",
    "linear_rows",
    "merge_partials",
    "overlap_window",
    "page_summaries",
    "pages_of",
    "pieces",
    "plan_attend",
    "plan_tail",
    "put_summaries",
    "run_layers",
    "seal_blocks",
    "select_blocks",
    "summarise_pages",
    "tables_of",
    "tail_until",
    "tail_view",
    "touched_pages",
    "warm_up",
    "whole_pages",
]
