"""One row on a worker: prompt, tokens so far, pages, counters. No tensors but cached selections."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.page_key import PageKey
from .detokenizer import Detokenizer
from .page_list import PageList
from .sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels.ops import MassAudit, Selection
    from .decode_step import DecodePlan


class RowState(StrEnum):
    QUEUED = "queued"
    WAITING = "waiting"
    """Another row is computing pages that this one shares."""
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


@dataclass
class RowStats:
    """Counters of one row; seconds are of the worker's own work on it."""

    tokens_prompt: int = 0
    tokens_reused: int = 0
    tokens_prefilled: int = 0
    tokens_decoded: int = 0
    tokens_replayed: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    pages_context: int = 0
    pages_device: int = 0
    pages_recomputed: int = 0
    restarts: int = 0
    bytes_device_to_store: int = 0
    bytes_store_to_device: int = 0
    bank_hits: int = 0
    bank_misses: int = 0
    attend_passes: int = 0
    bookmarks_made: int = 0
    bookmarks_taken: int = 0
    mass_kept_sum: float = 0.0
    mass_kept_n: int = 0
    seconds_linear: float = 0.0
    seconds_select: float = 0.0
    seconds_fetch: float = 0.0
    seconds_attend: float = 0.0
    seconds_store: float = 0.0
    seconds_other: float = 0.0

    def to_dict(self) -> dict[str, int | float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class RowRequest:
    """What the gateway asks for. `forced` are tokens a previous attempt already produced."""

    row_id: str
    prompt: np.ndarray
    """uint32 [n_tokens]."""
    n_context_tokens: int
    sampling: Sampling
    forced: tuple[int, ...] = ()
    tenant: str = ""
    n_prefilled: int = 0
    """Prompt tokens that a previous attempt had in place; pages of them that are gone are counted."""


@dataclass
class Row:
    """A request under way. Positions count tokens of prompt and answer together."""

    request: RowRequest
    keys: list[PageKey]
    """Names of the prompt's full pages."""
    question_start: int
    """First token whose selection is made in the question's blocks; n_prompt if none is."""
    submitted_s: float
    order: int
    """Arrival number: earlier rows go first, and rows wait only for earlier ones."""
    state: RowState = RowState.QUEUED
    page_ids: PageList = field(default_factory=PageList)
    n_existing_pages: int = 0
    """Leading pages whose KV existed when the row was opened: never written again."""
    n_unreadable_pages: int = 0
    """Pages that a store said it holds, of which no good copy came."""
    n_done: int = 0
    """Tokens whose KV is in place."""
    tokens: list[int] = field(default_factory=list)
    replay: list[int] = field(default_factory=list)
    """Tokens of a former attempt, fed again in decode mode before new ones are chosen."""
    text: Detokenizer | None = None
    selections: list[Selection | None] = field(default_factory=list)
    plans: list[DecodePlan | None] = field(default_factory=list)
    """Per layer, how the latest token attended."""
    bookmark: tuple[int, Tensor] | None = None
    """A position, and the queries [n_layers, H, D] of the bookmark behind the tokens before it."""
    audit: tuple[int, MassAudit] | None = None
    """The layer of an audit under way."""
    private_keys: list[PageKey] = field(default_factory=list)
    stats: RowStats = field(default_factory=RowStats)
    prefill_started_s: float | None = None
    wait_key: PageKey | None = None
    cancelled: bool = False
    prefetched: bool = False
    """Its leading pages were announced to the stores while it was queued."""

    @property
    def row_id(self) -> str:
        return self.request.row_id

    @property
    def lease(self) -> str:
        """Owner of what this attempt acquires or stores; a restart begins a new one."""
        return f"{self.row_id}~{self.stats.restarts}"

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    def next_token(self) -> int:
        """The token the next decode step feeds: the latest one."""
        return self.tokens[-1]

    def progress(self) -> dict[str, Any]:
        return {
            "event": "progress",
            "phase": "queued" if self.state is RowState.WAITING else self.state.value,
            "prefilled": min(self.n_done, self.n_prompt),
            "reused": self.stats.tokens_reused,
            "total": self.n_prompt,
            "decoded": len(self.tokens),
        }
