"""A worker's side of the retriever: keeps summaries current, and asks for the coarse stage.

With `retriever.remote` the first stage is scored where the summaries are; otherwise the same object
runs here and hands its summaries to the selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import RetrieverConfig
from ..core.stage import LayerPolicy
from ..kernels.ops import PagedKV, Rope, candidate_end, chunk_summaries, gather_tokens
from ..kvstore.placement import rendezvous
from ..kvstore.transport import Channel, connect
from .retriever import Retriever
from .row import Row


class SummaryIndex:
    """Summaries of this worker's rows. Does nothing where no first stage uses summaries."""

    def __init__(
        self,
        config: RetrieverConfig,
        policies: Sequence[LayerPolicy],
        page_tokens: int,
        rope: Rope,
        retrievers: dict[str, str],
    ) -> None:
        self._policies = policies
        self._page_tokens = page_tokens
        self._timeout_s = config.timeout_s
        self._local = Retriever(policies, page_tokens, rope)
        self._remote: dict[str, Channel] = {}
        if config.remote and self._local.layers:
            self._remote = {name: connect(address) for name, address in retrievers.items()}
        self._layers = frozenset(self._local.layers)
        self._known: dict[str, dict[int, int]] = {}

    def update_retrievers(self, addresses: dict[str, str]) -> None:
        """A retriever came back at another address: it has lost its contexts, so they are re-sent."""
        for name, address in addresses.items():
            channel = self._remote.get(name)
            if channel is not None and channel.address != address:
                channel.close()
                self._remote[name] = connect(address)
                self._known.clear()

    def select_arguments(
        self, layer: int, row: Row, q: Tensor, q_start: int, view: PagedKV, level: int
    ) -> dict[str, Any]:
        """Keyword arguments of `select_blocks` that stand for the retriever's part."""
        if layer not in self._layers or level > 0:
            return {}
        policy = self._policies[layer]
        end = candidate_end(q_start, policy)
        self._bring_up(layer, row, view, end // self._page_tokens)
        if not self._remote:
            return {"summaries": self._local.source(row.row_id, layer)}
        chunk = policy.stages[0].chunk
        cut = (end - policy.sink) % chunk
        tokens = torch.arange(end - cut, end)
        cut_keys = gather_tokens(view, tokens) if cut else None
        return {"coarse": self._select_remote(layer, row, q, q_start, cut_keys)}

    def _bring_up(self, layer: int, row: Row, view: PagedKV, n_pages: int) -> None:
        """Summaries of the row's first n_pages full pages, as far as they are missing."""
        if row.row_id not in self._known:
            self._known[row.row_id] = self._open(row)
        known = self._known[row.row_id]
        first = known.get(layer, 0)
        if first >= n_pages:
            return
        stage = self._policies[layer].stages[0]
        start, end = first * self._page_tokens, n_pages * self._page_tokens
        starts = torch.arange(start, end, stage.chunk).expand(view.n_kv_heads, -1)
        kind = "mean" if stage.scorer == "mean" else "bounds"
        summaries = chunk_summaries(kind, view, starts, stage.chunk, end)  # type: ignore[arg-type]
        if self._remote:
            header = {"context_id": row.row_id, "layer": layer, "first_page": first}
            self._call(row, "add", header | {"shape": list(summaries.shape)}, summaries)
        else:
            self._local.add(row.row_id, layer, first, summaries)
        known[layer] = n_pages

    def _open(self, row: Row) -> dict[int, int]:
        if not self._remote:
            return self._local.open(row.row_id, row.keys)
        header = {"context_id": row.row_id, "keys": [bytes(k) for k in row.keys]}
        reply = self._call(row, "open", header, None)
        return {int(k): int(v) for k, v in reply.header["known"].items()}

    def _select_remote(
        self, layer: int, row: Row, q: Tensor, q_start: int, cut_keys: Tensor | None
    ) -> Tensor:
        header: dict[str, Any] = {
            "context_id": row.row_id,
            "layer": layer,
            "q_start": q_start,
            "q_shape": list(q.shape),
            "cut_shape": None if cut_keys is None else list(cut_keys.shape),
        }
        buffers = [_bytes(q)] + ([] if cut_keys is None else [_bytes(cut_keys)])
        channel = self._remote[self._shard(row)]
        reply = channel.call("select", header, buffers, timeout_s=self._timeout_s)
        blocks = np.frombuffer(reply.buffers[0], dtype="<i8").reshape(reply.header["shape"])
        return torch.from_numpy(blocks.copy())

    def _call(self, row: Row, method: str, header: dict[str, Any], data: Tensor | None) -> Any:
        buffers = [] if data is None else [_bytes(data)]
        channel = self._remote[self._shard(row)]
        return channel.call(method, header, buffers, timeout_s=self._timeout_s)

    def _shard(self, row: Row) -> str:
        """Contexts are spread over retrievers by their first page, so that sharers meet."""
        name = row.keys[0] if row.keys else row.row_id.encode()
        return rendezvous(name, sorted(self._remote), 1)[0]  # type: ignore[arg-type]

    def close(self, row: Row) -> None:
        if self._known.pop(row.row_id, None) is None:
            return
        if self._remote:
            self._call(row, "close", {"context_id": row.row_id}, None)
        else:
            self._local.close(row.row_id)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().reshape(-1).view(np.uint8).data
