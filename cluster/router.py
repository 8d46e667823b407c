"""Which worker takes a row: the one with most of its leading pages, else the least loaded. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import Unavailable
from ..core.page_key import PageKey


@dataclass(frozen=True)
class _Assigned:
    worker_id: str
    keys: tuple[PageKey, ...]


def common_pages(left: Sequence[PageKey], right: Sequence[PageKey]) -> int:
    """Leading pages that two prompts share. Keys are chained: one equal key means all before it
    are equal too, so halving finds the end."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


class Router:
    """Remembers where rows run, so that rows of one context that start together meet on one
    worker although none of their pages exists yet. Not thread-safe."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._rows: dict[str, _Assigned] = {}

    def load(self, worker_id: str) -> int:
        return sum(row.worker_id == worker_id for row in self._rows.values())

    def choose(
        self, row_id: str, keys: Sequence[PageKey], held: Mapping[str, int], live: Sequence[str]
    ) -> str:
        """Assign a row. held: leading pages that each worker says it has.

        A worker with two batches more than the least loaded one is passed over: waiting there
        would cost more than the pages save. Raises Unavailable if no worker lives.
        """
        if not live:
            raise Unavailable("no decode worker is live")
        load = {worker_id: self.load(worker_id) for worker_id in live}
        least = min(load.values())
        open_to = [w for w in live if load[w] - least < 2 * self._max_rows]

        def pages(worker_id: str) -> int:
            coming = [
                common_pages(keys, row.keys)
                for row in self._rows.values()
                if row.worker_id == worker_id
            ]
            return max([held.get(worker_id, 0), *coming])

        chosen = min(open_to, key=lambda w: (-pages(w), load[w], w))
        self._rows[row_id] = _Assigned(chosen, tuple(keys))
        return chosen

    def leave(self, row_id: str) -> None:
        """The row does not run any more."""
        self._rows.pop(row_id, None)
