"""The pages of a row in order, as a list that is also an array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class PageList(Sequence[int]):
    """Worker-local page numbers. Grows in place, because decode reads it in every layer."""

    def __init__(self, page_ids: Sequence[int] = ()) -> None:
        self._ids = np.zeros(max(16, len(page_ids)), dtype=np.int64)
        self._ids[: len(page_ids)] = page_ids
        self._n = len(page_ids)

    @property
    def array(self) -> np.ndarray:
        """int64 [n]: a view, valid until the list changes."""
        return self._ids[: self._n]

    def append(self, page_id: int) -> None:
        if self._n == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self._n] = page_id
        self._n += 1

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        found = self.array[at]
        return found.tolist() if isinstance(at, slice) else int(found)

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())
