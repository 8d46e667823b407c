"""Asynchronous retrieval: a layer's pages are asked for one refresh before they are used.

At a refresh at position p a layer uses what the query at max(n_prompt, p - refresh) chose. Only the first,
behind the prompt, waits for its own answer. That is a function of position alone, and a late answer is waited
for: so the tokens do not depend on how long a retriever takes, nor on who asks beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..core.errors import DeadlineExceeded, InternalError, LongreachError
from ..core.stage import LayerPolicy
from ..kernels.ops import overlap_window
from .row import Row
from .scheduler import next_refresh


class Answer(Protocol):
    """Chunk starts int64 [Hsel, n], once they are there."""

    def result(self, timeout_s: float) -> Tensor:
        """Raises DeadlineExceeded, Unavailable or the retriever's own error."""
        ...


@dataclass(frozen=True, eq=False)
class Query:
    """query: of a bookmark [H, D], which chooses pages for the tokens from q_start on."""

    layer: int
    row: Row
    query: Tensor
    q_start: int


def chosen_for(position: int, asked: int, policy: LayerPolicy) -> int:
    """The position for which a query at `asked` chooses what is used at `position`. That itself, so
    that no page falls between candidates and window, as far as pages are complete."""
    page_tokens = policy.stages[0].chunk
    complete = asked // page_tokens * page_tokens
    return max(asked, min(position, complete + overlap_window(policy)))


class AskAhead:
    """For the engine's one thread. begin: starts choices, those of one retriever together."""

    def __init__(
        self,
        policies: Sequence[LayerPolicy],
        begin: Callable[[Sequence[Query]], Sequence[Answer]],
        forget: Callable[[Row], None],
        timeout_s: float,
    ) -> None:
        """forget: what the retriever is thought to know of a row."""
        self._policies = policies
        self._begin = begin
        self._forget = forget
        self._timeout_s = timeout_s
        self._asked: dict[str, dict[tuple[int, int], tuple[Query, Answer]]] = {}
        """By row: (layer, position where it takes effect)."""

    def ask(self, due: Iterable[tuple[Row, int]]) -> None:
        """Before a decode step: rows, and layers whose first stage is due in it. A step that is taken again
        asks nothing twice."""
        wanted: list[tuple[tuple[int, int], Query]] = []
        for row, layer in due:
            asked = self._asked.setdefault(row.row_id, {})
            position, policy = row.n_done, self._policies[layer]
            for past in [at for at in asked if at[0] == layer and at[1] < position]:
                del asked[past]
            n_layers, interval = len(self._policies), policy.stages[0].refresh
            uses = [next_refresh(position, layer, n_layers, interval)]
            if position == row.n_prompt:
                uses.insert(0, position)
            for used in uses:
                if (layer, used) not in asked:
                    q_start = chosen_for(used, position, policy)
                    query = self._query(layer, row)
                    wanted.append(((layer, used), Query(layer, row, query, q_start)))
        if wanted:
            answers = self._begin([query for _, query in wanted])
            for (at, asked_now), answer in zip(wanted, answers, strict=True):
                self._asked[asked_now.row.row_id][at] = asked_now, answer

    def take(self, layer: int, row: Row, position: int) -> Tensor:
        """The pages that take effect at a position where the layer is due. If the retriever was lost since it
        was asked, it is asked again, once."""
        found = self._asked.get(row.row_id, {}).get((layer, position))
        if found is None:
            raise InternalError(f"layer {layer} is due at {position} and was not asked for")
        query, answer = found
        try:
            return answer.result(self._timeout_s)
        except DeadlineExceeded:
            raise
        except LongreachError:
            self._forget(row)
            (again,) = self._begin([query])
            self._asked[row.row_id][layer, position] = query, again
            return again.result(self._timeout_s)

    def close(self, row: Row) -> None:
        """Answers under way are of no use any more."""
        self._asked.pop(row.row_id, None)

    def _query(self, layer: int, row: Row) -> Tensor:
        if row.bookmark is None:
            raise InternalError(f"row {row.row_id} has no bookmark to ask with")
        return row.bookmark[1][layer]
