"""Pages as a GPU worker has them: those being written, copies of what it reads often, and the rest in host
memory that the device reads across the link. Kernels find a leaf by its address alone.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BankTooSmall, ConfigError
from ..kernels.gpu_bank import DeviceBank
from ..kernels.gpu_ops import forget
from ..kernels.gpu_pages import DevicePages
from ..kernels.paged import TORCH_DTYPE
from ..kvstore.page import Bytes, PageGeometry, has_checksums
from ..kvstore.page_client import PageClient, PageHandle
from .local_pages import LocalPages
from .page_errors import PageLost
from .row import Row

HELD = 1 << 30
"""In `slot_of`: the page is on the device, outside the bank of copies."""
ABSENT = -1


class Reachable(Protocol):
    """Makes host memory readable by the device."""

    def __call__(self, memory: Bytes, first: int, n_bytes: int) -> None:
        """Returns once bytes [first, first + n_bytes) of the memory can be read. Raises DeadlineExceeded."""
        ...


class GpuMemory:
    """A `PageMemory`.

    A new page is written whole, [layer][KV head] leaves as the store keeps them, into one of
    `n_written` places, which it leaves once it is in the store and its place is needed. Copies of pages
    that are read lie in a bank per layer and KV head, filled and cleared by kernels
    (`triton_residency`); this class never asks what is in it. All tables have fixed sizes, so that a
    captured graph finds them again.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        n_written: int,
        n_copies: int,
        n_page_ids: int,
        n_promoted: int,
        client: PageClient | None,
        device: torch.device,
        reachable: Reachable,
    ) -> None:
        self.geometry = geometry
        self.pages = LocalPages()
        self.n_page_ids = n_page_ids
        self._client = client
        self._reachable = reachable
        g = geometry
        # zeros: unwritten tokens of a page are masked, but must never be NaN that a product spreads
        self.written = torch.zeros(n_written, g.page_nbytes, dtype=torch.uint8, device=device)
        copies = torch.zeros(g.n_leaves, n_copies, g.leaf_nbytes, dtype=torch.uint8, device=device)
        self.bank = DeviceBank.empty(copies, g.n_kv_heads, n_page_ids, n_promoted)
        # a page number without a page reads the first place: any readable address would do
        self.bank.address.fill_(self.written.data_ptr())
        self._leaf_at = torch.arange(g.n_leaves, dtype=torch.int64, device=device) * g.leaf_nbytes
        """Bytes from the start of a page."""
        self._free = list(range(n_written - 1, -1, -1))
        self._place_of: dict[int, int] = {}
        self._safe: deque[int] = deque()
        """Pages in places that others may take, oldest first."""
        self._staging = torch.empty(
            g.page_nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )

    @property
    def n_slots(self) -> int:
        return len(self.written) * self.geometry.n_leaves + self.bank.owner.numel()

    @property
    def n_used(self) -> int:
        n_copies = int((self.bank.owner >= 0).sum())
        return len(self._place_of) * self.geometry.n_leaves + n_copies

    def view(self, layer: int, pages: Tensor) -> DevicePages:
        """One layer for a batch: pages int32 [B, most pages] on the device."""
        g = self.geometry
        return DevicePages(
            self.bank.address[layer * g.n_kv_heads : (layer + 1) * g.n_kv_heads],
            pages,
            g.page_tokens,
            g.head_dim,
            TORCH_DTYPE[g.kv_dtype],
            g.row_nbytes,
        )

    def hits_and_misses(self) -> tuple[int, int]:
        """Distinct pages per layer and KV head that selections found on the device, and those that they read
        across the link, since the start. Waits for the device."""
        return int(self.bank.n_hits.sum()), int(self.bank.n_misses.sum())

    def lay_out(self, first_byte: Tensor, page_ids: Tensor, *, held: bool) -> None:
        """These pages lie at these addresses, int64 like page_ids: held on the device, or at home on the
        host."""
        at = first_byte[None, :] + self._leaf_at[:, None]
        self.bank.address.index_copy_(1, page_ids, at)
        self.bank.slot_of.index_fill_(1, page_ids, HELD if held else ABSENT)
        if not held:
            self.bank.host_address.index_copy_(0, page_ids, first_byte)

    # --- PageMemory -----------------------------------------------------------------------------

    def place(self, page_id: int) -> None:
        self._check(page_id)
        if not self._free:
            if not self._safe:
                raise BankTooSmall(
                    f"all {len(self.written)} places for new pages hold pages that are not stored yet; "
                    "raise cache.device_pages"
                )
            self._send_home(self._safe.popleft())
        place = self._free.pop()
        self._place_of[page_id] = place
        start = self.written.data_ptr() + place * self.geometry.page_nbytes
        self.bank.address[:, page_id] = self._leaf_at + start
        self.bank.slot_of[:, page_id] = HELD

    def may_pin(self) -> bool:
        n_pinned = len(self._place_of) - len(self._safe)
        return 4 * (n_pinned + 1) <= 3 * len(self.written)

    def adopt(self, page_id: int) -> None:
        self._check(page_id)
        self._verify(page_id)
        self._set_host_address(page_id)
        self._point_home(page_id)

    def mark_safe(self, page_id: int) -> None:
        self._set_host_address(page_id)
        self._safe.append(page_id)

    def forget(self, page_ids: np.ndarray) -> None:
        ids = [int(i) for i in page_ids]
        for page_id in ids:
            place = self._place_of.pop(page_id, None)
            if place is not None:
                self._free.append(place)
        gone = set(ids)
        self._safe = deque(i for i in self._safe if i not in gone)
        if not ids:
            return
        bank = self.bank
        at = torch.tensor(ids, dtype=torch.int32, device=bank.owner.device)
        where = at.long()
        held = bank.slot_of.index_select(1, where) == HELD
        bank.slot_of.index_copy_(1, where, bank.slot_of[:, where].masked_fill(held, ABSENT))
        forget(bank, at)
        bank.address.index_fill_(1, where, self.written.data_ptr())
        bank.host_address.index_fill_(0, where, 0)

    def page_bytes(self, page_id: int) -> Bytes:
        self._staging.copy_(self.written[self._place_of[page_id]])
        return self._staging.numpy().copy()

    def pages_of_row(self, row: Row) -> int:
        at = torch.from_numpy(row.page_ids.array).to(self.bank.slot_of.device)
        held = self.bank.slot_of.index_select(1, at) != ABSENT
        return int(held.sum(dim=1).amax()) if len(at) else 0

    def close(self, row: Row) -> None:
        pass

    # --- homes ----------------------------------------------------------------------------------

    def _check(self, page_id: int) -> None:
        if page_id >= self.n_page_ids:
            raise ConfigError(
                f"page number {page_id} exceeds the {self.n_page_ids} that the device's tables have; "
                "lower worker.max_rows or raise model.max_context_tokens"
            )

    def _set_host_address(self, page_id: int) -> None:
        assert self._client is not None
        handle = self.pages.handles[page_id]
        assert handle is not None
        memory = self._client.memories[handle.memory]
        first = self._bytes_of(handle).start
        self._reachable(memory, first, self.geometry.page_nbytes)
        self.bank.host_address[page_id] = memory.ctypes.data + first

    def _point_home(self, page_id: int) -> None:
        self.bank.address[:, page_id] = self._leaf_at + self.bank.host_address[page_id]
        self.bank.slot_of[:, page_id] = ABSENT

    def _send_home(self, page_id: int) -> None:
        """A page gives up its place: it is read from its home from now on."""
        self._point_home(page_id)
        self._free.append(self._place_of.pop(page_id))

    def _verify(self, page_id: int) -> None:
        """Every leaf of a page that came from a store. Raises PageLost if no replica has good bytes."""
        assert self._client is not None
        handle = self.pages.handles[page_id]
        while handle is not None:
            if self._intact(handle):
                return
            handle = self._client.report_corrupt(handle)
            if handle is not None:
                self.pages.set_home(page_id, handle)
        raise PageLost(page_id)

    def _intact(self, handle: PageHandle) -> bool:
        assert self._client is not None
        page = self._client.memories[handle.memory][self._bytes_of(handle)]
        return has_checksums(page, self.geometry, handle.checksums)

    def _bytes_of(self, handle: PageHandle) -> slice:
        """Where a page lies in its memory."""
        first = handle.first_leaf_row * self.geometry.leaf_nbytes
        return slice(first, first + self.geometry.page_nbytes)


def always_reachable(memory: Bytes, first: int, n_bytes: int) -> None:
    """`Reachable` where device and host are one."""
