"""Attention of one decoded token of many rows, planned once for as many tokens as it stays the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.ops import (
    MassAudit,
    PreparedDecode,
    Segments,
    Selection,
    base_of,
    good_until,
)
from .layer_attention import LayerAttention, Tail
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
        selection = attention.select(layer, row, q, position, position + 1, scale, previous, level)
        row.selections[layer] = selection
        plan = row.plans[layer]
        if plan is None or plan.selection is not selection or position >= plan.until:
            plan = self._plan(layer, row, position, selection)
            row.plans[layer] = plan
        out = self._attend(layer, row, q, position, plan, scale)
        self._audit(layer, row, q, selection, scale)
        return out[:, 0]

    def _attend(
        self, layer: int, row: Row, q: Tensor, position: int, plan: DecodePlan, scale: float
    ) -> Tensor:
        pages, base = self._attention.pages, plan.segments.base
        if plan.selection is not None:
            base = base_of(position, plan.selection, self._attention.policies[layer])
        version = None
        if plan.prepared is not None:
            version = pages.touch_again(layer, row, plan.leaves, plan.slots, plan.version)
        if version is not None:
            plan.version = version
        else:
            if not pages.touch(layer, row, plan.leaves):
                if not pages.fits(layer, plan.leaves):
                    segments = replace(plan.segments, base=base)
                    return self._attention.attend(
                        layer, row, q, position, segments, plan.leaves, scale, plan.tail
                    )
                pages.make_resident(layer, row, plan.leaves)
            plan.slots, plan.version = pages.slots_of(layer, plan.leaves)
            plan.prepared = self._attention.prepare(
                layer, row, position, plan.segments, plan.tail, scale
            )
        assert plan.prepared is not None
        started = time.monotonic()
        out = plan.prepared.attend(q, position, base)
        row.stats.attend_passes += 1
        row.stats.seconds_attend += time.monotonic() - started
        return out

    def _plan(self, layer: int, row: Row, position: int, selection: Selection | None) -> DecodePlan:
        attention = self._attention
        policy, page_tokens = attention.policies[layer], attention.flow.geometry.page_tokens
        segments = attention.segments(layer, position, 1, selection)
        until = position + 1
        if selection is not None:
            until = good_until(position, selection, policy, page_tokens)
        leaves = attention.leaves_of(row, segments)
        tail = attention.tail(layer, row, position, position + 1, selection)
        return DecodePlan(selection, segments, leaves, tail, until)

    def _audit(
        self, layer: int, row: Row, q: Tensor, selection: Selection | None, scale: float
    ) -> None:
        """Begin an audit in one layer of every audit_interval-th step, walking over layers and heads
        (deterministic), and go on with it a piece per step, so that none of them takes long."""
        attention, position = self._attention, row.n_done
        started = time.monotonic()
        if row.audit is None:
            if selection is None or not self._audited(layer, row):
                return
            policy, head = attention.policies[layer], position % q.shape[0]
            audit = MassAudit(q, position, head, selection, policy, attention.rope, scale)
            row.audit = (layer, audit)
        elif row.audit[0] != layer:
            return
        share = row.audit[1].advance(attention.pages.selection_view(layer, row, position + 1))
        if share is not None:
            row.stats.mass_kept_sum += share
            row.stats.mass_kept_n += 1
            row.audit = None
        row.stats.seconds_other += time.monotonic() - started

    def _audited(self, layer: int, row: Row) -> bool:
        if not self._audit_interval:
            return False
        step = row.n_done - row.n_prompt
        if step % self._audit_interval:
            return False
        n_layers = len(self._attention.policies)
        return layer == (row.n_done * 7 + step // self._audit_interval) % n_layers
