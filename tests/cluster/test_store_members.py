"""Who is a member: losses that last, drains, epochs above those of earlier gateways."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreach.cluster.store_members import SeenStore, StoreMembers
from longreach.core.errors import FailedPrecondition, NotFound
from longreach.kvstore.membership import Member

A, B, C = (Member(name, f"mem://{name}", f"node-{name}", weight=7.0) for name in "abc")


def seen(*members: Member, lost: dict[str, float] | None = None) -> list[SeenStore]:
    return [SeenStore(member, (lost or {}).get(member.store_id)) for member in members]


def names(members: StoreMembers) -> list[str]:
    return [member.store_id for member in members.membership]


def test_epochs_rise_with_changes_and_with_gateways() -> None:
    members = StoreMembers(5.0)
    members.begin(3)
    first = members.update(seen(A, B), 0.0)
    assert first.epoch == (3 << 32) + 1
    assert members.update(seen(B, A), 1.0) is first
    assert members.update(seen(A, B, C), 2.0).epoch == first.epoch + 1
    later = StoreMembers(5.0)
    later.begin(4)
    assert later.update(seen(A), 0.0).epoch > members.membership.epoch + 1_000_000


def test_a_lost_store_stays_a_member_for_a_while() -> None:
    members = StoreMembers(5.0)
    before = members.update(seen(A, B), 10.0)
    assert members.update(seen(A, B, lost={"b": 10.0}), 14.9) is before
    assert members.last_loss_s is None
    members.update(seen(A, B, lost={"b": 10.0}), 15.0)
    assert names(members) == ["a"]
    assert members.last_loss_s == 10.0
    members.update(seen(A, B), 20.0)
    assert names(members) == ["a", "b"]
    assert members.last_loss_s == 10.0


def test_one_that_comes_back_elsewhere_in_time_has_lost_its_memory() -> None:
    members = StoreMembers(5.0)
    before = members.update(seen(A, B), 10.0)
    members.update(seen(A, B, lost={"b": 11.0}), 12.0)
    moved = members.update(seen(A, replace(B, address="mem://b2")), 13.0)
    assert moved.epoch == before.epoch + 1
    assert members.last_loss_s == 11.0
    # at the same address it was only out of sight
    members.update(seen(A, replace(B, address="mem://b2"), lost={"a": 20.0}), 21.0)
    assert members.update(seen(A, replace(B, address="mem://b2")), 22.0) is moved
    members.update(seen(A, replace(B, address="mem://b2"), lost={"a": 40.0}), 45.0)
    assert members.last_loss_s == 40.0


def test_draining() -> None:
    members = StoreMembers(5.0)
    members.update(seen(A, B, C), 0.0)
    with pytest.raises(NotFound, match="there are: a, b, c"):
        members.drain("d")
    drained = members.drain("b")
    assert [member.draining for member in drained] == [False, True, False]
    assert members.drain("b") is drained
    assert members.update(seen(A, B, C), 1.0) is drained
    members.drain("c")
    with pytest.raises(FailedPrecondition, match="last of 3"):
        members.drain("a")
    # a restart does not end a drain, and one that an earlier gateway began goes on
    again = members.update(seen(A, replace(B, address="mem://b2"), C), 2.0)
    assert [member.draining for member in again] == [False, True, True]
    later = StoreMembers(5.0)
    later.update(seen(A, replace(B, draining=True)), 0.0)
    assert [member.draining for member in later.membership] == [False, True]
