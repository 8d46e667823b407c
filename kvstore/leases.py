"""What the users of a store hold, each under one lease with one deadline."""

from __future__ import annotations

from dataclasses import dataclass, field

from .page_table import HeldPage


@dataclass(eq=False, slots=True)
class OpenWrite:
    """A slot between prepare_store and complete_store."""

    write_id: int
    page: HeldPage
    owner: str


@dataclass(eq=False, slots=True)
class Lease:
    """All that one owner pins, with one deadline: renewing it is one operation."""

    deadline_s: float
    passing: bool = False
    """Its owner copies pages on, which is no use of them: they grow neither recent nor shared by it."""
    pages: dict[HeldPage, None] = field(default_factory=dict)  # in order of acquisition
    writes: dict[int, OpenWrite] = field(default_factory=dict)


class Leases:
    """By owner. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, owner: str) -> Lease | None:
        return self._leases.get(owner)

    def extend(self, owner: str, now: float, lease_s: float, passing: bool = False) -> Lease:
        """The owner's lease, made if need be, for at least lease_s more."""
        lease = self._leases.get(owner)
        if lease is None:
            lease = self._leases[owner] = Lease(now + lease_s, passing)
        lease.deadline_s = max(lease.deadline_s, now + lease_s)
        return lease

    def pop(self, owner: str) -> Lease | None:
        return self._leases.pop(owner, None)

    def forget_if_empty(self, owner: str) -> None:
        lease = self._leases.get(owner)
        if lease is not None and not lease.pages and not lease.writes:
            del self._leases[owner]

    def late(self, now: float) -> list[str]:
        """Owners whose deadline has passed."""
        return [name for name, lease in self._leases.items() if lease.deadline_s <= now]

    def named(self, prefix: str) -> list[str]:
        return [name for name in self._leases if name.startswith(prefix)]

    def n_writes(self) -> int:
        return sum(len(lease.writes) for lease in self._leases.values())
