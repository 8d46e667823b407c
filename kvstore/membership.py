"""Which stores exist: a value with an epoch, made by the supervisor and told to workers and stores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..core.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Member:
    """One store. weight: its share of the pages, in any unit that all members have in common (the
    supervisor uses bytes of capacity). draining: it gives its pages away and is to get no new ones.
    """

    store_id: str
    address: str
    node_id: str = ""
    zone: str = ""
    weight: float = 1.0
    draining: bool = False

    def __post_init__(self) -> None:
        for field in ("store_id", "address", "node_id", "zone"):
            if not isinstance(getattr(self, field), str):
                raise InvalidInput(f"a member's {field} must be text: {self!r:.200}")
        if not self.store_id or not self.address:
            raise InvalidInput(f"a member needs a store_id and an address: {self!r:.200}")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InvalidInput(f"weight of {self.store_id} must be a number, got {weight!r:.80}")
        if not (weight > 0 and math.isfinite(weight)):
            raise InvalidInput(f"weight of {self.store_id} must be above 0, got {weight!r}")
        if not isinstance(self.draining, bool):
            raise InvalidInput(f"draining of {self.store_id} must be true or false")


@dataclass(frozen=True, slots=True)
class Membership:
    """The stores there are from this epoch on; a later epoch replaces an earlier one entirely."""

    epoch: int
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.epoch, bool) or not isinstance(self.epoch, int):
            raise InvalidInput(f"an epoch is a whole number, got {self.epoch!r:.80}")
        if not 0 <= self.epoch < 1 << 64:
            raise InvalidInput(f"an epoch has 64 bits, got {self.epoch}")
        names = [member.store_id for member in self.members]
        if len(set(names)) != len(names):
            raise InvalidInput(f"a store is a member once, got {sorted(names)}")

    @classmethod
    def of(cls, addresses: Mapping[str, str], epoch: int = 0) -> Membership:
        """Stores of equal weight of which only the addresses are known."""
        return cls(epoch, tuple(Member(str(i), str(a)) for i, a in sorted(addresses.items())))

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def find(self, store_id: str) -> Member | None:
        return next((m for m in self.members if m.store_id == store_id), None)

    def addresses(self) -> dict[str, str]:
        return {member.store_id: member.address for member in self.members}

    def next(self, members: Iterable[Member]) -> Membership:
        """The one that follows, if these members are other than now; else this one itself."""
        ordered = tuple(sorted(members, key=lambda member: member.store_id))
        return self if ordered == self.members else Membership(self.epoch + 1, ordered)

    def drained(self, store_id: str) -> Membership:
        """The one that follows when this store begins to drain."""
        return self.next(
            replace(m, draining=True) if m.store_id == store_id else m for m in self.members
        )

    def to_wire(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "members": [asdict(member) for member in self.members]}

    @classmethod
    def from_wire(cls, wire: Any) -> Membership:
        """Raises InvalidInput unless it is what `to_wire` made."""
        if not isinstance(wire, Mapping) or not isinstance(wire.get("members"), list):
            raise InvalidInput(f"a membership is a map with epoch and members, got {wire!r:.200}")
        members = []
        for entry in wire["members"]:
            try:
                members.append(Member(**entry))
            except TypeError as exc:
                raise InvalidInput(f"member {entry!r:.200}: {exc}") from exc
        epoch: Any = wire.get("epoch")
        return cls(epoch, tuple(members))
