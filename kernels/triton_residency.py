"""The device bank of page leaves, managed on the device: a clock for every layer and KV head, no host in the
loop (performance.md 4.3). Decisions are those of `workers/clock_residency.py`, which tests hold them to.

In a step whose selection changed, per layer: `update_residency` before or after attention, which reads
what is missing from host memory; then `promote` (triton_gather.py), which copies and links it. Victims
are never pages that the step reads.
"""

# kernels take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..core.stage import LayerPolicy
from .gpu_bank import DeviceBank
from .gpu_pages import DeviceMask, DevicePages

ID_TILE = 8192
"""Page ids that a program looks at together: 16 a thread, 6 turns for 3M tokens in pages of 64."""
SLOT_TILE = 2048
"""Slots likewise: 4 a thread, since a walk keeps many addresses in registers."""
WARPS = 16


def update_residency(
    bank: DeviceBank,
    pages: DevicePages,
    position: Tensor,
    mask: DeviceMask | None,
    policy: LayerPolicy,
    changed: Tensor,
) -> None:
    """Mark what the rows of a batch read in this layer and decide what comes and goes, as
    `ClockBank.plan` with most = promote_page.shape[1].

    bank: of this layer (bank.address is pages.address); position: int64 [B], -1 = empty place; mask: None
    for a dense policy, which reads every page; changed: int32 [1], 0 = the step reads what the last
    update saw: nothing is done, and nothing will be promoted.

    Victims are unlinked at once, what comes is listed and not yet linked: until `promote` it is read from
    host memory. Two launches.
    """
    n_rows, most_pages = pages.pages.shape
    blocks, n_blocks = (position, position) if mask is None else (mask.blocks, mask.n_blocks)
    _mark[(n_rows, bank.n_banks)](
        pages.pages,
        position,
        blocks,
        n_blocks,
        bank.wanted,
        bank.tick,
        changed,
        most_pages,
        bank.n_page_ids,
        most_blocks=1 if mask is None else blocks.shape[2],
        N_LISTS=0 if mask is None else mask.n_lists,
        SINK=policy.sink,
        WINDOW=policy.window,
        PAGE=pages.page_tokens,
        BLOCK=256,
        num_warps=4,
    )
    _clock[(bank.n_banks,)](
        bank.owner,
        bank.referenced,
        bank.pinned,
        bank.hand,
        bank.slot_of,
        bank.address,
        bank.host_address,
        bank.promote_page,
        bank.promote_slot,
        bank.n_promote,
        bank.n_hits,
        bank.n_misses,
        bank.wanted,
        bank.tick,
        changed,
        bank.n_slots,
        bank.n_page_ids,
        bank.promote_page.shape[1],
        bank.first_leaf,
        LEAF_BYTES=bank.leaf_bytes,
        IDS=tile_of(bank.n_page_ids, ID_TILE),
        SLOTS=tile_of(bank.n_slots, SLOT_TILE),
        num_warps=WARPS,
    )


def tile_of(n: int, most: int) -> int:
    """A power of two that n items fill, at most `most`."""
    return min(most, int(triton.next_power_of_2(n)))


@triton.jit
def _next_tick(tick, h):
    """Never 0, which is in `wanted` from the start; comes again after 2^30 updates."""
    return (tl.load(tick + h) & 0x3FFFFFFF) + 1


