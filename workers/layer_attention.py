"""Select, make resident, attend: one block of queries of one row in one layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InternalError
from ..core.stage import QUERY_BLOCK, LayerPolicy
from ..kernels.ops import (
    PagedKV,
    PreparedDecode,
    Rope,
    Segments,
    Selection,
    Summaries,
    attend_segments,
    candidate_end,
    delta_correction,
    has_block_kernel,
    merge_partials,
    plan_attend,
    plan_tail,
    select_blocks,
    tail_view,
    touched_pages,
)
from .bookmark_index import BookmarkIndex
from .cpu_memory import CpuMemory
from .row import Row
from .summary_index import SummaryIndex

Tail = tuple[PagedKV, Segments]
"""Means of what a selection left out, in pages of their own, and the segments over them."""


class LayerAttention:
    """What the two steps of a forward pass share."""

    def __init__(
        self,
        memory: CpuMemory,
        versions_of: Callable[[Row], np.ndarray],
        policies: Sequence[LayerPolicy],
        rope: Rope,
        index: SummaryIndex,
        n_heads: int,
        bookmarks: BookmarkIndex | None = None,
    ) -> None:
        self._n_heads = n_heads
        self.geometry = memory.geometry
        self.page_tokens = memory.geometry.page_tokens
        self.block_tokens = memory.geometry.block_tokens
        plans_ahead = has_block_kernel() and memory.geometry.head_dim % 16 == 0
        self.n_ahead = [self._planned_tokens(p) if plans_ahead else 1 for p in policies]
        """Per layer, tokens that one plan of decode is made for, if their pages are there: kernels give
        the same bits whatever else the plan has, plain torch does not."""
        self.most_ahead = max(
            (n for n, p in zip(self.n_ahead, policies, strict=True) if p.stages), default=1
        )
        self.memory = memory
        self.pages = memory.reader
        self._versions_of = versions_of
        self.policies = policies
        self.rope = rope
        self._index = index
        self._bookmarks = bookmarks

    def _planned_tokens(self, policy: LayerPolicy) -> int:
        """At most a page: room is reserved for so many tokens, and RetroLM never refreshes."""
        return min(policy.refreshes[-1], self.page_tokens) if policy.stages else self.page_tokens

    def select(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        n_appended: int,
        scale: float,
        previous: Selection | None = None,
        level: int = 0,
        check: bool = True,
        query_block: int = QUERY_BLOCK,
        bookmark: Tensor | None = None,
    ) -> Selection | None:
        """q [H, Tq, D] at absolute positions q_start …; None for a dense policy.

        bookmark: theirs, a query [H, D], where bookmarks choose pages. n_appended: tokens of the row whose
        keys this layer has. Without `check` the caller sees to `mend` before it keeps anything of what
        follows.
        """
        policy = self.policies[layer]
        if policy.dense:
            return None
        if previous is not None and level == len(policy.stages):
            return previous  # most decode steps: no view of the pages is needed
        started = time.monotonic()
        while True:
            view = self.pages.selection_view(layer, row, n_appended)
            coarse = None
            if level == 0 and policy.by_bookmark:
                coarse = self._chosen(layer, row, bookmark, q_start)
            elif level == 0:
                coarse = self._index.coarse(
                    layer, row, q, q_start, view, scale, query_block, policy
                )
            ready = self._summaries(layer, row, view)
            selection = select_blocks(
                q,
                q_start,
                view,
                policy,
                self.rope,
                previous,
                level,
                coarse,
                ready,
                scale,
                query_block,
            )
            self._note_keys_read(layer, row, selection, level, coarse is not None)
            if not check or not self.mend(layer, row):
                break
        row.stats.seconds_select += time.monotonic() - started
        return selection

    def _chosen(self, layer: int, row: Row, bookmark: Tensor | None, q_start: int) -> Tensor:
        if self._bookmarks is None or bookmark is None:
            raise InternalError(f"layer {layer} selects by bookmarks at {q_start} and has none")
        return self._bookmarks.choose(layer, row, bookmark, q_start, self.policies[layer])

    def _summaries(self, layer: int, row: Row, view: PagedKV) -> Summaries | None:
        ready, made = self._index.summaries(layer, row, view, self._versions_of)
        self.pages.note_in_place(layer, row, np.arange(made.start, made.stop))
        return ready

    def _note_keys_read(
        self, layer: int, row: Row, selection: Selection, level: int, coarse: bool
    ) -> None:
        """Pages whose keys a search has probed: those of what entered the first one from `level` on."""
        policy, page_tokens = self.policies[layer], self.page_tokens
        for i, stage in enumerate(policy.stages):
            if i < level or stage.scorer != "search" or (i == 0 and coarse):
                continue
            entered = selection.inputs[i]
            if entered is None:
                pages = np.arange(len(row.page_ids))
            else:
                starts = entered.numpy()
                starts = starts[starts >= 0]
                touched = np.concatenate([starts, starts + (stage.chunk - 1)]) // page_tokens
                pages = np.unique(np.minimum(touched, len(row.page_ids) - 1))
            self.pages.note_in_place(layer, row, pages)
            return

    def mend(self, layer: int, row: Row) -> bool:
        """Check what selection has read in place since the last check; True if it must be read again.

        Attention copies what it reads into the bank and checks the copy; selection does not.
        """
        if not self.pages.mend_in_place(layer, row):
            return False
        self._index.forget(layer, row)  # its summaries may have been made of bad bytes
        return True

    def segments(
        self, layer: int, q_start: int, n_queries: int, selection: Selection | None
    ) -> Segments:
        page_tokens = self.page_tokens
        return plan_attend(q_start, n_queries, selection, self.policies[layer], page_tokens)

    def tail(
        self,
        layer: int,
        row: Row,
        q_start: int,
        n_appended: int,
        selection: Selection | None,
        check: bool = True,
    ) -> Tail | None:
        """The estimate of what the selection left out; None where the policy has none, or nothing is.
        n_appended and check: as for `select`."""
        policy = self.policies[layer]
        if not policy.tail or selection is None:
            return None
        segments = plan_tail(q_start, selection, policy, self.page_tokens)
        if segments is None:
            return None
        while True:
            view = self.pages.selection_view(layer, row, n_appended)
            ready = self._summaries(layer, row, view)
            if not check or not self.mend(layer, row):
                break
        assert ready is not None
        return tail_view(ready, policy.tail), segments

    def corrected(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        n_appended: int,
        out: Tensor,
        scale: float,
    ) -> Tensor:
        """Sparse attention of a block, out [H, Tq, D], with the policy's delta correction if it has one
        and anything was left out. Reads in place: the caller sees to `mend`."""
        policy = self.policies[layer]
        if not policy.delta or policy.dense:
            return out
        n_kept = policy.stages[-1].keep
        if candidate_end(q_start, policy) - policy.sink <= min(s.keep for s in policy.stages):
            return out
        started = time.monotonic()
        view = self.pages.selection_view(layer, row, n_appended, q_start)
        n_pages = -(-(q_start + 1) // self.page_tokens)
        self.pages.note_in_place(layer, row, np.arange(n_pages))
        out = delta_correction(q, q_start, view, out, n_kept, policy, self.rope, scale)
        row.stats.seconds_attend += time.monotonic() - started
        return out

    def prepare(
        self,
        layer: int,
        row: Row,
        position: int,
        segments: Segments,
        tail: Tail | None,
        scale: float,
    ) -> PreparedDecode:
        """Attention of one query while pages and selection stay as they are; all are resident."""
        view = self.pages.bank_view(layer, row, position + 1)
        policy = self.policies[layer]
        return PreparedDecode(view, segments, policy, self.rope, scale, self._n_heads, tail)

    def attend(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        segments: Segments,
        leaves: np.ndarray,
        scale: float,
        tail: Tail | None = None,
    ) -> Tensor:
        """Attention over segments in as many passes as the bank needs; q, result [H, Tq, D].

        leaves: `leaves_of` the segments. Partials are merged once, in segment order and the tail's last,
        so the number of passes never changes the bits.
        """
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        resident = self.pages.touch(layer, row, leaves)
        passes = [(segments, leaves)] if resident else self._passes(layer, row, segments, leaves)
        for group, mine in passes:
            if not resident:
                self.pages.make_resident(layer, row, mine)
            started = time.monotonic()
            view = self.pages.bank_view(layer, row, q_start + q.shape[1])
            out, lse = attend_segments(
                q, q_start, view, group, self.policies[layer], self.rope, scale
            )
            outs.append(out)
            lses.append(lse)
            row.stats.attend_passes += 1
            row.stats.seconds_attend += time.monotonic() - started
        started = time.monotonic()
        if tail is not None:
            view, means = tail
            policy = self.policies[layer]
            out, lse = attend_segments(q, q_start, view, means, policy, self.rope, scale)
            outs.append(out)
            lses.append(lse)
        merged, _ = merge_partials(
            outs[0] if len(outs) == 1 else torch.cat(outs),
            lses[0] if len(lses) == 1 else torch.cat(lses),
        )
        row.stats.seconds_attend += time.monotonic() - started
        return merged

    def _passes(
        self, layer: int, row: Row, segments: Segments, everything: np.ndarray
    ) -> list[tuple[Segments, np.ndarray]]:
        """Consecutive segments whose leaves fit into the bank together, with those leaves."""
        if self.pages.fits(layer, everything):
            return [(segments, everything)]
        passes: list[tuple[Segments, np.ndarray]] = []
        first, leaves = 0, np.empty(0, dtype=np.int64)
        for i in range(len(segments)):
            mine = self.leaves_of(row, segments[i : i + 1])
            together = np.union1d(leaves, mine)
            if i > first and not self.pages.fits(layer, together):
                passes.append((segments[first:i], leaves))
                first, together = i, mine
            leaves = together
        passes.append((segments[first:], leaves))
        return passes

    def leaves_of(self, row: Row, segments: Segments) -> np.ndarray:
        """Distinct leaf numbers that segments touch, ascending."""
        n_kv_heads = self.geometry.n_kv_heads
        page_ids = row.page_ids.array
        head, page = np.nonzero(touched_pages(segments, n_kv_heads, len(page_ids)))
        return np.sort(page_ids[page] * n_kv_heads + head)
