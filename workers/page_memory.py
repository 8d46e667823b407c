"""What a worker's own memory of pages can do: the device bank beside a CPU's cores, or a GPU's."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..kvstore.page import Bytes
from .local_pages import LocalPages
from .row import Row


class PageMemory(Protocol):
    """Room for pages on the device. A page that is not yet in the store has its only copy here, so it
    stays until `mark_safe`; any other may leave. Used by the engine's thread alone."""

    @property
    def pages(self) -> LocalPages:
        """The numbers of pages, and the homes of those that the store holds."""
        ...

    @property
    def n_slots(self) -> int:
        """Leaves that fit, of all layers."""
        ...

    @property
    def n_used(self) -> int:
        """Leaves here now, of all layers."""
        ...

    def place(self, page_id: int) -> None:
        """Give a new page its room in every layer. Raises BankTooSmall, changing nothing, if pages that are
        not in the store yet leave too little."""
        ...

    def may_pin(self) -> bool:
        """Whether one more page could be placed with most of the room still free to change."""
        ...

    def adopt(self, page_id: int) -> None:
        """A page that exists got its home: it may be read from there from now on."""
        ...

    def mark_safe(self, page_id: int) -> None:
        """A page that was placed is in the store now, and has a home."""
        ...

    def forget(self, page_ids: np.ndarray) -> None:
        """Nobody needs these pages any more, safe or not."""
        ...

    def page_bytes(self, page_id: int) -> Bytes:
        """uint8 [page_nbytes]: a placed page as the store keeps it."""
        ...

    def pages_of_row(self, row: Row) -> int:
        """Most pages of a row that any layer has here now."""
        ...

    def close(self, row: Row) -> None:
        """A row has ended: drop what is kept for it."""
        ...
