"""Attention of a prefill chunk: blocks of queries of one row."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .layer_attention import LayerAttention
from .row import Row


class PrefillStep:
    """Attention of one chunk of one row's prompt, from `start` on, in blocks [first, last) of queries
    that share a selection."""

    def __init__(
        self,
        attention: LayerAttention,
        row: Row,
        start: int,
        blocks: Sequence[tuple[int, int]],
        question_block: int,
    ) -> None:
        self._question_block = question_block
        self._attention = attention
        self._row = row
        self._start = start
        self._query_blocks = blocks
        self.seconds = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        started = time.monotonic()
        attention, row = self._attention, self._row
        attention.memory.append(layer, row, self._start, k, v)
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2])  # [T, H, D]
        while True:
            self._blocks(layer, q, k, v, out, scale)
            # once for all blocks of the chunk: a check costs as much as reading every key
            if not attention.mend(layer, row):
                break
        self.seconds += time.monotonic() - started
        return out

    def _blocks(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
    ) -> None:
        attention, row = self._attention, self._row
        # copies in numpy: torch would wake its threads for them, which then spin beside our own
        n_appended = self._start + q.shape[1]
        for first, last in self._query_blocks:
            at = slice(first - self._start, last - self._start)
            block = torch.from_numpy(np.ascontiguousarray(q.numpy()[:, at]))
            attention.memory.show(layer, row, self._start, k, v, first)
            selection = attention.select(layer, row, block, first, n_appended, scale, check=False)
            segments = attention.segments(layer, first, last - first, selection)
            leaves = attention.leaves_of(row, segments)
            tail = attention.tail(layer, row, first, n_appended, selection, check=False)
            merged = attention.attend(layer, row, block, first, segments, leaves, scale, tail)
            merged = attention.corrected(layer, row, block, first, n_appended, merged, scale)
            out.numpy()[at] = merged.numpy().swapaxes(0, 1)
