"""What kernels know of the rows that a GPU decodes together: arrays with a place for each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from ..kernels.gpu_pages import DeviceMask
from .row import Row

EMPTY = -1


class DeviceBatch:
    """Places 0 … most_rows - 1. A row keeps its place while it decodes; what each layer selected for it is
    kept there too (the mask is the row's, not the step's). Sizes never change."""

    def __init__(
        self,
        most_rows: int,
        most_pages: int,
        policies: Sequence[LayerPolicy],
        n_kv_heads: int,
        device: torch.device,
    ) -> None:
        self.most_rows = most_rows
        self._row_at: list[str | None] = [None] * most_rows
        pinned = device.type == "cuda"

        def both(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            host = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
            return host, host.to(device, copy=True)

        self._numbers, self.numbers = both((4, most_rows), torch.int64)
        """position, tokens whose KV exists already, token id, whether this is the first step."""
        self._pages, self.pages = both((most_rows, most_pages), torch.int32)
        self._n_pages_sent = [0] * most_rows
        self.bad = torch.zeros(len(policies), most_rows, dtype=torch.int32, device=device)
        """1: a new key or value of the row was not finite in that layer."""
        self.masks: list[DeviceMask | None] = [
            None if p.dense else DeviceMask.empty(p, most_rows, n_kv_heads, device)
            for p in policies
        ]

    @property
    def position(self) -> Tensor:
        """int64 [most_rows]: of the token being decoded, -1 = nobody is there."""
        return self.numbers[0]

    @property
    def n_existing(self) -> Tensor:
        return self.numbers[1]

    @property
    def token(self) -> Tensor:
        return self.numbers[2]

    @property
    def fresh(self) -> Tensor:
        return self.numbers[3]

    def place_of(self, row: Row) -> int | None:
        return self._row_at.index(row.row_id) if row.row_id in self._row_at else None

    def load(self, rows: Sequence[Row], page_tokens: int) -> list[int]:
        """Tell the device what this step is about. Returns the places of the rows."""
        places = [self._enter(row) for row in rows]
        numbers = self._numbers.numpy()
        numbers[0] = EMPTY
        numbers[3] = 0
        for row, at in zip(rows, places, strict=True):
            n_existing = row.n_existing_pages * page_tokens
            first = self._n_pages_sent[at] == 0
            numbers[:, at] = row.n_done, n_existing, row.next_token(), first
            self._send_pages(row, at)
        self.numbers.copy_(self._numbers, non_blocking=True)
        return places

    def leave(self, row: Row) -> None:
        """The row's place is free; whoever takes it starts afresh."""
        at = self.place_of(row)
        if at is not None:
            self._row_at[at] = None
            self._n_pages_sent[at] = 0

    def n_places(self, places: Sequence[int]) -> int:
        """Leading places that hold all of these."""
        return max(places) + 1

    def _enter(self, row: Row) -> int:
        at = self.place_of(row)
        if at is None:
            at = self._row_at.index(None)
            self._row_at[at] = row.row_id
            self._n_pages_sent[at] = 0
        return at

    def _send_pages(self, row: Row, at: int) -> None:
        sent, n_pages = self._n_pages_sent[at], len(row.page_ids)
        if sent == n_pages:
            return
        new = slice(sent, n_pages)
        self._pages.numpy()[at, new] = row.page_ids.array[new].astype(np.int32)
        self.pages[at, new].copy_(self._pages[at, new], non_blocking=True)
        self._n_pages_sent[at] = n_pages
