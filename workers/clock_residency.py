"""Which page leaf is in which slot of one KV head's bank, by the clock: what the device decides without
the host (pure; performance.md 2.3 and 4.3).

`kernels/triton_residency.py` decides the same on the device. Unlike residency.py a miss is no reason to
wait: what has no slot is read where it lies in host memory, so that nothing here can fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ABSENT = -1


@dataclass(frozen=True)
class ClockPlan:
    """What a step promotes: missing[i] goes into slots[i]. int64 arrays."""

    missing: np.ndarray
    """Pages that come, ascending: of those that were read and not resident, the lowest."""
    slots: np.ndarray
    evicted: np.ndarray
    """Pages that lost their slots, in the order in which the hand met them."""
    n_hits: int
    n_misses: int
    """All pages that were read from the host, promoted now or not."""


class ClockBank:
    """Slots of one (layer, KV head). Page ids are small integers; decisions depend on the history alone.

    The hand goes round. A slot that is free, or neither referenced nor pinned, is taken; a referenced
    one loses its bit and is taken if the hand meets it again. At most two rounds a call.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.owner = np.full(n_slots, _ABSENT, dtype=np.int32)
        self.referenced = np.zeros(n_slots, dtype=bool)
        self.pinned = np.zeros(n_slots, dtype=bool)
        """Pages whose only copy is here."""
        self.hand = 0
        self._slot_of = np.full(1024, _ABSENT, dtype=np.int32)

    def slots_of(self, page_ids: np.ndarray) -> np.ndarray:
        """Slot per page, -1 where absent. Any shape."""
        top = int(page_ids.max(initial=0))
        if top >= len(self._slot_of):
            grown = np.full(max(top + 1, 2 * len(self._slot_of)), _ABSENT, dtype=np.int32)
            grown[: len(self._slot_of)] = self._slot_of
            self._slot_of = grown
        return self._slot_of[page_ids]  # type: ignore[no-any-return]

    def plan(self, page_ids: np.ndarray, most: int) -> ClockPlan:
        """A step reads these distinct pages (ascending): mark them, and give slots to missing ones.

        At most `most` are promoted, fewer if not enough slots can be freed. Pages that this step reads
        and pinned ones keep their slots.
        """
        slots = self.slots_of(page_ids)
        hit = slots != _ABSENT
        read = np.zeros(self.n_slots, dtype=bool)
        read[slots[hit]] = True
        self.referenced |= read
        missing = page_ids[~hit][:most]
        victims = self._victims(len(missing), read)
        missing = missing[: len(victims)]
        evicted = self._assign(missing, victims)
        n_hits = int(hit.sum())
        return ClockPlan(missing, victims, evicted, n_hits, len(page_ids) - n_hits)

    def place(self, page_id: int) -> int:
        """A slot for a new page that is being written, pinned until `mark_safe`. -1 if there is none:
        then it is written in its place in host memory."""
        victims = self._victims(1, np.zeros(self.n_slots, dtype=bool))
        if not len(victims):
            return _ABSENT
        self._assign(np.array([page_id]), victims)
        self.pinned[victims] = True
        return int(victims[0])

    def mark_safe(self, page_ids: np.ndarray) -> None:
        """These pages are in host memory too."""
        slots = self.slots_of(page_ids)
        self.pinned[slots[slots != _ABSENT]] = False

    def forget(self, page_ids: np.ndarray) -> None:
        """Free the slots of pages that nobody needs any more, pinned or not."""
        slots = self.slots_of(page_ids)
        mine = slots[slots != _ABSENT]
        self.owner[mine] = _ABSENT
        self.referenced[mine] = self.pinned[mine] = False
        self._slot_of[page_ids] = _ABSENT

    def _victims(self, n: int, read: np.ndarray) -> np.ndarray:
        """At most n slots in the order in which the hand takes them; clears bits, moves the hand.

        The walk as prefix sums: a slot is taken if it can be and fewer than n before it were; the hand
        passed it if fewer than n before it were.
        """
        round_ = (self.hand + np.arange(self.n_slots)) % self.n_slots
        free = self.owner[round_] == _ABSENT
        stays = self.pinned[round_] | read[round_]
        referenced = self.referenced[round_]
        can = free | ~(referenced | stays)
        before = can.cumsum() - can
        passed = before < n
        first = np.flatnonzero(can & passed)
        self.referenced[round_[passed & ~read[round_]]] = False
        # the second round finds what lost its bit in the first, which went all the way
        again = referenced & ~free & ~stays
        second = np.flatnonzero(again)[: n - len(first)]
        taken = np.concatenate([first, second])
        if len(taken):
            self.hand = int(round_[taken[-1]] + 1) % self.n_slots
        return round_[taken]  # type: ignore[no-any-return]

    def _assign(self, page_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        owners = self.owner[slots]
        evicted = owners[owners != _ABSENT].astype(np.int64)
        self._slot_of[evicted] = _ABSENT
        self.slots_of(page_ids)
        self.owner[slots] = page_ids
        self._slot_of[page_ids] = slots
        self.referenced[slots] = True
        return evicted  # type: ignore[no-any-return]
