"""Decides what a store does for the pages that it holds: which copies it gives to whom, which of its
own are surplus. Pure; the answers of the other stores are handed in.

The targets of a page are `place(key)`. Of the stores that hold it, the first in the key's own order
gives the targets their copies, so exactly one does. A holder that is no target keeps its copy until
every target is known to hold one.

Two stores must not both drop the page in the belief that the other one is the target. So an answer
counts for dropping only if it was given under the same membership, and the drop itself is refused
once the store has heard of another (`drop` with an epoch, store_service.py). For as long as two
stores are of one epoch they agree on the targets, and targets do not drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..core.page_key import PageKey

Ranks = Mapping[PageKey, list[str]]
"""Each page's order of the members (`placement.rank`)."""


@dataclass(frozen=True, slots=True)
class OwnPage:
    """A page of this store. pinned: somebody here uses it now."""

    key: PageKey
    parent: PageKey
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store held of the pages that it was asked for, and the epoch it answered under."""

    epoch: int
    held: frozenset[PageKey]


@dataclass(frozen=True, slots=True)
class Todo:
    """A page of this store that is not yet where it should be, or more than there.

    lacking: other targets that are not known to hold it. pushes: those of them that are to get it
    from here. n_short: copies lacking in all, counted by the store that pushes. surplus: this store is
    no target. droppable: surplus, unpinned and safe to drop if it is done at once.
    """

    page: OwnPage
    lacking: tuple[str, ...] = ()
    pushes: tuple[str, ...] = ()
    n_short: int = 0
    surplus: bool = False
    droppable: bool = False


def questions(me: str, replicas: int, ranks: Ranks) -> dict[str, list[PageKey]]:
    """Whom to ask for which of my pages: the targets, and whoever would give copies before me."""
    asked: dict[str, list[PageKey]] = {}
    for key, ranked in ranks.items():
        n_before = ranked.index(me) if me in ranked else len(ranked)
        for store_id in ranked[: max(n_before, replicas)]:
            if store_id != me:
                asked.setdefault(store_id, []).append(key)
    return asked


def plan(
    me: str,
    replicas: int,
    epoch: int,
    ranks: Ranks,
    pages: Iterable[OwnPage],
    answers: Mapping[str, Answer],
) -> list[Todo]:
    """One entry for each of my pages that is not in order. epoch: that of the ranks' members. A store
    without an answer counts as neither holding a page nor waiting for it."""
    todos = []
    for page in pages:
        ranked = ranks[page.key]
        targets = ranked[:replicas]
        others = [store_id for store_id in targets if store_id != me]
        lacking = tuple(i for i in others if i not in answers or page.key not in answers[i].held)
        surplus = me not in targets
        if not lacking and not surplus:
            continue
        holders = {i for i, answer in answers.items() if page.key in answer.held}
        n_before = ranked.index(me) if me in ranked else len(ranked)
        first = holders.isdisjoint(ranked[:n_before])
        n_copies = 1 + len(holders.intersection(ranked))
        agreed = all(i in holders and answers[i].epoch == epoch for i in others)
        todos.append(
            Todo(
                page,
                lacking,
                pushes=tuple(i for i in lacking if i in answers) if first else (),
                n_short=max(0, len(targets) - n_copies) if first else 0,
                surplus=surplus,
                droppable=surplus and bool(others) and agreed and not page.pinned,
            )
        )
    return todos
