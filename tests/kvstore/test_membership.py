"""Membership as a value: only well-formed ones exist, and they survive the wire."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.core.errors import InvalidInput
from longreach.kvstore.membership import Member, Membership

TWO = Membership(5, (Member("a", "mem://a"), Member("b", "mem://b", "n1", "z1", 2.0)))

members = st.builds(
    Member,
    st.text(min_size=1),
    st.text(min_size=1),
    st.text(),
    st.text(),
    st.floats(min_value=0.001, max_value=1e15) | st.integers(1, 1 << 50),
    st.booleans(),
)


@given(
    st.integers(0, (1 << 64) - 1),
    st.lists(members, max_size=5, unique_by=lambda member: member.store_id),
)
def test_the_wire_changes_nothing(epoch: int, some: list[Member]) -> None:
    made = Membership(epoch, tuple(some))
    assert Membership.from_wire(msgpack.unpackb(msgpack.packb(made.to_wire()))) == made


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        {},
        {"epoch": 1},
        {"epoch": 1, "members": {}},
        {"epoch": 1, "members": ["a"]},
        {"epoch": 1, "members": [None]},
        {"epoch": 1, "members": [{}]},
        {"epoch": 1, "members": [{"store_id": "a"}]},
        {"epoch": 1, "members": [{"store_id": "a", "address": "x", "colour": "red"}]},
        {"epoch": 1, "members": [{"store_id": "", "address": "x"}]},
        {"epoch": 1, "members": [{"store_id": "a", "address": ""}]},
        {"epoch": 1, "members": [{"store_id": b"a", "address": "x"}]},
        {"epoch": 1, "members": [{"store_id": "a", "address": "x", "node_id": None}]},
        {"epoch": 1, "members": [{"store_id": "a", "address": "x", "draining": 1}]},
        {"epoch": 1, "members": [{"store_id": "a", "address": "x"}] * 2},
        *(
            {"epoch": 1, "members": [{"store_id": "a", "address": "x", "weight": weight}]}
            for weight in (0, -1, "1", None, True, float("nan"), float("inf"))
        ),
        *({"epoch": epoch, "members": []} for epoch in (None, -1, 1.0, True, "1", 1 << 64)),
    ],
)
def test_bad_ones_are_refused(wire: Any) -> None:
    with pytest.raises(InvalidInput):
        Membership.from_wire(wire)


def test_the_epoch_rises_with_every_change_and_only_then() -> None:
    assert TWO.next(reversed(TWO.members)) is TWO
    grown = TWO.next([*TWO, Member("0", "mem://0")])
    assert (grown.epoch, [m.store_id for m in grown]) == (6, ["0", "a", "b"])
    moved = TWO.next([Member("a", "mem://elsewhere"), TWO.members[1]])
    assert (moved.epoch, moved.addresses()["a"]) == (6, "mem://elsewhere")


def test_draining_marks_one_store_once() -> None:
    drained = TWO.drained("b")
    assert drained.epoch == 6
    assert [member.draining for member in drained] == [False, True]
    assert drained.drained("b") is drained
    assert TWO.drained("nobody") is TWO


def test_of_addresses() -> None:
    made = Membership.of({"b": "y", "a": "x"}, 3)
    assert made == Membership(3, (Member("a", "x"), Member("b", "y")))
    assert len(made) == 2
    assert made.find("b") == Member("b", "y")
    assert made.find("c") is None
