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
    digest, log = xxhash.xxh3_64_intdigest, math.log
    raced = sorted(
        (
            member.draining,
            -log((digest(key + member.store_id.encode()) + 0.5) * _UNIT) / member.weight,
            member.store_id,
            member,
        )
        for member in members
    )
    ordered = [entry[3] for entry in raced]
    n_staying = sum(not entry[0] for entry in raced)
    return [m.store_id for m in _spread(ordered[:n_staying]) + _spread(ordered[n_staying:])]


def place(key: PageKey, members: Iterable[Member], replicas: int) -> list[str]:
    """Ids of the stores that should hold this page (fewer than replicas if there are fewer)."""
    return rank(key, members)[:replicas]


def rendezvous(key: PageKey, names: Iterable[str], replicas: int) -> list[str]:
    """`place` among names that differ in nothing else."""
    return place(key, [Member(name, name) for name in names], replicas)


def _spread(raced: Sequence[Member]) -> list[Member]:
    if len(raced) < 2:
        return list(raced)
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
