"""Checking the bytes of a slot: whoever reads pages in a store reads them here."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .page import Bytes, has_checksums
from .page_slots import PageSlots, Tier
from .page_table import BadReason, HeldPage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BadCopy:
    """A copy that was no good, in the slot where it was."""

    slot: int
    tier: Tier
    reason: BadReason


def read_checked(slots: PageSlots, page: HeldPage, slot: int) -> Bytes | BadCopy:
    """The bytes in a slot that holds a copy of the page and keeps it meanwhile: uint8 [page_nbytes],
    of the arena a view."""
    try:
        data = slots.read(slot)
    except OSError as exc:
        logger.warning("page %s cannot be read from disk: %s", page.key.hex()[:16], exc)
        return BadCopy(slot, slots.tier(slot), "unreadable")
    if has_checksums(data, slots.geometry, page.checksums):
        return data
    logger.warning("page %s is corrupt in the %s", page.key.hex()[:16], slots.tier(slot))
    return BadCopy(slot, slots.tier(slot), "corrupt")
