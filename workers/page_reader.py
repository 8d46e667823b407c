"""Reading a row's pages: views for selection and attention, residency, and the check of every byte that
comes from a store. Decisions are residency.py's."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..kernels.ops import TORCH_DTYPE, PagedKV
from ..kvstore.page import PageGeometry
from ..kvstore.page_client import PageClient, PageHandle
from .bank import Bank
from .local_pages import LocalPages
from .open_blocks import OpenBlocks
from .page_errors import PageLost
from .residency import Residency
from .row import Row

WithRoom = Callable[[Row, Callable[[], Any]], Any]
"""Runs a residency decision for a row, waiting for pages under way to the store when the bank lacks
room."""


def at_once(row: Row, act: Callable[[], Any]) -> Any:
    """A `WithRoom` that waits for nothing."""
    return act()


class PageReader:
    """Pages of all rows of one worker, for its one thread. `client` None: nothing leaves the device."""

    def __init__(
        self,
        geometry: PageGeometry,
        bank: Bank,
        pages: LocalPages,
        residency: Sequence[Residency],
        client: PageClient | None,
        open_blocks: OpenBlocks | None = None,
    ) -> None:
        self.geometry = geometry
        self._bank = bank
        self._pages = pages
        self._residency = residency
        self._client = client
        self._open = open_blocks
        self.with_room: WithRoom = at_once
        self._heads = np.arange(geometry.n_kv_heads, dtype=np.int64)
        self._mapped: list[Tensor] = []
        self._in_place: dict[str, dict[int, set[int]]] = {}
        """Pages of a row and layer that were read in place since the last check."""

    def close(self, row: Row) -> None:
        self._in_place.pop(row.row_id, None)
        if self._client is not None:
            for i, raw in enumerate(self._client.memories[: len(self._mapped)]):
                if not len(raw) and len(self._mapped[i]):
                    self._mapped[i] = self._mapped[i][:0].clone()  # of a dead store: given back

    def _memory(self, index: int) -> Tensor:
        assert self._client is not None
        while len(self._mapped) <= index:
            raw = self._client.memories[len(self._mapped)]
            g = self.geometry
            flat = torch.from_numpy(raw).view(TORCH_DTYPE[g.kv_dtype])
            self._mapped.append(flat.view(-1, 2, g.page_tokens, g.row_items))
        return self._mapped[index]

    def selection_view(
        self, layer: int, row: Row, n_tokens: int, position: int | None = None
    ) -> PagedKV:
        """Every page of the row: from the bank where it is resident, else in place from its home.

        With a position its queries see all tokens of their own block; without, only those of full blocks may
        be read in formats that round blocks. The caller notes what it reads with `note_in_place`.
        """
        page_ids = row.page_ids.array
        leaves = page_ids[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        slots = self._residency[layer].slots_of(leaves)
        absent = slots < 0
        memory, rows = np.zeros_like(slots), slots
        if absent.any():
            home = self._pages.home_memory[page_ids]
            leaf_in_page = layer * self.geometry.n_kv_heads + self._heads[:, None]
            home_rows = self._pages.home_row[page_ids][None, :] + leaf_in_page
            memory = np.where(absent, home[None, :] + 1, 0)
            rows = np.where(absent, home_rows, slots)
            self._memory(int(home.max()))
        return self._view(layer, row, memory, rows, n_tokens, position)

    def note_in_place(self, layer: int, row: Row, pages: np.ndarray) -> None:
        """These pages of the row were read through `selection_view`: `mend_in_place` will check those
        that are not in the bank."""
        if not len(pages):
            return
        leaves = row.page_ids.array[pages] * self.geometry.n_kv_heads + self._heads[:, None]
        absent = (self._residency[layer].slots_of(leaves) < 0).any(axis=0)
        if absent.any():
            in_place = self._in_place.setdefault(row.row_id, {}).setdefault(layer, set())
            in_place.update(pages[absent].tolist())

    def mend_in_place(self, layer: int, row: Row) -> bool:
        """Check the pages that were read in place since the last check. Bytes that were wrong when they
        were read are wrong still, so a check after use misses nothing, whoever flipped them.

        True if a copy was bad and a good one took its place: what was made of the former must be
        made again. Raises PageLost if there is no good copy.
        """
        read = self._in_place.get(row.row_id, {}).pop(layer, set())
        if self._client is None or not read:
            return False
        mended = False
        for page_id in (row.page_ids[i] for i in sorted(read)):
            handle = self._pages.handles[page_id]
            while handle is not None and not self._intact_in_place(layer, handle):
                mended = True
                handle = self._client.report_corrupt(handle)
                if handle is None:
                    raise PageLost(page_id)
                self._pages.set_home(page_id, handle)
        return mended

    def _intact_in_place(self, layer: int, handle: PageHandle) -> bool:
        assert self._client is not None
        n_bytes, n_heads = self.geometry.leaf_nbytes, self.geometry.n_kv_heads
        memory = self._client.memories[handle.memory]
        first = layer * n_heads
        at = (handle.first_leaf_row + first) * n_bytes
        for leaf, checksum in enumerate(handle.checksums[first : first + n_heads].tolist()):
            start = at + leaf * n_bytes
            if xxhash.xxh3_64_intdigest(memory[start : start + n_bytes].data) != checksum:
                return False
        return True

    def bank_view(self, layer: int, row: Row, n_tokens: int) -> PagedKV:
        """The row's pages as far as they are in the bank (-1 where absent), for queries of the last token's
        block."""
        page_ids = row.page_ids.array
        leaves = page_ids[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        rows = self._residency[layer].slots_of(leaves)
        return self._view(layer, row, np.zeros_like(rows), rows, n_tokens, n_tokens - 1)

    def _view(
        self,
        layer: int,
        row: Row,
        memory: np.ndarray,
        rows: np.ndarray,
        n_tokens: int,
        position: int | None,
    ) -> PagedKV:
        block = None
        if self._open is not None and position is not None:
            block = self._open.view(layer, row, position)
        return PagedKV(
            memories=(self._bank.layers[layer], *self._mapped),
            memory=torch.from_numpy(np.ascontiguousarray(memory)),
            row=torch.from_numpy(np.ascontiguousarray(rows)),
            page_tokens=self.geometry.page_tokens,
            n_tokens=n_tokens,
            open=block,
        )

    def fits(self, layer: int, leaves: np.ndarray) -> bool:
        return self._residency[layer].fits(leaves)

    def touch(self, layer: int, row: Row, leaves: np.ndarray) -> bool:
        """Use distinct leaves again if all are resident; otherwise nothing changes."""
        if not self._residency[layer].touch(leaves):
            return False
        row.stats.bank_hits += len(leaves)
        return True

    def slots_of(self, layer: int, leaves: np.ndarray) -> tuple[np.ndarray, int]:
        """Slots of resident leaves, and the version of residency that says so."""
        residency = self._residency[layer]
        return residency.slots_of(leaves), residency.version

    def still_at(
        self, layer: int, leaves: np.ndarray, slots: np.ndarray, version: int
    ) -> int | None:
        """The version of a layer's residency now, if leaves are in the slots in which they were at `version`;
        None if one of them has moved."""
        residency = self._residency[layer]
        if residency.version != version and not np.array_equal(residency.slots_of(leaves), slots):
            return None
        return residency.version

    def touch_again(
        self, layer: int, row: Row, leaves: np.ndarray, slots: np.ndarray, version: int
    ) -> int | None:
        """`still_at`, and if so use the leaves again."""
        now = self.still_at(layer, leaves, slots, version)
        if now is not None:
            self._residency[layer].use(slots)
            row.stats.bank_hits += len(slots)
        return now

    def make_resident(self, layer: int, row: Row, leaves: np.ndarray) -> None:
        """Bring distinct leaves into the bank, each checked against its checksum after the copy.

        Raises PageLost if no replica has good bytes, BankTooSmall if they cannot fit.
        """
        residency = self._residency[layer]
        plan = self.with_room(row, functools.partial(residency.plan, leaves))
        row.stats.bank_hits += plan.n_hits
        row.stats.bank_misses += len(plan.leaves)
        if not len(plan.leaves):
            return
        started = time.monotonic()
        try:
            self._fetch(layer, plan.leaves, plan.slots)
        except BaseException:
            # slots that were promised but not filled must not be read later
            residency.forget(plan.leaves)
            raise
        row.stats.bytes_store_to_device += len(plan.leaves) * self.geometry.leaf_nbytes
        row.stats.seconds_fetch += time.monotonic() - started

    def _fetch(self, layer: int, leaves: np.ndarray, slots: np.ndarray) -> None:
        n_heads = self.geometry.n_kv_heads
        page_ids, heads = leaves // n_heads, leaves % n_heads
        memory = self._pages.home_memory[page_ids]
        rows = self._pages.home_row[page_ids] + layer * n_heads + heads
        for index in np.unique(memory):
            if index < 0:
                raise PageLost(int(page_ids[memory < 0][0]))
            mine = memory == index
            self._bank.load(layer, slots[mine], self._memory(int(index)), rows[mine])
        for page_id, head, slot in zip(page_ids, heads, slots, strict=True):
            self._verify(layer, int(page_id), int(head), int(slot))

    def _verify(self, layer: int, page_id: int, head: int, slot: int) -> None:
        leaf = layer * self.geometry.n_kv_heads + head
        handle = self._pages.handles[page_id]
        while handle is not None:
            if self._bank.checksum(layer, slot) == int(handle.checksums[leaf]):
                return
            assert self._client is not None
            handle = self._client.report_corrupt(handle)
            if handle is not None:
                self._pages.set_home(page_id, handle)
                source = self._memory(handle.memory)
                self._bank.load(
                    layer, np.array([slot]), source, np.array([handle.first_leaf_row + leaf])
                )
        raise PageLost(page_id)
