"""Whole page leaves across the link, copied by the device itself: pinned host memory into the bank and back.

One copy call a leaf would cost 5 to 7 us each; loads of 16 bytes by a few programs reach the link's rate
(performance.md 2.3: 55 GB/s * 1.5 us = 82 KB must be under way; a program has up to 32 KB).
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .gpu_bank import DeviceBank

PROGRAMS = 16
"""They fill the link and leave the other multiprocessors to compute."""
_WORDS = 8192
"""32-bit words that a program moves at once: 32 a thread, in 8 loads of 16 bytes."""
_WARPS = 8


def promote(bank: DeviceBank) -> None:
    """Copy what the last `update_residency` listed from host memory into its slots, and link it.

    bank: of one layer, or of all. After this step's attention in the layer and before its next update or
    selection, in the order of a stream or by an event. An empty list costs the launch alone.
    """
    _promote[(PROGRAMS,)](
        bank.promote_page,
        bank.promote_slot,
        bank.n_promote,
        bank.slot_of,
        bank.address,
        bank.host_address,
        bank.memory.data_ptr(),
        bank.n_slots,
        bank.n_page_ids,
        bank.promote_page.shape[1],
        bank.first_leaf,
        bank.n_banks,
        PROGRAMS=PROGRAMS,
        WORDS=bank.leaf_bytes // 4,
        BLOCK=min(_WORDS, triton.next_power_of_2(bank.leaf_bytes // 4)),
        num_warps=_WARPS,
    )


def copy_out(bank: DeviceBank, page_ids: Tensor) -> None:
    """Copy leaves of complete pages to their places at `host_address`. int32 [n] on the device, -1 = none.

    The pages stay pinned: once the host knows that the copy has ended (an event), it takes checksums and
    calls `mark_safe`. A page without a slot was written there at once and is left alone.
    """
    _copy_out[(PROGRAMS,)](
        bank.slot_of,
        bank.host_address,
        page_ids,
        page_ids.shape[0],
        bank.memory.data_ptr(),
        bank.n_slots,
        bank.n_page_ids,
        bank.first_leaf,
        bank.n_banks,
        PROGRAMS=PROGRAMS,
        WORDS=bank.leaf_bytes // 4,
        BLOCK=min(_WORDS, triton.next_power_of_2(bank.leaf_bytes // 4)),
        num_warps=_WARPS,
    )


@triton.jit
def _copy_leaf(source, target, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """WORDS 32-bit words (a multiple of 4) between byte addresses that are multiples of 16."""
    from_ = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
    to = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
    for start in tl.static_range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        # not through the first cache: others write these bytes while it may hold old ones
        words = tl.load(from_ + word, mask=word < WORDS, cache_modifier=".cg")
        tl.store(to + word, words, mask=word < WORDS)


@triton.jit(do_not_specialize=["first_leaf"])
def _promote(
    promote_page,
    promote_slot,
    n_promote,
    slot_of,
    address,
    host_address,
    memory,
    n_slots,
    n_page_ids,
    most,
    first_leaf,
    n_banks,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    me = tl.program_id(0)
    n_before = 0
    for h in range(0, n_banks):
        n = tl.load(n_promote + h)
        # entries of all banks are dealt in turn, whichever bank they are of
        first = (me + PROGRAMS - n_before % PROGRAMS) % PROGRAMS
        for i in range(first, n, PROGRAMS):
            page = tl.load(promote_page + h * most + i).to(tl.int64)
            slot = tl.load(promote_slot + h * most + i).to(tl.int64)
            source = tl.load(host_address + page) + (first_leaf + h) * (WORDS * 4)
            target = memory + (h * n_slots + slot) * (WORDS * 4)
            _copy_leaf(source, target, WORDS, BLOCK)
            tl.store(slot_of + h * n_page_ids + page, slot)
            tl.store(address + h * n_page_ids + page, target)
        n_before += n


@triton.jit(do_not_specialize=["first_leaf"])
def _copy_out(
    slot_of,
    host_address,
    page_ids,
    n,
    memory,
    n_slots,
    n_page_ids,
    first_leaf,
    n_banks,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for item in range(tl.program_id(0), n * n_banks, PROGRAMS):
        page = tl.load(page_ids + item // n_banks).to(tl.int64)
        h = item % n_banks
        if page >= 0:
            slot = tl.load(slot_of + h * n_page_ids + page).to(tl.int64)
            if slot >= 0:
                source = memory + (h * n_slots + slot) * (WORDS * 4)
                target = tl.load(host_address + page) + (first_leaf + h) * (WORDS * 4)
                _copy_leaf(source, target, WORDS, BLOCK)
