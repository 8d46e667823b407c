"""What goes wrong with a row's pages."""

from __future__ import annotations

from ..core.errors import NumericalError
from ..kvstore.page import PageGeometry
from .row import Row


class PageLost(Exception):
    """A page has no good copy left: the row starts again and recomputes it. Never leaves the worker."""

    def __init__(self, page_id: int) -> None:
        super().__init__(f"page {page_id} has no good copy")
        self.page_id = page_id


def not_finite(row: Row, layer: int, position: int, geometry: PageGeometry) -> NumericalError:
    return NumericalError(
        f"row {row.row_id}: a key or value of layer {layer} at position {position} is not finite in "
        f"{geometry.kv_dtype}; the row cannot be answered",
        row_id=row.row_id,
        layer=layer,
        position=position,
    )
