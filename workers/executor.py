"""How rows are computed on a device: the engine decides what runs, an executor runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .page_flow import PageFlow
from .row import Row


class Executor(Protocol):
    """One thread calls. `prefill` and `decode` leave a row's counters and state to the engine, but for
    the seconds and bytes that only they know."""

    flow: PageFlow
    n_ahead: int
    """Tokens beyond the next one that decode would like to have room for."""

    def opened(self, row: Row) -> None:
        """The row has its leading pages and will be computed from row.n_done on."""
        ...

    def prepare(self, row: Row) -> bool:
        """A bounded part of what must be done before the row's next `prefill`; True when nothing is left, so
        that other rows decode meanwhile."""
        ...

    def prefill(self, row: Row, end: int) -> Tensor | None:
        """Compute prompt tokens row.n_done … end, whose pages are placed. Returns the logits [vocab] of the
        last one, float32 on the CPU, if it ends the prompt."""
        ...

    def decode(self, rows: Sequence[Row]) -> Tensor:
        """One token for each row, at row.n_done, whose pages are placed: logits [n, vocab], float32 on the
        CPU."""
        ...

    def closed(self, row: Row) -> None:
        """The row has let go of its pages: forget what was kept for its attention. It may be opened again,
        under another lease."""
        ...

    def update_retrievers(self, addresses: dict[str, str]) -> None:
        """Where retrievers are now."""
        ...
