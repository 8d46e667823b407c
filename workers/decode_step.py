"""Attention of one decoded token of many rows, planned once for as many tokens as it stays the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.ops import (
    LayersDone,
    MassAudit,
    PreparedDecode,
    RowCall,
    Segments,
    Selection,
    base_of,
    tail_until,
)
from .layer_attention import LayerAttention, Tail
from .page_errors import not_finite
from .row import Row
from .scheduler import refresh_level


@dataclass
class DecodePlan:
    """What decoded tokens read in one layer, as long as `selection` and pages stay, before `until`."""

    selection: Selection | None
    segments: Segments
    leaves: np.ndarray
    """int64, ascending: distinct leaf numbers that the segments touch."""
    tail: Tail | None
    until: int
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    version: int = -1
    """Where the leaves are in the bank, as long as its residency has this version."""
    prepared: PreparedDecode | None = None


Planned = tuple[DecodePlan, tuple[int, ...]]
"""A plan and the base of positions at this token."""


class DecodeStep:
    """Attention of one new token per row, at position row.n_done; rows never mix.

    A layer whose plan stays is `ready` to run without us, in one launch with others; one that has
    something to decide is asked to `prepare`. A model that cannot do so asks for `attend`.
    """

    def __init__(self, attention: LayerAttention, rows: Sequence[Row], audit_interval: int) -> None:
        self._attention = attention
        self._rows = rows
        self._audit_interval = audit_interval
        self.seconds = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [H, rows, D], k and v [Hkv, rows, D] -> [rows, H, D]."""
        started = time.monotonic()
        plans = []
        for i, row in enumerate(self._rows):
            at = slice(i, i + 1)
            self._attention.memory.append(layer, row, row.n_done, k[:, at], v[:, at])
            plans.append(self._planned(layer, row, q[:, at], scale))
        out = self._results(layer, q, plans, scale)
        self.seconds += time.monotonic() - started
        return out

    def ready(self, layer: int) -> list[RowCall] | None:
        """Every row's attention in this layer, if there is nothing to decide before it."""
        started = time.monotonic()
        try:
            calls = []
            for row in self._rows:
                call = self._ready(layer, row)
                if call is None:
                    return None
                calls.append(call)
            return calls
        finally:
            self.seconds += time.monotonic() - started

    def prepare(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> list[RowCall] | Tensor:
        """Decide what is due in a layer that is not `ready`, given what `attend` is given. Returns every
        row's attention, or its results where one launch cannot do it."""
        started = time.monotonic()
        try:
            plans, appended = [], []
            for i, row in enumerate(self._rows):
                at = slice(i, i + 1)
                # the run stores the key, unless it ends a page, of which a summary may be wanted
                ends_page = (row.n_done + 1) % self._attention.page_tokens == 0
                appended.append(ends_page or self._ends_block(row))
                if appended[-1]:
                    self._attention.memory.append(layer, row, row.n_done, k[:, at], v[:, at])
                plans.append(self._planned(layer, row, q[:, at], scale))
                self._prepared(layer, row, plans[-1][0], scale)
            calls: list[RowCall] = []
            for row, (plan, base) in zip(self._rows, plans, strict=True):
                if plan.prepared is None or plan.prepared.call is None:
                    break
                # a later row may have pushed out what this one needs
                pages = self._attention.pages
                if pages.still_at(layer, plan.leaves, plan.slots, plan.version) is None:
                    break
                calls.append(RowCall(plan.prepared, row.n_done, base, not appended[len(calls)]))
            if len(calls) == len(plans):
                return calls
            for i, row in enumerate(self._rows):
                at = slice(i, i + 1)
                if not appended[i]:
                    self._attention.memory.append(layer, row, row.n_done, k[:, at], v[:, at])
            return self._results(layer, q, plans, scale)
        finally:
            self.seconds += time.monotonic() - started

    def ran(self, first_layer: int, n_layers: int, done: LayersDone, seconds: float) -> None:
        """A run of layers has ended after so many seconds. Raises NumericalError naming row, layer and
        position if a new key or value is not finite."""
        share_s = seconds * done.attending
        self.seconds += share_s
        for row in self._rows:
            row.stats.attend_passes += n_layers
            row.stats.seconds_attend += share_s / len(self._rows)
        for layer, i in done.not_finite:
            raise not_finite(
                self._rows[i],
                first_layer + layer,
                self._rows[i].n_done,
                self._attention.geometry,
            )

    def finish(self) -> None:
        """After the last layer: go on with audits under way, a piece of each."""
        started = time.monotonic()
        for row in self._rows:
            if row.audit is None:
                continue
            layer, audit = row.audit
            view = self._attention.pages.selection_view(layer, row, row.n_done + 1, row.n_done)
            share = audit.advance(view)
            if share is not None:
                row.stats.mass_kept_sum += share
                row.stats.mass_kept_n += 1
                row.audit = None
            row.stats.seconds_other += time.monotonic() - started

    def _results(self, layer: int, q: Tensor, plans: Sequence[Planned], scale: float) -> Tensor:
        """[rows, H, D], row after row."""
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2])
        for i, (row, (plan, base)) in enumerate(zip(self._rows, plans, strict=True)):
            one = q[:, i : i + 1].contiguous()
            out[i] = self._attended(layer, row, one, plan, base, scale)[:, 0]
        return out

    # --- one row --------------------------------------------------------------------------------

    def _ready(self, layer: int, row: Row) -> RowCall | None:
        attention, position, plan = self._attention, row.n_done, row.plans[layer]
        if plan is None or plan.prepared is None or plan.prepared.call is None:
            return None
        if position >= plan.until or position < row.n_existing_pages * attention.page_tokens:
            return None
        if self._ends_block(row) or self._level(layer, row) < len(attention.policies[layer].stages):
            return None
        if self._audited(layer, row) or not self._stays(layer, row, plan):
            return None
        return RowCall(plan.prepared, position, self._base(layer, row, plan), append=True)

    def _ends_block(self, row: Row) -> bool:
        """Whether a block is full with this token and has to be rounded, which no run of layers does."""
        block_tokens = self._attention.block_tokens
        return block_tokens > 1 and (row.n_done + 1) % block_tokens == 0

    def _planned(self, layer: int, row: Row, q: Tensor, scale: float) -> Planned:
        """What the row's token attends to, and the base of positions now. Its own key need not be stored
        yet: selection is of what lies before the window, and summaries are of whole pages."""
        attention, position = self._attention, row.n_done
        q = q.contiguous()
        previous, level = row.selections[layer], self._level(layer, row)
        bookmark = None
        if row.bookmark is not None and attention.policies[layer].by_bookmark:
            bookmark = row.bookmark[1][layer]
        selection = attention.select(
            layer, row, q, position, position + 1, scale, previous, level, bookmark=bookmark
        )
        row.selections[layer] = selection
        plan = row.plans[layer]
        if plan is None or plan.selection is not selection or position >= plan.until:
            plan = self._plan(layer, row, position, selection)
            row.plans[layer] = plan
        if selection is not None and row.audit is None and self._audited(layer, row):
            policy, head = attention.policies[layer], position % q.shape[0]
            audit = MassAudit(q, position, head, selection, policy, attention.rope, scale)
            row.audit = (layer, audit)
        return plan, self._base(layer, row, plan)

    def _level(self, layer: int, row: Row) -> int:
        """First stage to recompute."""
        policies = self._attention.policies
        first = row.selections[layer] is None
        return refresh_level(policies[layer].refreshes, row.n_done, layer, len(policies), first)

    def _base(self, layer: int, row: Row, plan: DecodePlan) -> tuple[int, ...]:
        if plan.selection is None:
            return plan.segments.base
        return base_of(row.n_done, plan.selection, self._attention.policies[layer])

    def _stays(self, layer: int, row: Row, plan: DecodePlan) -> bool:
        """Use the plan's pages again, if they are where they were."""
        version = self._attention.pages.touch_again(
            layer, row, plan.leaves, plan.slots, plan.version
        )
        if version is None:
            return False
        plan.version = version
        return True

    def _prepared(self, layer: int, row: Row, plan: DecodePlan, scale: float) -> bool:
        """Make the plan's pages resident and prepare attention over them, unless that is done; False if
        they cannot all be in the bank at once."""
        pages = self._attention.pages
        if plan.prepared is not None and self._stays(layer, row, plan):
            return True
        plan.prepared = None
        if not pages.touch(layer, row, plan.leaves):
            if not pages.fits(layer, plan.leaves):
                return False
            pages.make_resident(layer, row, plan.leaves)
        plan.slots, plan.version = pages.slots_of(layer, plan.leaves)
        plan.prepared = self._attention.prepare(
            layer, row, row.n_done, plan.segments, plan.tail, scale
        )
        return True

    def _attended(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        plan: DecodePlan,
        base: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        """q, result [H, 1, D]."""
        if not self._prepared(layer, row, plan, scale):
            segments = replace(plan.segments, base=base)
            return self._attention.attend(
                layer, row, q, row.n_done, segments, plan.leaves, scale, plan.tail
            )
        assert plan.prepared is not None
        started = time.monotonic()
        out = plan.prepared.attend(q, row.n_done, base)
        row.stats.attend_passes += 1
        row.stats.seconds_attend += time.monotonic() - started
        return out

    def _plan(self, layer: int, row: Row, position: int, selection: Selection | None) -> DecodePlan:
        attention, policy = self._attention, self._attention.policies[layer]
        # windows change as pages end, all layers' at once: so plans are made up to the next refresh
        until = position + attention.n_ahead[layer]
        until = max(position + 1, min(until, len(row.page_ids) * attention.page_tokens))
        if policy.tail and selection is not None:
            until = min(until, tail_until(position, policy))
        segments = attention.segments(layer, position, until - position, selection)
        leaves = attention.leaves_of(row, segments)
        tail = attention.tail(layer, row, position, position + 1, selection)
        return DecodePlan(selection, segments, leaves, tail, until)

    def _audited(self, layer: int, row: Row) -> bool:
        """Whether an audit begins here: in one layer of every audit_interval-th step, walking over layers
        (deterministic)."""
        if not self._audit_interval or row.audit is not None:
            return False
        step = row.n_done - row.n_prompt
        if step % self._audit_interval:
            return False
        n_layers = len(self._attention.policies)
        return layer == (row.n_done * 7 + step // self._audit_interval) % n_layers
