"""Summaries of the keys of all active contexts, and the coarse stage scored over them.

The same object works inside a decode worker's tests and behind `retriever_service.py`. Summaries are
named by page, so contexts that share pages share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, InvalidInput, NotFound
from ..core.page_key import PageKey
from ..core.stage import LayerPolicy
from ..kernels.ops import (
    PagedKV,
    Rope,
    TableName,
    bookmark_table,
    candidate_end,
    check_tables,
    choose_pages,
    select_blocks,
    tables_of,
    whole_pages,
)
from .page_list import PageList
from .summary_pool import SummaryPool


def summary_tables(
    policies: Sequence[LayerPolicy], page_tokens: int
) -> tuple[tuple[TableName, ...], ...]:
    """Per layer, the summaries that its stages and tail read. Raises ConfigError for chunks that do not
    fit pages."""
    found = []
    for layer, policy in enumerate(policies):
        names = tables_of(policy)
        problem = check_tables(names, page_tokens, policy.sink)
        if problem is not None:
            raise ConfigError(f"layer {layer}: {problem}")
        found.append(names)
    return tuple(found)


def first_tables(
    policies: Sequence[LayerPolicy], page_tokens: int
) -> tuple[tuple[TableName, ...], ...]:
    """Per layer, the one table of its first stage, if that scores summaries or bookmarks."""
    found: list[tuple[TableName, ...]] = []
    for names, policy in zip(summary_tables(policies, page_tokens), policies, strict=True):
        if policy.by_bookmark:
            found.append((bookmark_table(page_tokens),))
        else:
            scores = bool(policy.stages) and policy.stages[0].reads_summaries
            found.append(names[:1] if scores else ())
    return tuple(found)


@dataclass
class _Context:
    keys: list[PageKey] = field(default_factory=list)
    """Named pages, in order; later pages are still being computed and have no name yet."""
    slots: PageList = field(default_factory=PageList)
    n_pages: dict[int, int] = field(default_factory=dict)
    """Per layer, how many leading pages are filled in."""


class Retriever:
    """Not thread-safe: one thread, or a lock around it (the service has one)."""

    def __init__(self, policies: Sequence[LayerPolicy], page_tokens: int, rope: Rope) -> None:
        self._policies = policies
        self._page_tokens = page_tokens
        self._rope = rope
        names = first_tables(policies, page_tokens)
        self.layers = tuple(layer for layer, mine in enumerate(names) if mine)
        self._pool = SummaryPool(names, page_tokens)
        self._contexts: dict[str, _Context] = {}
        self._slot_of: dict[PageKey, int] = {}
        self._users: dict[PageKey, int] = {}
        self._version: list[int] = []
        self._free: list[int] = []

    def open(self, context_id: str, keys: Sequence[PageKey]) -> dict[int, int]:
        """Start a context whose leading pages are `keys`. Returns, per layer, how many of them are
        known already; the caller adds the rest."""
        self.close(context_id)
        context = _Context(keys=list(keys))
        for key in keys:
            self._users[key] = self._users.get(key, 0) + 1
            if key not in self._slot_of:
                self._slot_of[key] = self._new_slot()
            context.slots.append(self._slot_of[key])
        self._contexts[context_id] = context
        slots = context.slots.array
        for layer in self.layers:
            context.n_pages[layer] = self._pool.n_ready(layer, slots, self._versions(slots))
        return dict(context.n_pages)

    def close(self, context_id: str) -> None:
        context = self._contexts.pop(context_id, None)
        if context is None:
            return
        for key in context.keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._free.append(self._slot_of.pop(key))
        self._free += context.slots[len(context.keys) :]

    def add(
        self, context_id: str, layer: int, first_page: int, last_page: int, rows: Tensor
    ) -> None:
        """What `page_summaries` made of the context's pages [first_page, last_page).

        Raises NotFound for a context that is not open, InvalidInput if pages before them are missing.
        """
        context = self._context(context_id)
        if first_page > context.n_pages[layer]:
            raise InvalidInput(
                f"context {context_id!r} has {context.n_pages[layer]} pages in layer {layer}; pages from "
                f"{first_page} on would leave a gap: add those before them first"
            )
        while len(context.slots) < last_page:
            context.slots.append(self._new_slot())
        slots = context.slots.array
        self._pool.put(layer, self._pool.names[layer][0], slots, first_page, rows)
        added = slots[first_page:last_page]
        self._pool.mark(layer, added, self._versions(added))
        context.n_pages[layer] = max(context.n_pages[layer], last_page)

    def select(
        self,
        context_id: str,
        layer: int,
        q: Tensor,
        q_start: int,
        scale: float,
        query_block: int,
        cut_keys: Tensor | None,
    ) -> Tensor:
        """The first stage: chunk starts int64 [Hsel, n] that leave it, padded with -1.

        q [H, Tq, D] unrotated; scale: of the softmax; query_block: of a whole
        block. cut_keys [Hkv, n, D]: keys of the last candidates, which have no
        summary because the candidate region's end cuts their chunk; None when it ends on a chunk.
        """
        context = self._context(context_id)
        policy = self._policies[layer]
        coarse = policy.model_copy(update={"stages": policy.stages[:1], "tail": 0})
        slots = context.slots.array
        ready = self._pool.summaries(layer, slots, context.n_pages[layer])
        table = ready.tables.get(self._pool.names[layer][0])
        n_kv_heads = table.shape[1] if table is not None else 1
        view = self._cut_view(policy, q, q_start, cut_keys, n_kv_heads)
        selection = select_blocks(
            q,
            q_start,
            view,
            coarse,
            self._rope,
            summaries=ready,
            scale=scale,
            query_block=query_block,
        )
        return selection.blocks

    def choose(
        self,
        context_id: str,
        layer: int,
        query: Tensor,
        q_start: int,
        weights: tuple[float, float],
    ) -> Tensor:
        """The first stage where bookmarks choose pages: starts int64 [Hsel, n], padded with -1. query [H, D]
        of the bookmark, unrotated; weights: log_scale and nearness of the layer.

        Raises InvalidInput if candidates were not added.
        """
        context, policy = self._context(context_id), self._policies[layer]
        pages = whole_pages(q_start, policy)
        first, last = (-(-at // self._page_tokens) for at in (pages.start, pages.stop))
        if last > max(first, context.n_pages[layer]):
            raise InvalidInput(
                f"context {context_id!r} has bookmarks of {context.n_pages[layer]} pages in layer "
                f"{layer}, {last} are asked for: add them first"
            )
        slots = context.slots.array[first:last]
        return choose_pages(query, self._pool.bookmarks(layer), q_start, policy, *weights, slots)

    def _cut_view(
        self,
        policy: LayerPolicy,
        q: Tensor,
        q_start: int,
        cut_keys: Tensor | None,
        n_kv_heads: int,
    ) -> PagedKV:
        """A view in which only the cut chunk's keys are present."""
        n_tokens = q_start + q.shape[1]
        n_pages = -(-n_tokens // self._page_tokens)
        n_heads = n_kv_heads
        row = torch.full((n_heads, n_pages), -1, dtype=torch.int64)
        memory = q.new_zeros(n_heads, 2, self._page_tokens, q.shape[2])
        if cut_keys is not None and cut_keys.shape[1]:
            # the cut chunk may be longer than a page: its pages lie one after the other
            end = candidate_end(q_start, policy)
            start = end - cut_keys.shape[1]
            first = start // self._page_tokens
            n_cut = (end - 1) // self._page_tokens + 1 - first
            memory = q.new_zeros(n_heads * n_cut, 2, self._page_tokens, q.shape[2])
            row[:, first : first + n_cut] = torch.arange(n_heads * n_cut).view(n_heads, n_cut)
            keys = q.new_zeros(n_heads, n_cut * self._page_tokens, q.shape[2])
            keys[:, start - first * self._page_tokens :][:, : cut_keys.shape[1]] = cut_keys
            memory[:, 0] = keys.view(n_heads * n_cut, self._page_tokens, q.shape[2])
        return PagedKV((memory,), torch.zeros_like(row), row, self._page_tokens, n_tokens)

    def stats(self) -> dict[str, int]:
        return {
            "contexts": len(self._contexts),
            "pages": len(self._users),
            "bytes": self._pool.n_bytes,
        }

    def _new_slot(self) -> int:
        if not self._free:
            self._version.append(0)
            return len(self._version) - 1
        slot = self._free.pop()
        self._version[slot] += 1
        return slot

    def _versions(self, slots: np.ndarray) -> np.ndarray:
        return np.array([self._version[slot] for slot in slots], dtype=np.int64)

    def _context(self, context_id: str) -> _Context:
        try:
            return self._contexts[context_id]
        except KeyError:
            raise NotFound(f"the retriever has no context {context_id!r}; open it first") from None
