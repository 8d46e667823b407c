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
from ..kvstore.placement import rendezvous
from ..kvstore.transport import Channel, connect
from .retriever import first_tables, summary_tables
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
        self._timeout_s = config.timeout_s
        names = summary_tables(policies, page_tokens)
        in_prefill = summary_tables([policy.in_prefill for policy in policies], page_tokens)
        self._first = first_tables(policies, page_tokens)
        self._remote: dict[str, Channel] = {}
        if config.remote and any(self._first):
            self._remote = {name: connect(address) for name, address in retrievers.items()}
        self._pool = SummaryPool(
            [
                tuple(dict.fromkeys((*self._here_of(i, p, a), *self._here_of(i, p.in_prefill, b))))
                for i, (p, a, b) in enumerate(zip(policies, names, in_prefill, strict=True))
            ],
            page_tokens,
        )
        self._here: dict[str, dict[int, int]] = {}
        """Per row and layer, leading pages whose summaries are here."""
        self._known: dict[str, dict[int, int]] = {}
        """The same at the retriever."""

    def _scored_there(self, layer: int, policy: LayerPolicy) -> bool:
        """Retrievers score the first stage of decode's policies, and of prefill's where it is that."""
        same = policy.stages[:1] == self._policies[layer].stages[:1]
        return bool(self._remote and self._first[layer]) and same

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
        for name, address in addresses.items():
            channel = self._remote.get(name)
            if channel is not None and channel.address != address:
                channel.close()
                self._remote[name] = connect(address)
                self._known.clear()

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

    def choose(
        self,
        layer: int,
        row: Row,
        query: Tensor,
        q_start: int,
        weights: tuple[float, float],
        n_pages: int,
        keys_of: Callable[[int, int], np.ndarray],
    ) -> Tensor:
        """Pages chosen by bookmarks at the retriever. weights: log_scale and nearness of the layer. keys_of:
        of pages [first, last) below n_pages, asked for if it does not know them."""
        known = self._known_of(row)
        first = known.get(layer, 0)
        if first < n_pages:
            keys = torch.from_numpy(keys_of(first, n_pages))
            self._add(row, layer, first, n_pages, keys[:, :, None, None])
            known[layer] = n_pages
        header = {"context_id": row.row_id, "layer": layer, "q_start": q_start}
        header |= {"weights": list(weights), "q_shape": list(query.shape)}
        return _blocks(self._call(row, "choose", header, query))

    def _known_of(self, row: Row) -> dict[int, int]:
        if row.row_id not in self._known:
            self._known[row.row_id] = self._open(row)
        return self._known[row.row_id]

    def _add(self, row: Row, layer: int, first: int, last: int, rows: Tensor) -> None:
        header = {"context_id": row.row_id, "layer": layer, "first_page": first}
        header |= {"last_page": last, "shape": list(rows.shape)}
        self._call(row, "add", header, rows)

    def _bring_up(self, layer: int, row: Row, view: PagedKV, n_pages: int) -> None:
        """The retriever's summaries of the row's first n_pages full pages, as far as they are missing."""
        known = self._known_of(row)
        first = known.get(layer, 0)
        if first >= n_pages:
            return
        name = self._first[layer][0]
        for begin, end in pieces(name, first, n_pages, self._page_tokens):
            self._add(row, layer, begin, end, page_summaries(name, view, begin, end))
        known[layer] = n_pages

    def _open(self, row: Row) -> dict[int, int]:
        header = {"context_id": row.row_id, "keys": [bytes(k) for k in row.keys]}
        reply = self._call(row, "open", header, None)
        return {int(k): int(v) for k, v in reply.header["known"].items()}

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
        header: dict[str, Any] = {
            "context_id": row.row_id,
            "layer": layer,
            "q_start": q_start,
            "scale": scale,
            "query_block": query_block,
            "q_shape": list(q.shape),
            "cut_shape": None if cut_keys is None else list(cut_keys.shape),
        }
        buffers = [_bytes(q)] + ([] if cut_keys is None else [_bytes(cut_keys)])
        channel = self._remote[self._shard(row)]
        reply = channel.call("select", header, buffers, timeout_s=self._timeout_s)
        return _blocks(reply)

    def _call(self, row: Row, method: str, header: dict[str, Any], data: Tensor | None) -> Any:
        buffers = [] if data is None else [_bytes(data)]
        channel = self._remote[self._shard(row)]
        return channel.call(method, header, buffers, timeout_s=self._timeout_s)

    def _shard(self, row: Row) -> str:
        """Contexts are spread over retrievers by their first page, so that sharers meet."""
        name = row.keys[0] if row.keys else row.row_id.encode()
        return rendezvous(name, sorted(self._remote), 1)[0]  # type: ignore[arg-type]

    def forget(self, layer: int, row: Row) -> None:
        """The row's pages were read badly: what was made of them is made again."""
        self._pool.forget(layer, row.page_ids.array)
        self.close(row)

    def close(self, row: Row) -> None:
        self._here.pop(row.row_id, None)
        if self._known.pop(row.row_id, None) is not None:
            self._call(row, "close", {"context_id": row.row_id}, None)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().reshape(-1).view(np.uint8).data


def _blocks(reply: Any) -> Tensor:
    blocks = np.frombuffer(reply.buffers[0], dtype="<i8").reshape(reply.header["shape"])
    return torch.from_numpy(blocks.copy())