@triton.jit
def _mark(
    pages,
    position,
    blocks,
    n_blocks,
    wanted,
    tick,
    changed,
    most_pages,
    n_page_ids,
    most_blocks,
    N_LISTS: tl.constexpr,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, KV head): the tick into `wanted` of every page that the row reads there."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    p = tl.load(position + b)
    if (p >= 0) & (tl.load(changed) != 0):
        stamp = _next_tick(tick, h)
        pages += b * most_pages
        wanted += h * n_page_ids
        each = tl.arange(0, BLOCK)
        end = (p // PAGE + 1).to(tl.int32)
        first = end * 0  # a dense policy reads all
        if N_LISTS > 0:
            first = (tl.maximum(p - WINDOW + 1, 0) // PAGE).to(tl.int32)
            n_sink = (tl.minimum(p, SINK - 1) // PAGE + 1).to(tl.int32) if SINK > 0 else end * 0
            for start in range(0, tl.minimum(n_sink, first), BLOCK):
                live = start + each < n_sink
                page = tl.load(pages + start + each, mask=live, other=0)
                tl.store(wanted + page, stamp, mask=live)
            list_ = b * N_LISTS + (h if N_LISTS > 1 else 0)
            n = tl.load(n_blocks + list_)
            for start in range(0, n, BLOCK):
                live = start + each < n
                block = tl.load(blocks + list_ * most_blocks + start + each, mask=live, other=0)
                page = tl.load(pages + block // PAGE, mask=live, other=0)
                tl.store(wanted + page, stamp, mask=live)
        for start in range(first, end, BLOCK):
            live = start + each < end
            page = tl.load(pages + start + each, mask=live, other=0)
            tl.store(wanted + page, stamp, mask=live)


@triton.jit(do_not_specialize=["first_leaf"])
def _clock(
    owner,
    referenced,
    pinned,
    hand,
    slot_of,
    address,
    host_address,
    promote_page,
    promote_slot,
    n_promote,
    n_hits,
    n_misses,
    wanted,
    tick,
    changed,
    n_slots,
    n_page_ids,
    most,
    first_leaf,
    LEAF_BYTES: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program (KV head): list what is missing, find it slots, unlink their owners."""
    h = tl.program_id(0).to(tl.int64)
    if tl.load(changed) == 0:
        tl.store(n_promote + h, 0)
    else:
        stamp = _next_tick(tick, h)
        promote_page += h * most
        at_ids = h * n_page_ids
        hits = tl.load(n_hits + h)
        misses = tl.load(n_misses + h)
        n_missing = 0
        for start in range(0, n_page_ids, IDS):
            page = start + tl.arange(0, IDS)
            live = page < n_page_ids
            mine = tl.load(wanted + at_ids + page, mask=live, other=0) == stamp
            slot = tl.load(slot_of + at_ids + page, mask=mine, other=-1)
            host = tl.load(host_address + page, mask=mine, other=0)
            absent = mine & (slot < 0)
            comes = (absent & (host != 0)).to(tl.int32)
            rank = n_missing + tl.cumsum(comes, 0) - comes
            tl.store(promote_page + rank, page, mask=(comes != 0) & (rank < most))
            n_missing += tl.sum(comes, 0)
            n_absent = tl.sum(absent.to(tl.int32), 0)
            misses += n_absent
            hits += tl.sum(mine.to(tl.int32), 0) - n_absent
        want = tl.minimum(n_missing, most)
        at = tl.load(hand + h)
        found, last = walk(
            owner + h * n_slots,
            referenced + h * n_slots,
            pinned + h * n_slots,
            slot_of + at_ids,
            address + at_ids,
            host_address,
            wanted + at_ids,
            stamp,
            promote_page,
            promote_slot + h * most,
            at,
            want,
            n_slots,
            (first_leaf + h) * LEAF_BYTES,
            STEP=True,
            SLOTS=SLOTS,
        )
        if last >= 0:
            tl.store(hand + h, (at + last + 1) % n_slots)
        tl.store(n_promote + h, found)
        tl.store(n_hits + h, hits)
        tl.store(n_misses + h, misses)
        tl.store(tick + h, stamp)


@triton.jit
def walk(
    owner,
    referenced,
    pinned,
    slot_of,
    address,
    host_address,
    wanted,
    stamp,
    pages,
    slots,
    at,
    want,
    n_slots,
    leaf_offset,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """At most two rounds of a bank's hand from slot `at`: `want` victims get the owners `pages`.

    STEP: pages whose `wanted` is the stamp are being read, get their bits and stay; `slots` is written.
    Returns how many are found and how far from `at` the last one is.
    """
    found = 0
    last = -1
    for second in tl.static_range(2):
        # the list, and in the second round owners and bits, were written by other threads
        tl.debug_barrier()
        end = tl.where((second == 0) | (found < want), n_slots, 0)
        farthest = -1
        for start in range(0, end, SLOTS):
            offset = start + tl.arange(0, SLOTS)
            live = offset < n_slots
            slot = at + offset
            slot = tl.where(slot >= n_slots, slot - n_slots, slot)
            page = tl.load(owner + slot, mask=live, other=0)
            bit = tl.load(referenced + slot, mask=live, other=1)
            pin = tl.load(pinned + slot, mask=live, other=1)
            held = live & (page >= 0)
            read = page < -1  # none
            if STEP:
                read = tl.load(wanted + page, mask=held, other=0) == stamp
            idle = (bit == 0) & (pin == 0) & (read == 0)
            can = live & ((page < 0) | idle)
            before = found + tl.cumsum(can.to(tl.int32), 0) - can.to(tl.int32)
            passed = live & (before < want)
            taken = can & passed
            comes = tl.load(pages + before, mask=taken, other=0)
            goes = taken & held
            host = tl.load(host_address + page, mask=goes, other=0)
            tl.store(slot_of + page, -1, mask=goes)
            tl.store(address + page, host + leaf_offset, mask=goes)
            tl.store(owner + slot, comes, mask=taken)
            if STEP:
                tl.store(slots + before, slot, mask=taken)
            kept = tl.where(passed, 0, bit)
            tl.store(referenced + slot, tl.where(taken | read, 1, kept), mask=live)
            found += tl.sum(taken.to(tl.int32), 0)
            farthest = tl.maximum(farthest, tl.max(tl.where(taken, offset, -1), 0))
        last = tl.where(farthest >= 0, farthest, last)
    return found, last
