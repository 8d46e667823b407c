"""Which leaf is in which slot of one layer's device bank: what to fetch, what to evict (pure, LRU)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import BankTooSmall

_ABSENT = -1


@dataclass(frozen=True)
class FetchPlan:
    """What must move before a pass. leaves[i] goes into slots[i]; evicted leaves lose theirs."""

    leaves: np.ndarray
    slots: np.ndarray
    evicted: np.ndarray
    n_hits: int


class Residency:
    """One layer's slots. A leaf is a worker-local number (page id * KV heads + KV head).

    Unsafe leaves (not yet in the store) are pinned: only a safe page may leave the device
    (DESIGN 2.6). Decisions depend on the history of calls alone; ties go to the lower slot.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._slot_of = np.full(1024, _ABSENT, dtype=np.int64)
        self._owner = np.full(n_slots, _ABSENT, dtype=np.int64)
        self._last_used = np.zeros(n_slots, dtype=np.int64)
        self._unsafe = np.zeros(n_slots, dtype=bool)
        self._tick = 0
        self.version = 0
        """Grows whenever a leaf comes, goes or moves."""

    @property
    def n_resident(self) -> int:
        return int((self._owner != _ABSENT).sum())

    @property
    def n_unsafe(self) -> int:
        return int(self._unsafe.sum())

    def may_pin(self, n: int) -> bool:
        """Whether n more leaves could be unsafe with most of the bank still free to change."""
        return 4 * (self.n_unsafe + n) <= self.n_slots

    def slots_of(self, leaves: np.ndarray) -> np.ndarray:
        """Slot per leaf, -1 where absent. Any shape."""
        top = int(leaves.max(initial=0))
        if top >= len(self._slot_of):
            grown = np.full(max(top + 1, 2 * len(self._slot_of)), _ABSENT, dtype=np.int64)
            grown[: len(self._slot_of)] = self._slot_of
            self._slot_of = grown
        return self._slot_of[leaves]  # type: ignore[no-any-return]

    def fits(self, leaves: np.ndarray) -> bool:
        """Whether all of these distinct leaves can be resident at once."""
        slots = self.slots_of(leaves)
        mine = slots[slots != _ABSENT]
        others_unsafe = self.n_unsafe - int(self._unsafe[mine].sum())
        return len(leaves) <= self.n_slots - others_unsafe

    def touch(self, leaves: np.ndarray) -> bool:
        """`plan` for distinct leaves that are all resident (the usual case, and cheaper); False and
        no change if one is not."""
        slots = self.slots_of(leaves)
        if slots.min(initial=0) == _ABSENT:
            return False
        self._tick += 1
        self._last_used[slots] = self._tick
        return True

    def use(self, slots: np.ndarray) -> None:
        """`touch` by slots that are known to be good still."""
        self._tick += 1
        self._last_used[slots] = self._tick

    def plan(self, leaves: np.ndarray) -> FetchPlan:
        """Make distinct leaves resident; they stay until the next call of plan or place.

        Raises BankTooSmall when pinned leaves leave too little room; nothing is changed then.
        """
        self._tick += 1
        slots = self.slots_of(leaves)
        hit = slots != _ABSENT
        missing = leaves[~hit]
        kept = np.zeros(self.n_slots, dtype=bool)
        kept[slots[hit]] = True
        victims = self._victims(len(missing), kept)
        self._last_used[slots[hit]] = self._tick
        evicted = self._assign(missing, victims)
        return FetchPlan(missing, victims, evicted, int(hit.sum()))

    def place(self, leaves: np.ndarray) -> np.ndarray:
        """Give slots to new leaves that exist nowhere else yet; they are pinned until mark_safe.

        Returns their slots. Raises BankTooSmall when nothing can be evicted.
        """
        self._tick += 1
        victims = self._victims(len(leaves), np.zeros(self.n_slots, dtype=bool))
        self.slots_of(leaves)
        self._assign(leaves, victims)
        self._unsafe[victims] = True
        return victims

    def mark_safe(self, leaves: np.ndarray) -> None:
        slots = self.slots_of(leaves)
        self._unsafe[slots[slots != _ABSENT]] = False

    def forget(self, leaves: np.ndarray) -> None:
        """Free the slots of leaves that nobody needs any more (safe or not)."""
        slots = self.slots_of(leaves)
        mine = slots[slots != _ABSENT]
        self.version += 1
        self._owner[mine] = _ABSENT
        self._unsafe[mine] = False
        self._last_used[mine] = 0
        self._slot_of[leaves] = _ABSENT

    def _victims(self, n: int, kept: np.ndarray) -> np.ndarray:
        if n == 0:
            return np.empty(0, dtype=np.int64)
        free = self._owner == _ABSENT
        usable = np.flatnonzero(free | ~(self._unsafe | kept))
        if len(usable) < n:
            raise BankTooSmall(
                f"a pass needs {n} more slots of one layer, {len(usable)} can be freed "
                f"({self.n_slots} in all, {self.n_unsafe} hold pages that are not stored yet); "
                "raise cache.device_pages",
                needed=n,
                usable=len(usable),
            )
        # free slots first (they carry tick 0), then least recently used, ties to the lower slot: one
        # number each, so that the few victims are found without sorting all
        order = np.where(free[usable], 0, self._last_used[usable]) * self.n_slots + usable
        return np.sort(np.partition(order, n - 1)[:n]) % self.n_slots  # type: ignore[no-any-return]

    def _assign(self, leaves: np.ndarray, slots: np.ndarray) -> np.ndarray:
        self.version += bool(len(leaves))
        owners = self._owner[slots]
        evicted = owners[owners != _ABSENT]
        self._slot_of[evicted] = _ABSENT
        self._owner[slots] = leaves
        self._slot_of[leaves] = slots
        self._last_used[slots] = self._tick
        self._unsafe[slots] = False
        return evicted  # type: ignore[no-any-return]
