"""Attention of a prefill chunk: blocks of queries of one row."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.stage import QUERY_BLOCK
from .layer_attention import LayerAttention
from .prefill_bookmarks import PrefillBookmarks
from .row import Row


class PrefillStep:
    """Attention of one chunk of one row's prompt, from `start` on, in blocks [first, last) of queries
    that share a selection: of QUERY_BLOCK queries, and of `question_block` from `question_start` on.
    Bookmarks are rows behind the tokens'."""

    def __init__(
        self,
        attention: LayerAttention,
        row: Row,
        start: int,
        blocks: Sequence[tuple[int, int]],
        question_start: int,
        question_block: int,
        bookmarks: PrefillBookmarks | None = None,
    ) -> None:
        self._question_start = question_start
        self._question_block = question_block
        self._bookmarks = bookmarks
        self._attention = attention
        self._row = row
        self._start = start
        self._query_blocks = blocks
        self.seconds = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        started = time.monotonic()
        attention, row, beside = self._attention, self._row, self._bookmarks
        n_tokens = q.shape[1] - (0 if beside is None else len(beside))
        their_q, their_k, their_v = (x[:, n_tokens:] for x in (q, k, v))
        own_k, own_v = k[:, :n_tokens], v[:, :n_tokens]
        attention.memory.append(layer, row, self._start, own_k, own_v)
        if beside is not None:
            beside.enter(layer, their_q, their_k)
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2])  # [T, H, D]
        while True:
            self._blocks(layer, q, own_k, own_v, out, scale)
            if beside is not None:
                show = functools.partial(
                    attention.memory.show, layer, row, self._start, own_k, own_v
                )
                out[n_tokens:] = beside.attend(layer, their_q, their_k, their_v, scale, show)
            # once for all blocks of the chunk: a check costs as much as reading every key
            if not attention.mend(layer, row):
                break
        self.seconds += time.monotonic() - started
        return out

    def _blocks(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
    ) -> None:
        attention, row, beside = self._attention, self._row, self._bookmarks
        n_tokens = k.shape[1]
        # copies in numpy: torch would wake its threads for them, which then spin beside our own
        n_appended = self._start + n_tokens
        for first, last in self._query_blocks:
            at = slice(first - self._start, last - self._start)
            block = torch.from_numpy(np.ascontiguousarray(q.numpy()[:, at]))
            attention.memory.show(layer, row, self._start, k, v, first)
            bookmark = None if beside is None else beside.query(q[:, n_tokens:], last)
            in_question = first >= self._question_start
            selection = attention.select(
                layer,
                row,
                block,
                first,
                n_appended,
                scale,
                check=False,
                query_block=self._question_block if in_question else QUERY_BLOCK,
                bookmark=bookmark,
            )
            segments = attention.segments(layer, first, last - first, selection)
            leaves = attention.leaves_of(row, segments)
            tail = attention.tail(layer, row, first, n_appended, selection, check=False)
            merged = attention.attend(layer, row, block, first, segments, leaves, scale, tail)
            merged = attention.corrected(layer, row, block, first, n_appended, merged, scale)
            out.numpy()[at] = merged.numpy().swapaxes(0, 1)
