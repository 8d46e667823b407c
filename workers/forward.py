"""The two attention steps of a forward pass: a prefill chunk of one row, one decode token of many."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from ..kernels.ops import (
    Rope,
    Segments,
    Selection,
    advance,
    attend_segments,
    mass_kept,
    merge_partials,
    plan_attend,
    select_blocks,
    touched_pages,
)
from .page_flow import PageFlow
from .row import DecodePlan, Row
from .scheduler import refresh_level
from .summary_index import SummaryIndex


class LayerAttention:
    """Select, make resident, attend: for one block of queries of one row in one layer."""

    def __init__(
        self,
        flow: PageFlow,
        policies: Sequence[LayerPolicy],
        rope: Rope,
        index: SummaryIndex,
    ) -> None:
        self.flow = flow
        self.policies = policies
        self.rope = rope
        self._index = index

    def select(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        scale: float,
        previous: Selection | None = None,
        level: int = 0,
        check: bool = True,
    ) -> Selection | None:
        """q [H, Tq, D] at absolute positions q_start …; None for a dense policy.

        Without `check` the caller sees to `mend` before it keeps anything of what follows.
        """
        policy = self.policies[layer]
        if policy.dense:
            return None
        if previous is not None and level == len(policy.stages):
            return previous  # most decode steps: no view of the pages is needed
        started = time.monotonic()
        while True:
            view = self.flow.selection_view(layer, row, q_start + q.shape[1])
            versions = self.flow.versions_of(row)
            coarse = self._index.coarse(layer, row, q, q_start, view) if level == 0 else None
            ready = self._index.summaries(layer, row, q_start, view, versions)
            selection = select_blocks(
                q, q_start, view, policy, self.rope, previous, level, coarse, ready, scale
            )
            if not check or not self.mend(layer, row, previous, level):
                break
        row.stats.seconds_select += time.monotonic() - started
        return selection

    def mend(self, layer: int, row: Row, previous: Selection | None = None, level: int = 0) -> bool:
        """Check what the stages from `level` on have read in place; True if it must be read again.

        Attention copies what it reads into the bank and checks the copy; selection does not.
        """
        policy = self.policies[layer]
        if policy.dense or level == len(policy.stages):
            return False
        pages: list[int] | None = None
        if previous is not None and level and (starts := previous.inputs[level]) is not None:
            starts = starts[starts >= 0]
            ends = starts + (policy.stages[level - 1].chunk - 1)
            touched = torch.cat([starts, ends]) // self.flow.geometry.page_tokens
            pages = torch.unique(touched.clamp(max=len(row.page_ids) - 1)).tolist()
        if not self.flow.mend_in_place(layer, row, pages):
            return False
        self._index.forget(layer, row)  # its summaries may have been made of bad bytes
        return True

    def segments(
        self, layer: int, q_start: int, n_queries: int, selection: Selection | None
    ) -> Segments:
        page_tokens = self.flow.geometry.page_tokens
        return plan_attend(q_start, n_queries, selection, self.policies[layer], page_tokens)

    def attend(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        segments: Segments,
        leaves: np.ndarray,
        scale: float,
    ) -> Tensor:
        """Attention over segments in as many passes as the bank needs; q, result [H, Tq, D].

        leaves: `leaves_of` the segments. Partials are merged once, in segment order, so the number of
        passes never changes the bits.
        """
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        resident = self.flow.touch(layer, row, leaves)
        passes = [(segments, leaves)] if resident else self._passes(layer, row, segments, leaves)
        for group, mine in passes:
            if not resident:
                self.flow.make_resident(layer, row, mine)
            started = time.monotonic()
            view = self.flow.bank_view(layer, row, q_start + q.shape[1])
            out, lse = attend_segments(
                q, q_start, view, group, self.policies[layer], self.rope, scale
            )
            outs.append(out)
            lses.append(lse)
            row.stats.attend_passes += 1
            row.stats.seconds_attend += time.monotonic() - started
        started = time.monotonic()
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
        if self.flow.fits(layer, everything):
            return [(segments, everything)]
        passes: list[tuple[Segments, np.ndarray]] = []
        first, leaves = 0, np.empty(0, dtype=np.int64)
        for i in range(len(segments)):
            mine = self.leaves_of(row, segments[i : i + 1])
            together = np.union1d(leaves, mine)
            if i > first and not self.flow.fits(layer, together):
                passes.append((segments[first:i], leaves))
                first, together = i, mine
            leaves = together
        passes.append((segments[first:], leaves))
        return passes

    def leaves_of(self, row: Row, segments: Segments) -> np.ndarray:
        """Distinct leaf numbers that segments touch, ascending."""
        n_kv_heads = self.flow.geometry.n_kv_heads
        page_ids = row.page_ids.array
        head, page = np.nonzero(touched_pages(segments, n_kv_heads, len(page_ids)))
        return np.sort(page_ids[page] * n_kv_heads + head)


class PrefillStep:
    """Attention of one chunk of one row's prompt, from `start` on, in blocks [first, last) of queries
    that share a selection."""

    def __init__(
        self, attention: LayerAttention, row: Row, start: int, blocks: Sequence[tuple[int, int]]
    ) -> None:
        self._attention = attention
        self._row = row
        self._start = start
        self._query_blocks = blocks
        self.seconds = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        started = time.monotonic()
        attention, row = self._attention, self._row
        attention.flow.append(layer, row, self._start, k, v)
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2])  # [T, H, D]
        while True:
            self._blocks(layer, q, out, scale)
            # once for all blocks of the chunk: a check costs as much as reading every key
            if not attention.mend(layer, row):
                break
        self.seconds += time.monotonic() - started
        return out

    def _blocks(self, layer: int, q: Tensor, out: Tensor, scale: float) -> None:
        attention, row = self._attention, self._row
        for first, last in self._query_blocks:
            at = slice(first - self._start, last - self._start)
            block = q[:, at].contiguous()
            selection = attention.select(layer, row, block, first, scale, check=False)
            segments = attention.segments(layer, first, last - first, selection)
            leaves = attention.leaves_of(row, segments)
            merged = attention.attend(layer, row, block, first, segments, leaves, scale)
            out[at] = merged.transpose(0, 1)


class DecodeStep:
    """Attention of one new token per row, at position row.n_done; rows never mix."""

    def __init__(self, attention: LayerAttention, rows: Sequence[Row], audit_interval: int) -> None:
        self._attention = attention
        self._rows = rows
        self._audit_interval = audit_interval
        self.seconds = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        started = time.monotonic()
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2])  # [rows, H, D]
        for i, row in enumerate(self._rows):
            at = slice(i, i + 1)
            out[i] = self._row(layer, row, q[:, at], k[:, at], v[:, at], scale)
        self.seconds += time.monotonic() - started
        return out

    def _row(self, layer: int, row: Row, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        attention = self._attention
        policy = attention.policies[layer]
        position = row.n_done
        attention.flow.append(layer, row, position, k, v)
        q = q.contiguous()
        previous = row.selections[layer]
        level = refresh_level(
            [s.refresh for s in policy.stages],
            position,
            layer,
            len(attention.policies),
            first=previous is None,
        )
        selection = attention.select(layer, row, q, position, scale, previous, level)
        row.selections[layer] = selection
        plan = self._plan(layer, row, position, selection)
        out = attention.attend(layer, row, q, position, plan.segments, plan.leaves, scale)
        if self._audited(layer, row, position):
            self._audit(layer, row, q, position, plan.segments, scale)
        return out[:, 0]

    def _plan(self, layer: int, row: Row, position: int, selection: Selection | None) -> DecodePlan:
        """What to attend to; while only distances change, what the token before attended to."""
        attention, before = self._attention, row.plans[layer]
        segments = None
        if before is not None and before.selection is selection and selection is not None:
            policy = attention.policies[layer]
            segments = advance(before.segments, selection, policy, before.position, position)
        if segments is not None and before is not None:
            leaves = before.leaves
        else:
            segments = attention.segments(layer, position, 1, selection)
            leaves = attention.leaves_of(row, segments)
        row.plans[layer] = plan = DecodePlan(position, selection, segments, leaves)
        return plan

    def _audited(self, layer: int, row: Row, position: int) -> bool:
        """One layer of every audit_interval-th step, walking over layers (deterministic)."""
        if not self._audit_interval:
            return False
        step = position - row.n_prompt
        if step % self._audit_interval:
            return False
        n_layers = len(self._attention.policies)
        return layer == (position * 7 + step // self._audit_interval) % n_layers

    def _audit(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        position: int,
        segments: Segments,
        scale: float,
    ) -> None:
        attention = self._attention
        started = time.monotonic()
        view = attention.flow.selection_view(layer, row, position + 1)
        head = position % q.shape[0]
        policy, rope = attention.policies[layer], attention.rope
        row.stats.mass_kept_sum += mass_kept(q, position, view, segments, policy, rope, scale, head)
        row.stats.mass_kept_n += 1
        row.stats.seconds_other += time.monotonic() - started
