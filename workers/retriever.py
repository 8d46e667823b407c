"""Summaries of the keys of all active contexts, and the coarse stage scored over them.

The same object works inside a decode worker and behind `retriever_service.py`. Summaries are named by
page and layer, so contexts that share pages share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.errors import ConfigError, NotFound
from ..core.page_key import PageKey
from ..core.stage import LayerPolicy
from ..kernels.ops import PagedKV, Rope, SummarySource, candidate_end, select_blocks


def summary_layers(policies: Sequence[LayerPolicy], page_tokens: int) -> tuple[int, ...]:
    """Layers whose first stage scores summaries. Raises ConfigError for chunks that do not tile pages."""
    layers = []
    for layer, policy in enumerate(policies):
        if policy.dense or policy.stages[0].scorer == "search":
            continue
        chunk = policy.stages[0].chunk
        if page_tokens % chunk or policy.sink % chunk:
            raise ConfigError(
                f"layer {layer}: the first stage scores summaries of {chunk} tokens, which must "
                f"divide page_tokens ({page_tokens}) and sink ({policy.sink})"
            )
        layers.append(layer)
    return tuple(layers)


@dataclass
class _Context:
    keys: list[PageKey] = field(default_factory=list)
    """Named pages, in order; later pages are still being computed and have no name yet."""
    summaries: dict[int, Tensor] = field(default_factory=dict)
    """Per layer [Hkv, capacity, S, D]."""
    n_pages: dict[int, int] = field(default_factory=dict)
    """Per layer, how many leading pages are filled in."""


class Retriever:
    """Not thread-safe: one thread, or a lock around it (the service has one)."""

    def __init__(self, policies: Sequence[LayerPolicy], page_tokens: int, rope: Rope) -> None:
        self._policies = policies
        self._page_tokens = page_tokens
        self._rope = rope
        self.layers = summary_layers(policies, page_tokens)
        self._contexts: dict[str, _Context] = {}
        self._pages: dict[tuple[PageKey, int], Tensor] = {}
        self._users: dict[PageKey, int] = {}

    def open(self, context_id: str, keys: Sequence[PageKey]) -> dict[int, int]:
        """Start a context whose leading pages are `keys`. Returns, per layer, how many of them are
        known already; the caller adds the rest."""
        self.close(context_id)
        context = _Context(keys=list(keys))
        self._contexts[context_id] = context
        for key in keys:
            self._users[key] = self._users.get(key, 0) + 1
        for layer in self.layers:
            context.n_pages[layer] = 0
            for page_index, key in enumerate(keys):
                known = self._pages.get((key, layer))
                if known is None:
                    break
                self._put(context, layer, page_index, known)
        return dict(context.n_pages)

    def close(self, context_id: str) -> None:
        context = self._contexts.pop(context_id, None)
        if context is None:
            return
        for key in context.keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                for layer in self.layers:
                    self._pages.pop((key, layer), None)

    def add(self, context_id: str, layer: int, first_page: int, summaries: Tensor) -> None:
        """summaries [Hkv, n_pages * chunks per page, 2 or 1, D] of consecutive full pages.

        Pages known already are left as they are. Raises NotFound for a context that is not open.
        """
        context = self._context(context_id)
        per_page = self._page_tokens // self._policies[layer].stages[0].chunk
        for i, page in enumerate(summaries.split(per_page, dim=1)):
            page_index = first_page + i
            if page_index < context.n_pages[layer]:
                continue
            self._put(context, layer, page_index, page)
            if page_index < len(context.keys):
                self._pages[context.keys[page_index], layer] = page.clone()

    def _put(self, context: _Context, layer: int, page_index: int, page: Tensor) -> None:
        per_page = page.shape[1]
        table = context.summaries.get(layer)
        first = page_index * per_page
        if table is None or first + per_page > table.shape[1]:
            capacity = max(64, 2 * (first + per_page))
            grown = page.new_zeros(page.shape[0], capacity, *page.shape[2:])
            if table is not None:
                grown[:, : table.shape[1]] = table
            context.summaries[layer] = table = grown
        table[:, first : first + per_page] = page
        context.n_pages[layer] = page_index + 1

    def source(self, context_id: str, layer: int) -> SummarySource:
        """Ready summaries of one context and layer, for `select_blocks`."""
        table = self._context(context_id).summaries.get(layer)

        def ready(kind: str, starts: Tensor, chunk: int) -> Tensor:
            assert table is not None
            index = (starts // chunk).clamp(min=0)
            heads = torch.arange(starts.shape[0])[:, None]
            return table[heads, index]

        return ready

    def select(
        self, context_id: str, layer: int, q: Tensor, q_start: int, cut_keys: Tensor | None
    ) -> Tensor:
        """The first stage: chunk starts int64 [Hsel, n] that leave it, padded with -1.

        q [H, Tq, D] unrotated. cut_keys [Hkv, n < chunk, D]: keys of the chunk that the candidate
        region's end cuts, which has no summary; None when it ends on a chunk.
        """
        policy = self._policies[layer]
        coarse = policy.model_copy(update={"stages": policy.stages[:1]})
        table = self._context(context_id).summaries.get(layer)
        n_kv_heads = len(table) if table is not None else 1
        view = self._cut_view(policy, q, q_start, cut_keys, n_kv_heads)
        source = self.source(context_id, layer)
        return select_blocks(q, q_start, view, coarse, self._rope, summaries=source).blocks

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
            start = candidate_end(q_start, policy) - cut_keys.shape[1]
            row[:, start // self._page_tokens] = torch.arange(n_heads)
            at = start % self._page_tokens
            memory[:, 0, at : at + cut_keys.shape[1]] = cut_keys
        return PagedKV((memory,), torch.zeros_like(row), row, self._page_tokens, n_tokens)

    def stats(self) -> dict[str, int]:
        return {
            "contexts": len(self._contexts),
            "pages": len(self._users),
            "bytes": sum(t.nbytes for t in self._pages.values()),
        }

    def _context(self, context_id: str) -> _Context:
        try:
            return self._contexts[context_id]
        except KeyError:
            raise NotFound(f"the retriever has no context {context_id!r}; open it first") from None
