"""Block sparse attention over segments, with log-sum-exp, and the merge of partials."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .paged import PagedKV, block_token_ids, gather_tokens
from .plan import plan_attend, plan_tail
from .rope import Rope
from .segments import Segment, Segments
from .selection import Selection
from .summaries import Summaries, summarise_pages, tail_table

try:
    from . import cpu_attend, cpu_merge
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_attend = None  # type: ignore[assignment]
    cpu_merge = None  # type: ignore[assignment]


def attend_segments(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    segments: Segments,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One normalised attention partial per segment.

    q: [H, Tq, D] unrotated, at positions q_start ...; every page of the segments is present.
    Returns o [S, H, Tq, D] and lse [S, H, Tq] (base e), float32. A partial has the same bits
    whichever other segments share the call. A row that sees no key has lse -inf and o 0.
    """
    o = torch.empty(len(segments), *q.shape)
    lse = torch.empty(len(segments), *q.shape[:2])
    if not segments:
        return o, lse
    if cpu_attend is not None and cpu_attend.attend(
        q, q_start, view, segments, policy, rope, scale, o, lse
    ):
        return o, lse
    return attend_torch(q, q_start, view, segments, policy, rope, scale)


def attend_torch(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    segments: Segments,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend_segments` where numba is missing or its path does not apply."""
    parts = [_attend_segment(q, q_start, view, s, policy, rope, scale) for s in segments]
    return torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts])


def key_positions(segment: Segment) -> Tensor:
    """Positions of a segment's keys counted from its base: int64 [1 or Hkv, n_keys]."""
    starts = segment.starts if segment.starts.dim() == 2 else segment.starts[None]
    first = torch.tensor(segment.key_start)[:, None]
    n_keys = starts.shape[1] * segment.block_tokens
    if segment.renumbered or segment.fixed:
        return first + torch.arange(n_keys) * int(segment.renumbered)
    tokens = block_token_ids(starts, segment.block_tokens)
    return first + tokens - starts[:, :1].clamp(min=0)


def visible(segment: Segment, tokens: Tensor, positions: Tensor, policy: LayerPolicy) -> Tensor:
    """Which keys a query sees, exactly: sink, selected and window never overlap.

    tokens: int64 [..., n] true token ids (-1 = padding); positions: int64 [Tq] true positions.
    Returns bool [..., Tq, n].
    """
    key = tokens[..., None, :]
    query = positions[:, None]
    if segment.kind == "tail":
        return (key >= 0).expand(*key.shape[:-2], len(positions), -1)
    seen = (key >= 0) & (key <= query)
    if policy.dense:
        return seen
    if segment.kind == "window":
        return seen & (key > query - policy.window)
    old = seen & (key <= query - policy.window)
    return old & ((key < policy.sink) if segment.kind == "sink" else (key >= policy.sink))


def _attend_segment(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    segment: Segment,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:
    n_heads, n_queries, head_dim = q.shape
    n_kv_heads = view.n_kv_heads
    true = torch.arange(q_start, q_start + n_queries)
    base = torch.tensor(segment.base)[:, None]
    query_pos = (true - base).repeat_interleave(n_heads // len(base), dim=0)
    rows = rope.rotate(q.float(), query_pos).view(n_kv_heads, -1, head_dim) * scale
    # rows are padded because small library GEMMs have other bits (1 to 11 rows, DESIGN 6.2)
    n_rows = rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, max(0, 16 - n_rows)))
    tokens = block_token_ids(segment.starts, segment.block_tokens)
    if segment.kind != "tail":
        tokens = tokens.masked_fill(tokens > q_start + n_queries - 1, -1)
    keys = rope.rotate(gather_tokens(view, tokens), key_positions(segment))
    logits = (rows @ keys.mT)[:, :n_rows].view(n_kv_heads, -1, n_queries, tokens.shape[-1])
    seen = visible(segment, tokens, true, policy)
    seen = seen[:, None] if seen.dim() == 3 else seen
    if segment.weights is not None:
        logits = logits + torch.from_numpy(segment.weights).log()[:, None, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    top = logits.amax(dim=-1, keepdim=True)
    safe_top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (logits - safe_top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    padded = torch.nn.functional.pad(weights.flatten(1, 2), (0, 0, 0, max(0, 16 - n_rows)))
    out = (padded @ gather_tokens(view, tokens, "v"))[:, :n_rows]
    out = out.view(n_kv_heads, -1, n_queries, head_dim) / total.clamp(min=1e-37)
    lse = (safe_top + total.log()).squeeze(-1)
    return out.reshape(n_heads, n_queries, head_dim), lse.reshape(n_heads, n_queries)


def attend_block(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    selection: Selection | None,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
    summaries: Summaries | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query block to all that its selection keeps, all pages present.

    q: [H, Tq, D] unrotated. Returns out [H, Tq, D] and lse [H, Tq] (base e). summaries: for a policy
    with a tail; made from the keys without.
    """
    segments = plan_attend(q_start, q.shape[1], selection, policy, view.page_tokens)
    o, lse = attend_segments(q, q_start, view, segments, policy, rope, scale)
    if policy.tail and selection is not None:
        ready = summaries
        if ready is None:
            ready = summarise_pages(view, policy, q_start // view.page_tokens)
        tail = attend_tail(q, q_start, selection, ready, policy, rope, scale)
        if tail is not None:
            o, lse = torch.cat((o, tail[0])), torch.cat((lse, tail[1]))
    return merge_partials(o, lse)


def attend_tail(
    q: Tensor,
    q_start: int,
    selection: Selection,
    summaries: Summaries,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """Partials of the estimate of what the last stage did not keep, as `attend_segments`."""
    segments = plan_tail(q_start, selection, policy, summaries.page_tokens)
    if segments is None:
        return None
    view = tail_view(summaries, policy.tail)
    return attend_segments(q, q_start, view, segments, policy, rope, scale)


def tail_view(summaries: Summaries, tail: int) -> PagedKV:
    """Means of keys and values as pages of their own: token number = number of the mean."""
    table = summaries.tables[tail_table(tail)]
    n_slots, n_kv_heads, _, per_page, head_dim = table.shape
    slots = torch.from_numpy(summaries.slots[: summaries.n_pages])
    row = slots * n_kv_heads + torch.arange(n_kv_heads)[:, None]
    memory = table.view(n_slots * n_kv_heads, 2, per_page, head_dim)
    n_tokens = summaries.n_pages * per_page
    return PagedKV((memory,), torch.zeros_like(row), row, per_page, n_tokens)


def merge_partials(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine partials in order: o [S, H, Tq, D], lse [S, H, Tq] -> out [H, Tq, D], lse [H, Tq].

    Rows with lse -inf carry nothing. A row that no partial covers gives out 0 and lse -inf.
    """
    if cpu_merge is not None and len(o) and o.is_contiguous() and lse.is_contiguous():
        out, total = torch.empty_like(o[0]), torch.empty_like(lse[0])
        cpu_merge.merge(o, lse, out, total)
        return out, total
    return merge_torch(o, lse)


def merge_torch(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_partials` where numba is missing."""
    if not len(o):
        return torch.zeros(o.shape[1:]), torch.full(lse.shape[1:], -torch.inf)
    top = lse.amax(dim=0)
    safe_top = top.masked_fill(top == -torch.inf, 0.0)
    out = torch.zeros_like(o[0])
    total = torch.zeros_like(safe_top)
    for partial, partial_lse in zip(o, lse, strict=True):
        weight = (partial_lse - safe_top).exp()
        out += weight[..., None] * partial
        total += weight
    return out / total.clamp(min=1e-37)[..., None], safe_top + total.log()
