"""Which stores hold a page: weighted rendezvous hashing, spread over zones and nodes.

For each page every store draws a time, -ln(u) / weight with u in (0, 1) from the hash of page key
and store id; the earliest is first. Such times are exponential with rate `weight`, so a store comes
first with probability weight / sum of weights, and a store's time depends on nothing but itself: one
that joins, leaves or changes its weight moves only the pages that it gains or loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import xxhash

from ..core.page_key import PageKey
from .membership import Member

_UNIT = 2.0**-64


def rank(key: PageKey, members: Iterable[Member]) -> list[str]:
    """Ids of all members (a Membership, or some of one) in this key's order of preference, whatever
    the order they are given in.

    The earliest of each zone come first, then the earliest of each further node, then the rest, so
    that any leading part of the list is spread as far as it can be. Draining members come last.
    """
    raced = sorted(members, key=lambda m: (m.draining, _time(key, m), m.store_id))
    n_staying = sum(not member.draining for member in raced)
    ordered = _spread(raced[:n_staying]) + _spread(raced[n_staying:])
    return [member.store_id for member in ordered]


def place(key: PageKey, members: Iterable[Member], replicas: int) -> list[str]:
    """Ids of the stores that should hold this page (fewer than replicas if there are fewer)."""
    return rank(key, members)[:replicas]


def rendezvous(key: PageKey, names: Iterable[str], replicas: int) -> list[str]:
    """`place` among names that differ in nothing else."""
    return place(key, [Member(name, name) for name in names], replicas)


def _time(key: PageKey, member: Member) -> float:
    draw = xxhash.xxh3_64_intdigest(key + member.store_id.encode())
    return -math.log((draw + 0.5) * _UNIT) / member.weight


def _spread(raced: Sequence[Member]) -> list[Member]:
    zones: set[str] = set()
    nodes: set[str] = set()
    first: list[Member] = []
    further: list[Member] = []
    rest: list[Member] = []
    late: list[Member] = []
    for member in raced:
        (late if member.zone in zones else first).append(member)
        zones.add(member.zone)
    nodes.update(member.node_id for member in first)
    for member in late:
        (rest if member.node_id in nodes else further).append(member)
        nodes.add(member.node_id)
    return first + further + rest
