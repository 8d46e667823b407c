"""Pages that come into being and end, in all banks of the device at once: a slot while they are written, no
pin once they are safe, nothing when they are forgotten. As `workers/clock_residency.py`.

Called between steps with few page ids; not part of a captured step.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .gpu_bank import DeviceBank
from .triton_residency import SLOT_TILE, WARPS, tile_of, walk


def place_pages(bank: DeviceBank, page_ids: Tensor) -> None:
    """Slots for new pages that are being written, pinned and linked at once, as `ClockBank.place` one after
    the other. int32 [n] on the device, -1 = none; pages that have no slot yet.

    A page that finds no slot is linked to its place in host memory, where the device then writes it.
    """
    _place[(bank.n_banks,)](
        bank.owner,
        bank.referenced,
        bank.pinned,
        bank.hand,
        bank.slot_of,
        bank.address,
        bank.host_address,
        page_ids,
        page_ids.shape[0],
        bank.memory.data_ptr(),
        bank.n_slots,
        bank.n_page_ids,
        bank.first_leaf,
        LEAF_BYTES=bank.leaf_bytes,
        SLOTS=tile_of(bank.n_slots, SLOT_TILE),
        num_warps=WARPS,
    )


def mark_safe(bank: DeviceBank, page_ids: Tensor) -> None:
    """These pages are in host memory too: they may leave the bank. int32 [n] on the device, -1 = none."""
    _settle_each(bank, page_ids, mode=0)


def forget(bank: DeviceBank, page_ids: Tensor) -> None:
    """Free the slots of pages that nobody needs any more. int32 [n], -1 = none."""
    _settle_each(bank, page_ids, mode=1)


def link(bank: DeviceBank, page_ids: Tensor) -> None:
    """Addresses of pages whose `host_address` has changed. int32 [n], -1 = none."""
    _settle_each(bank, page_ids, mode=2)


def _settle_each(bank: DeviceBank, page_ids: Tensor, mode: int) -> None:
    n = page_ids.shape[0]
    _settle[(bank.n_banks, triton.cdiv(n, 256))](
        bank.owner,
        bank.referenced,
        bank.pinned,
        bank.slot_of,
        bank.address,
        bank.host_address,
        page_ids,
        n,
        bank.memory.data_ptr(),
        bank.n_slots,
        bank.n_page_ids,
        bank.first_leaf,
        MODE=mode,
        LEAF_BYTES=bank.leaf_bytes,
        BLOCK=256,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first_leaf"])
def _place(
    owner,
    referenced,
    pinned,
    hand,
    slot_of,
    address,
    host_address,
    page_ids,
    n,
    memory,
    n_slots,
    n_page_ids,
    first_leaf,
    LEAF_BYTES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program (bank): a slot for one new page after the other."""
    h = tl.program_id(0).to(tl.int64)
    at_ids = h * n_page_ids
    at = tl.load(hand + h)
    for i in range(0, n):
        page = tl.load(page_ids + i)
        want = tl.where(page >= 0, 1, 0)
        found, last = walk(
            owner + h * n_slots,
            referenced + h * n_slots,
            pinned + h * n_slots,
            slot_of + at_ids,
            address + at_ids,
            host_address,
            slot_of,
            -1,
            page_ids + i,
            slot_of,
            at,
            want,
            n_slots,
            (first_leaf + h) * LEAF_BYTES,
            STEP=False,
            SLOTS=SLOTS,
        )
        slot = (at + tl.maximum(last, 0)) % n_slots
        taken = found > 0
        tl.store(pinned + h * n_slots + slot, 1, mask=taken)
        tl.store(slot_of + at_ids + page, slot, mask=taken)
        host = tl.load(host_address + page, mask=page >= 0, other=0) + (first_leaf + h) * LEAF_BYTES
        here = memory + (h * n_slots + slot) * LEAF_BYTES
        tl.store(address + at_ids + page, tl.where(taken, here, host), mask=page >= 0)
        at = tl.where(taken, (slot + 1) % n_slots, at)
    tl.store(hand + h, at)


@triton.jit(do_not_specialize=["first_leaf"])
def _settle(
    owner,
    referenced,
    pinned,
    slot_of,
    address,
    host_address,
    page_ids,
    n,
    memory,
    n_slots,
    n_page_ids,
    first_leaf,
    MODE: tl.constexpr,
    LEAF_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (bank, ids): MODE 0 unpins, 1 forgets, 2 renews addresses."""
    h = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(page_ids + i, mask=i < n, other=-1)
    live = page >= 0
    at = slot_of + h * n_page_ids + page
    slot = tl.load(at, mask=live, other=-1)
    held = live & (slot >= 0)
    mine = h * n_slots + slot
    if MODE < 2:
        tl.store(pinned + mine, 0, mask=held)
    if MODE == 1:
        tl.store(owner + mine, -1, mask=held)
        tl.store(referenced + mine, 0, mask=held)
        tl.store(at, -1, mask=live)
        held = page < -1
    if MODE > 0:
        host = tl.load(host_address + page, mask=live, other=0) + (first_leaf + h) * LEAF_BYTES
        here = memory + mine * LEAF_BYTES
        tl.store(address + h * n_page_ids + page, tl.where(held, here, host), mask=live)
