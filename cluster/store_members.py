"""Decides which stores are members now. Pure: whoever asks brings what is seen and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.errors import FailedPrecondition, NotFound
from ..kvstore.membership import Member, Membership


@dataclass(frozen=True, slots=True)
class SeenStore:
    """A store as it was last seen. lost_since_s: when it was lost, None while it answers."""

    member: Member
    lost_since_s: float | None = None


class StoreMembers:
    """A store that is lost stays a member for `delay_s`: one that is only restarted, with its pages
    on disk, must not set all the others to copying. Epochs are above those of earlier gateways.
    """

    def __init__(self, delay_s: float) -> None:
        self.membership = Membership(0)
        self.last_loss_s: float | None = None
        """When the store was lost that was the last to leave, or to come back without its memory."""
        self._delay_s = delay_s
        self._draining: set[str] = set()
        self._lost_at_s: dict[str, float] = {}

    def begin(self, gateway_epoch: int) -> None:
        """Of the 64 bits of an epoch, the upper half is the gateway's own."""
        self.membership = Membership(gateway_epoch << 32, self.membership.members)

    def update(self, seen: Sequence[SeenStore], now_s: float) -> Membership:
        """The members, under a new epoch if anything changed."""
        members = []
        for store in seen:
            member = store.member
            if member.draining:  # it remembers what an earlier gateway told it
                self._draining.add(member.store_id)
            if store.lost_since_s is not None:
                self._lost_at_s.setdefault(member.store_id, store.lost_since_s)
                if now_s - store.lost_since_s >= self._delay_s:
                    continue
            members.append(replace(member, draining=member.store_id in self._draining))
        before, self.membership = self.membership, self.membership.next(members)
        if self.membership is not before:
            self._note_losses(before, now_s)
        for store in seen:
            if store.lost_since_s is None:
                self._lost_at_s.pop(store.member.store_id, None)
        return self.membership

    def drain(self, store_id: str) -> Membership:
        """Marks a store; again is nothing new. Raises NotFound, and FailedPrecondition if no other
        store would be left to take its pages."""
        member = self.membership.find(store_id)
        if member is None:
            known = ", ".join(m.store_id for m in self.membership) or "none"
            raise NotFound(f"store {store_id!r} is not a member; there are: {known}")
        staying = [m for m in self.membership if not m.draining and m.store_id != store_id]
        if not staying:
            raise FailedPrecondition(
                f"store {store_id} is the last of {len(self.membership)} that is not draining; "
                "its pages could go nowhere: add a store first"
            )
        self._draining.add(store_id)
        self.membership = self.membership.drained(store_id)
        return self.membership

    def _note_losses(self, before: Membership, now_s: float) -> None:
        now = self.membership.addresses()
        for store_id, address in before.addresses().items():
            if now.get(store_id) != address:
                lost_s = self._lost_at_s.pop(store_id, now_s)
                self.last_loss_s = max(lost_s, self.last_loss_s or lost_s)
