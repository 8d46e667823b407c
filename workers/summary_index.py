"""A worker's side of the retriever: keeps summaries current, and asks for the coarse stage.

With `retriever.remote` the first stage is scored where its summaries are; all others are kept here, by
page, and handed to the selection. Bookmarks are made by `bookmark_index.py`, which lends its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import RetrieverConfig
from ..core.stage import LayerPolicy
from ..kernels.ops import (
    PagedKV,
    Summaries,
    TableName,
    candidate_end,
    gather_tokens,
    page_summaries,
    pages_of,
    pieces,
)
from .retriever import first_tables, summary_tables
from .retriever_client import RetrieverClient
from .row import Row
from .summary_pool import SummaryPool


class SummaryIndex:
    """Summaries of this worker's rows. Does nothing where no stage uses summaries."""

    def __init__(
        self,
        config: RetrieverConfig,
        policies: Sequence[LayerPolicy],
        page_tokens: int,
        retrievers: dict[str, str],
    ) -> None:
        self._policies = policies
        self._page_tokens = page_tokens
        names = summary_tables(policies, page_tokens)
        in_prefill = summary_tables([policy.in_prefill for policy in policies], page_tokens)
        self._first = first_tables(policies, page_tokens)
        if config.asynchronous:
            # other queries are known in the step that uses what they choose: it would wait
            self._first = tuple(
                names if policy.by_bookmark else ()
                for names, policy in zip(self._first, policies, strict=True)
            )
        self.retrievers: RetrieverClient | None = None
        """Where first stages are scored; none if that is done here."""
        if config.remote and any(self._first) and retrievers:
            self.retrievers = RetrieverClient(config, retrievers)
        self._pool = SummaryPool(
            [
                tuple(dict.fromkeys((*self._here_of(i, p, a), *self._here_of(i, p.in_prefill, b))))
                for i, (p, a, b) in enumerate(zip(policies, names, in_prefill, strict=True))
            ],
            page_tokens,
        )
        self._here: dict[str, dict[int, int]] = {}
        """Per row and layer, leading pages whose summaries are here."""

    def _scored_there(self, layer: int, policy: LayerPolicy) -> bool:
        """Retrievers score the first stage of decode's policies, and of prefill's where it is that."""
        same = policy.stages[:1] == self._policies[layer].stages[:1]
        return self.retrievers is not None and bool(self._first[layer]) and same

    def _here_of(
        self, layer: int, policy: LayerPolicy, names: tuple[TableName, ...]
    ) -> tuple[TableName, ...]:
        """A policy's tables that are kept here: all, or those of later stages and the tail."""
        there = self._first[layer] if self._scored_there(layer, policy) else ()
        return tuple(name for name in names if name not in there)

    def reserve(self, n_pages: int) -> None:
        """Page numbers below this will be in use."""
        self._pool.reserve(n_pages)

    def update_retrievers(self, addresses: dict[str, str]) -> None:
        """A retriever came back at another address: it has lost its contexts, so they are re-sent."""
        if self.retrievers is not None:
            self.retrievers.update(addresses)

    def summaries(
        self, layer: int, row: Row, view: PagedKV, versions_of: Callable[[Row], np.ndarray]
    ) -> tuple[Summaries | None, range]:
        """Ready summaries of all full pages of the view, and the pages whose keys were read to make
        those that were missing. versions_of: a row's pages, so that summaries of a page number's former
        page do not count."""
        if not self._pool.names[layer]:
            return None, range(0)
        n_pages = view.n_tokens // self._page_tokens
        slots = row.page_ids.array
        here = self._here.setdefault(row.row_id, {})
        first = here.get(layer, -1)
        made = range(0)
        if first >= n_pages:
            return self._pool.summaries(layer, slots, first), made
        versions = versions_of(row)
        if first < 0:
            first = self._pool.n_ready(layer, slots[:n_pages], versions[:n_pages])
        if first < n_pages:
            self._pool.fill(layer, view, slots, versions, first, n_pages)
            # a summary of several pages is made with its last one
            longest = max(name[1] for name in self._pool.names[layer])
            step = pages_of(longest, self._page_tokens)
            made = range(first // step * step, n_pages)
        here[layer] = max(first, n_pages)
        return self._pool.summaries(layer, slots, here[layer]), made

    def coarse(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        view: PagedKV,
        scale: float,
        query_block: int,
        policy: LayerPolicy,
    ) -> Tensor | None:
        """The first stage scored at the retriever; None where it is scored here."""
        if not self._scored_there(layer, policy):
            return None
        end = candidate_end(q_start, policy)
        self._bring_up(layer, row, view, end // self._page_tokens)
        chunk = policy.stages[0].chunk
        # no ready summary covers the chunk that the end cuts, nor what its last page holds
        covered = end // self._page_tokens * self._page_tokens // chunk * chunk
        cut = end - max(policy.sink, covered)
        cut_keys = gather_tokens(view, torch.arange(end - cut, end)) if cut else None
        return self._select_remote(layer, row, q, q_start, scale, query_block, cut_keys)

    def chooses_there(self, layer: int, policy: LayerPolicy) -> bool:
        """Whether a retriever scores the bookmarks of a policy."""
        return policy.by_bookmark and self._scored_there(layer, policy)

    def _bring_up(self, layer: int, row: Row, view: PagedKV, n_pages: int) -> None:
        """The retriever's summaries of the row's first n_pages full pages, as far as they are missing."""
        assert self.retrievers is not None
        first = self.retrievers.known(row, layer)
        if first >= n_pages:
            return
        name = self._first[layer][0]
        for begin, end in pieces(name, first, n_pages, self._page_tokens):
            made = page_summaries(name, view, begin, end)
            self.retrievers.add(row, layer, begin, end, made)

    def _select_remote(
        self,
        layer: int,
        row: Row,
        q: Tensor,
        q_start: int,
        scale: float,
        query_block: int,
        cut_keys: Tensor | None,
    ) -> Tensor:
        assert self.retrievers is not None
        header: dict[str, Any] = {
            "layer": layer,
            "q_start": q_start,
            "scale": scale,
            "query_block": query_block,
            "q_shape": list(q.shape),
            "cut_shape": None if cut_keys is None else list(cut_keys.shape),
        }
        tensors = [q] if cut_keys is None else [q, cut_keys]
        return self.retrievers.select(row, header, tensors)

    def forget(self, layer: int, row: Row) -> None:
        """The row's pages were read badly: what was made of them is made again."""
        self._pool.forget(layer, row.page_ids.array)
        self.close(row)

    def close(self, row: Row) -> None:
        self._here.pop(row.row_id, None)
        if self.retrievers is not None:
            self.retrievers.close(row)
