"""The bookmarks that pass through the model beside a chunk of prefill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .bookmark_index import BookmarkIndex, Show
from .bookmarks import attend_own_page
from .row import Row


class PrefillBookmarks:
    """One behind every page that the chunk [start, end) completes, one behind every block of queries where
    they select, and one behind the prompt, whose queries are those of the first decode step."""

    def __init__(
        self,
        index: BookmarkIndex,
        row: Row,
        start: int,
        end: int,
        blocks: Sequence[tuple[int, int]],
    ) -> None:
        self._index = index
        self._row = row
        page_tokens = index.page_tokens
        self._pages = range(start // page_tokens, end // page_tokens)
        ends = {(page + 1) * page_tokens for page in self._pages}
        if index.in_prefill:
            ends.update(last for _, last in blocks)
        if end == row.n_prompt:
            ends.add(end)
        in_order = sorted(ends)
        self._at = {behind: i for i, behind in enumerate(in_order)}
        self._positions = np.array(in_order, dtype=np.int64) - 1
        self._n_tokens = torch.from_numpy((self._positions + 1).clip(max=page_tokens))
        self._page_rows = [self._at[(page + 1) * page_tokens] for page in self._pages]
        self._last: list[Tensor] = []

    def __len__(self) -> int:
        """Bookmarks: rows behind those of the chunk's tokens."""
        return len(self._positions)

    def enter(self, layer: int, q: Tensor, k: Tensor) -> None:
        """A layer's q [H, n, D] and k [Hkv, n, D] of the bookmarks."""
        if layer in self._index.layers and self._pages:
            keys = k[:, self._page_rows].transpose(0, 1)
            self._index.put(layer, self._row, self._pages, keys)
        if self._row.n_prompt in self._at and layer < self._index.n_layers:
            self._last.append(q[:, self._at[self._row.n_prompt]].clone())

    def query(self, q: Tensor, behind: int) -> Tensor | None:
        """[H, D] of q [H, n, D]: of the bookmark before position `behind`; None where none is there."""
        at = self._at.get(behind)
        return None if at is None else q[:, at].contiguous()

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, show: Show
    ) -> Tensor:
        """Of each to the page before it and itself: [n, H, D]. Reads in place: the caller sees to `mend`."""
        if layer + 1 >= self._index.n_layers:
            return q.new_zeros(q.shape[1], q.shape[0], q.shape[2])  # of no use to anybody
        page_k, page_v = self._index.read(layer, self._row, self._positions, show)
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
        return attend_own_page(q, k, v, page_k, page_v, self._n_tokens, self._index.rope, scale)

    def finish(self) -> None:
        """All layers are done."""
        if self._pages:
            self._index.made(self._row, self._pages)
        if self._last:
            self._row.bookmark = (self._row.n_prompt, torch.stack(self._last))
