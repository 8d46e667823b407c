"""Where a row's pages are and how they move: reuse, bank residency, verified fetch, write-behind.

One object per engine, used by its thread alone. Decisions are residency.py's; this is the shell that
copies bytes and talks to the store.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..core.errors import BankTooSmall, DeadlineExceeded, NumericalError
from ..core.page_key import ROOT_KEY, PageKey, RecipeFingerprint, page_keys, private_recipe
from ..kernels.ops import PagedKV
from ..kvstore.page import PageGeometry
from ..kvstore.page_client import PageClient, PageHandle
from .bank import TORCH_DTYPE, Bank
from .local_pages import LocalPages
from .page_list import PageList
from .residency import Residency
from .row import Row

_log = logging.getLogger(__name__)
STORE_RETRY_S = 2.0
"""Pause before a page that no store took is offered again."""


class PageLost(Exception):
    """A page has no good copy left: the row starts again and recomputes it. Never leaves the worker."""

    def __init__(self, page_id: int) -> None:
        super().__init__(f"page {page_id} has no good copy")
        self.page_id = page_id


@dataclass
class _Write:
    page_id: int
    key: PageKey
    parent: PageKey
    future: Future[PageHandle]
    generation: int
    retry_at_s: float | None = None


class PageFlow:
    """Pages of all rows of one worker. `client` None keeps everything on the device (tests, no store)."""

    def __init__(
        self,
        geometry: PageGeometry,
        device_pages: int,
        recipe: RecipeFingerprint,
        client: PageClient | None,
        store_timeout_s: float,
    ) -> None:
        self.geometry = geometry
        self.bank = Bank(geometry, device_pages)
        self.pages = LocalPages()
        self.residency = [Residency(self.bank.n_slots) for _ in range(geometry.n_layers)]
        self._recipe = recipe
        self._client = client
        self._store_timeout_s = store_timeout_s
        self._heads = np.arange(geometry.n_kv_heads, dtype=np.int64)
        self._writes: list[_Write] = []
        self._claims: dict[PageKey, Row] = {}
        self._generation = np.zeros(0, dtype=np.int64)
        self._mapped: list[Tensor] = []
        self._drop_when_written: set[PageKey] = set()
        self._in_place: dict[str, dict[int, set[int]]] = {}
        """Pages of a row and layer that selection read in place since the last check."""

    # --- opening and closing rows ---------------------------------------------------------------

    def open(self, row: Row) -> PageKey | None:
        """Give the row every leading page that exists, here or in the store.

        Returns None when the row can go on, or the key of a page that another row is computing now:
        then the row holds nothing and should wait for it.
        """
        keys = row.keys
        row.n_unreadable_pages = 0
        n_here = 0
        while n_here < len(keys):
            page_id = self.pages.page_of_key.get(keys[n_here])
            if page_id is None or not self.pages.complete[page_id]:
                break
            n_here += 1
        if n_here < len(keys) and keys[n_here] in self._claims:
            return keys[n_here]
        row.page_ids = PageList([self.pages.page_of_key[key] for key in keys[:n_here]])
        for page_id in row.page_ids:
            self.pages.retain(page_id)
        if self._client is not None and n_here < len(keys):
            started = time.monotonic()
            for key, handle in self._acquire_leading(row, keys[n_here:]):
                page_id = self.pages.new(key, row.lease)
                self._bump(page_id)
                self.pages.set_home(page_id, handle)
                row.page_ids.append(page_id)
            row.stats.seconds_store += time.monotonic() - started
        row.n_existing_pages = len(row.page_ids)
        self._claims.update((key, row) for key in keys[row.n_existing_pages :])
        return None

    def _acquire_leading(
        self, row: Row, keys: Sequence[PageKey]
    ) -> list[tuple[PageKey, PageHandle]]:
        assert self._client is not None
        held = self._client.lookup(keys)
        n_held = held.index(False) if False in held else len(held)
        if not n_held:
            return []
        handles = self._client.acquire(keys[:n_held], row.lease)
        # a page behind a missing one is of no use: its prefix must be computed first
        n_good = handles.index(None) if None in handles else len(handles)
        row.n_unreadable_pages = n_held - n_good
        if not n_good:
            self._client.release(row.lease)
        return [(h.key, h) for h in handles[:n_good] if h is not None]

    def is_settled(self, key: PageKey) -> bool:
        """Whether a page that a row waits for is complete, or nobody computes it any more."""
        return key not in self._claims

    def close(self, row: Row) -> None:
        """The row lets go of its pages; private ones are dropped from the store."""
        self._in_place.pop(row.row_id, None)
        for key in row.keys[row.n_existing_pages :]:
            if self._claims.get(key) is row:
                del self._claims[key]
        for page_id in row.page_ids:
            gone, ended = self.pages.let_go(page_id)
            if gone:
                self._forget(page_id)
            if ended is not None and self._client is not None:
                self._client.release(ended)
        row.page_ids = PageList()
        if self._client is not None and row.private_keys:
            # a page that is still being written would outlive a drop that overtakes it
            writing = {write.key for write in self._writes}.intersection(row.private_keys)
            self._drop_when_written |= writing
            self._client.drop([key for key in row.private_keys if key not in writing])
        row.private_keys = []

    def _forget(self, page_id: int) -> None:
        leaves = self._leaves(np.array([page_id]))
        for residency in self.residency:
            residency.forget(leaves)
        self._bump(page_id)

    def _bump(self, page_id: int) -> None:
        """A page number is reused: writes started for its former page no longer concern it."""
        if page_id >= len(self._generation):
            grown = np.zeros(max(page_id + 1, 2 * len(self._generation)), dtype=np.int64)
            grown[: len(self._generation)] = self._generation
            self._generation = grown
        self._generation[page_id] += 1

    def versions_of(self, row: Row) -> np.ndarray:
        """How often each page number of the row has been given to a page, int64 [n_pages]."""
        return self._generation[row.page_ids.array]  # type: ignore[no-any-return]

    def lose(self, page_id: int) -> None:
        """Make a page unknown, so that the next row to open computes it again."""
        key = self.pages.keys[page_id]
        if key is not None and self.pages.page_of_key.get(key) == page_id:
            del self.pages.page_of_key[key]

    # --- writing --------------------------------------------------------------------------------

    def _leaves(self, page_ids: np.ndarray) -> np.ndarray:
        """Leaf numbers of pages, all KV heads: [n * Hkv]."""
        return (page_ids[:, None] * self.geometry.n_kv_heads + self._heads).reshape(-1)

    def reserve(self, row: Row, end: int) -> None:
        """Page numbers and bank slots for tokens up to `end`. Waits for the store if the bank is full."""
        page_tokens = self.geometry.page_tokens
        while len(row.page_ids) * page_tokens < end:
            page_index = len(row.page_ids)
            key = row.keys[page_index] if page_index < len(row.keys) else None
            page_id = self.pages.new(key, row.lease)
            self._bump(page_id)
            leaves = self._leaves(np.array([page_id]))
            try:
                for layer, residency in enumerate(self.residency):
                    self._with_room(row, functools.partial(residency.place, leaves), layer)
            except BaseException:
                for residency in self.residency:
                    residency.forget(leaves)
                _, ended = self.pages.let_go(page_id)
                if ended is not None and self._client is not None:
                    self._client.release(ended)
                raise
            row.page_ids.append(page_id)

    def _with_room(self, row: Row, act, layer: int):  # type: ignore[no-untyped-def]
        """Run a residency decision, waiting for pages under way to the store when it lacks room."""
        deadline = time.monotonic() + self._store_timeout_s
        while True:
            try:
                return act()
            except BankTooSmall:
                if not self._writes:
                    raise
                started = time.monotonic()
                if started > deadline:
                    raise DeadlineExceeded(
                        f"no bank slot of layer {layer} became free in {self._store_timeout_s} s: "
                        f"{len(self._writes)} pages wait for the store"
                    ) from None
                running = [w.future for w in self._writes if not w.future.done()]
                if running:
                    wait(running, timeout=1.0, return_when="FIRST_COMPLETED")
                else:
                    time.sleep(0.05)
                row.stats.seconds_store += time.monotonic() - started
                self.poll()

    def append(self, layer: int, row: Row, start: int, k: Tensor, v: Tensor) -> None:
        """Write K and V of tokens start … (k, v [Hkv, T, D]) into the bank.

        Tokens of pages that existed already are skipped: stored KV is never overwritten. Raises
        NumericalError naming layer and position if a number is not finite in the KV format.
        """
        page_tokens = self.geometry.page_tokens
        skip = max(0, row.n_existing_pages * page_tokens - start)
        n_tokens = k.shape[1]
        if skip >= n_tokens:
            return
        positions = np.arange(start + skip, start + n_tokens)
        pages = row.page_ids.array[positions // page_tokens]
        leaves = pages[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        slots = self.residency[layer].slots_of(leaves)
        wrong = self.bank.write(layer, slots, positions % page_tokens, k[:, skip:], v[:, skip:])
        if wrong >= 0:
            raise NumericalError(
                f"row {row.row_id}: a key or value of layer {layer} at position {positions[wrong]} "
                f"is not finite in {self.geometry.kv_dtype}; the row cannot be answered",
                row_id=row.row_id,
                layer=layer,
                position=int(positions[wrong]),
            )

    def complete(self, row: Row, start: int, end: int) -> None:
        """Pages that filled up with tokens start … end in all layers go to the store, behind us."""
        page_tokens = self.geometry.page_tokens
        started = time.monotonic()
        for page_index in range(start // page_tokens, end // page_tokens):
            page_id = row.page_ids[page_index]
            if self.pages.complete[page_id]:
                continue
            key, parent = self._name(row, page_index)
            self.pages.complete[page_id] = True
            self._claims.pop(key, None)
            if self._client is None:
                continue
            row.stats.bytes_device_to_store += self.geometry.page_nbytes
            self._store(page_id, key, parent)
        row.stats.seconds_store += time.monotonic() - started

    def _store(self, page_id: int, key: PageKey, parent: PageKey) -> None:
        assert self._client is not None
        leaves = self._leaves(np.array([page_id]))
        slots = np.stack([r.slots_of(leaves) for r in self.residency])
        page = self.bank.page_bytes(slots)
        future = self._client.store(key, parent, page, self.pages.group_of(page_id))
        generation = int(self._generation[page_id])
        self._writes.append(_Write(page_id, key, parent, future, generation))

    def _name(self, row: Row, page_index: int) -> tuple[PageKey, PageKey]:
        """Key and parent key of a full page; pages with answer tokens belong to their row alone."""
        parent = ROOT_KEY
        if page_index:
            parent = self.pages.keys[row.page_ids[page_index - 1]] or ROOT_KEY
        if page_index < len(row.keys):
            return row.keys[page_index], parent
        page_tokens = self.geometry.page_tokens
        first, last = page_index * page_tokens, (page_index + 1) * page_tokens
        sequence = [*row.request.prompt[first:last].tolist()]
        n_answer_before = max(0, first - row.n_prompt)
        sequence += row.tokens[n_answer_before : n_answer_before + page_tokens - len(sequence)]
        recipe = private_recipe(self._recipe, row.row_id)
        key = page_keys(sequence, recipe, page_tokens, parent)[0]
        self.pages.set_key(row.page_ids[page_index], key)
        row.private_keys.append(key)
        return key, parent

    def poll(self) -> None:
        """Take note of writes that ended: a safe page may leave the device; a failed one is tried
        again a little later, and stays on the device until then."""
        ended = [w for w in self._writes if w.future.done()]
        self._writes = [w for w in self._writes if not w.future.done()]
        for write in ended:
            if write.key in self._drop_when_written and self._client is not None:
                self._drop_when_written.discard(write.key)
                self._client.drop([write.key])
            if self._generation[write.page_id] != write.generation:
                continue  # its row ended meanwhile, and its lease group with it
            failure = write.future.exception()
            if failure is None:
                self._settle(write)
                continue
            now = time.monotonic()
            if write.retry_at_s is None:
                _log.warning("page %s is not stored yet: %s", write.key.hex()[:12], failure)
                write.retry_at_s = now + STORE_RETRY_S
            if now < write.retry_at_s:
                self._writes.append(write)
            else:
                self._store(write.page_id, write.key, write.parent)

    def _settle(self, write: _Write) -> None:
        self.pages.set_home(write.page_id, write.future.result())
        leaves = self._leaves(np.array([write.page_id]))
        for residency in self.residency:
            residency.mark_safe(leaves)

    def lost_leases(self) -> set[int]:
        """Pages whose lease a store ended: their bytes may be another page's by now."""
        if self._client is None:
            return set()
        lost = {group for group in self.pages.groups if self._client.lost(group)}
        if not lost:
            return set()
        ids = range(len(self.pages.keys))
        return {i for i in ids if self.pages.users[i] > 0 and self.pages.group_of(i) in lost}

    def flush(self, timeout_s: float) -> bool:
        """Wait until every write under way has ended; False if the time ran out."""
        wait([w.future for w in self._writes], timeout=timeout_s)
        self.poll()
        return not self._writes

    # --- reading --------------------------------------------------------------------------------

    def _memory(self, index: int) -> Tensor:
        assert self._client is not None
        while len(self._mapped) <= index:
            raw = self._client.memories[len(self._mapped)]
            g = self.geometry
            flat = torch.from_numpy(raw).view(TORCH_DTYPE[g.kv_dtype])
            self._mapped.append(flat.view(-1, 2, g.page_tokens, g.row_items))
        return self._mapped[index]

    def selection_view(self, layer: int, row: Row, n_tokens: int) -> PagedKV:
        """Every page of the row: from the bank where it is resident, else in place from its home.

        The caller notes what it reads with `note_in_place`.
        """
        page_ids = row.page_ids.array
        leaves = page_ids[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        slots = self.residency[layer].slots_of(leaves)
        absent = slots < 0
        memory, rows = np.zeros_like(slots), slots
        if absent.any():
            home = self.pages.home_memory[page_ids]
            leaf_in_page = layer * self.geometry.n_kv_heads + self._heads[:, None]
            home_rows = self.pages.home_row[page_ids][None, :] + leaf_in_page
            memory = np.where(absent, home[None, :] + 1, 0)
            rows = np.where(absent, home_rows, slots)
            self._memory(int(home.max()))
        return self._view(layer, memory, rows, n_tokens)

    def note_in_place(self, layer: int, row: Row, pages: np.ndarray) -> None:
        """These pages of the row were read through `selection_view`: `mend_in_place` will check those
        that are not in the bank."""
        if not len(pages):
            return
        leaves = row.page_ids.array[pages] * self.geometry.n_kv_heads + self._heads[:, None]
        absent = (self.residency[layer].slots_of(leaves) < 0).any(axis=0)
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
            handle = self.pages.handles[page_id]
            while handle is not None and not self._intact_in_place(layer, handle):
                mended = True
                handle = self._client.report_corrupt(handle)
                if handle is None:
                    raise PageLost(page_id)
                self.pages.set_home(page_id, handle)
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
        """The row's pages as far as they are in the bank (-1 where absent)."""
        page_ids = row.page_ids.array
        leaves = page_ids[None, :] * self.geometry.n_kv_heads + self._heads[:, None]
        rows = self.residency[layer].slots_of(leaves)
        return self._view(layer, np.zeros_like(rows), rows, n_tokens)

    def _view(self, layer: int, memory: np.ndarray, rows: np.ndarray, n_tokens: int) -> PagedKV:
        return PagedKV(
            memories=(self.bank.layers[layer], *self._mapped),
            memory=torch.from_numpy(np.ascontiguousarray(memory)),
            row=torch.from_numpy(np.ascontiguousarray(rows)),
            page_tokens=self.geometry.page_tokens,
            n_tokens=n_tokens,
        )

    def pages_on_device(self, row: Row) -> int:
        """Most pages of this row that the bank of any layer holds now."""
        leaves = self._leaves(row.page_ids.array)
        resident = [int((r.slots_of(leaves) >= 0).sum()) for r in self.residency]
        return max(resident, default=0) // self.geometry.n_kv_heads

    def fits(self, layer: int, leaves: np.ndarray) -> bool:
        return self.residency[layer].fits(leaves)

    def touch(self, layer: int, row: Row, leaves: np.ndarray) -> bool:
        """Use distinct leaves again if all are resident; otherwise nothing changes."""
        if not self.residency[layer].touch(leaves):
            return False
        row.stats.bank_hits += len(leaves)
        return True

    def slots_of(self, layer: int, leaves: np.ndarray) -> tuple[np.ndarray, int]:
        """Slots of resident leaves, and the version of residency that says so."""
        residency = self.residency[layer]
        return residency.slots_of(leaves), residency.version

    def touch_again(self, layer: int, row: Row, slots: np.ndarray, version: int) -> bool:
        """Use slots again if nothing has moved in the layer's bank since `version`."""
        residency = self.residency[layer]
        if residency.version != version:
            return False
        residency.use(slots)
        row.stats.bank_hits += len(slots)
        return True

    def make_resident(self, layer: int, row: Row, leaves: np.ndarray) -> None:
        """Bring distinct leaves into the bank, each checked against its checksum after the copy.

        Raises PageLost if no replica has good bytes, BankTooSmall if they cannot fit.
        """
        residency = self.residency[layer]
        plan = self._with_room(row, functools.partial(residency.plan, leaves), layer)
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
        memory = self.pages.home_memory[page_ids]
        rows = self.pages.home_row[page_ids] + layer * n_heads + heads
        for index in np.unique(memory):
            if index < 0:
                raise PageLost(int(page_ids[memory < 0][0]))
            mine = memory == index
            self.bank.load(layer, slots[mine], self._memory(int(index)), rows[mine])
        for page_id, head, slot in zip(page_ids, heads, slots, strict=True):
            self._verify(layer, int(page_id), int(head), int(slot))

    def _verify(self, layer: int, page_id: int, head: int, slot: int) -> None:
        leaf = layer * self.geometry.n_kv_heads + head
        handle = self.pages.handles[page_id]
        while handle is not None:
            if self.bank.checksum(layer, slot) == int(handle.checksums[leaf]):
                return
            assert self._client is not None
            handle = self._client.report_corrupt(handle)
            if handle is not None:
                self.pages.set_home(page_id, handle)
                source = self._memory(handle.memory)
                self.bank.load(
                    layer, np.array([slot]), source, np.array([handle.first_leaf_row + leaf])
                )
        raise PageLost(page_id)
