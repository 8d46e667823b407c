"""The kernels' public names: the one place the engine imports from."""

from __future__ import annotations

from .attend import attend_segments, mass_kept, merge_partials
from .linear import linear_rows
from .paged import PagedKV, gather_blocks, gather_tokens
from .plan import advance, plan_attend
from .rope import Rope
from .segments import Segment, Segments, touched_pages
from .select import select_blocks
from .selection import Selection, candidate_end
from .summaries import SummarySource, chunk_summaries
from .warm import warm_up

__all__ = [
    "PagedKV",
    "Rope",
    "Segment",
    "Segments",
    "Selection",
    "SummarySource",
    "advance",
    "attend_segments",
    "candidate_end",
    "chunk_summaries",
    "gather_blocks",
    "gather_tokens",
    "linear_rows",
    "mass_kept",
    "merge_partials",
    "plan_attend",
    "select_blocks",
    "touched_pages",
    "warm_up",
]
