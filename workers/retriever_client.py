"""A worker's contexts at the retrievers: what they know of each, and the calls.

With `retriever.asynchronous` choices are asked for without waiting, several messages at a time. One overtakes
another only where it does not matter: none is sent before the keys that it needs have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import RetrieverConfig
from ..core.errors import DeadlineExceeded
from ..kvstore.placement import rendezvous
from ..kvstore.transport import Buffer, Channel, Reply, connect
from .row import Row

MESSAGE_BYTES = 32 << 20
"""Keys that are sent together, unless those of one layer are more."""
N_UNDER_WAY = 8
"""Messages to one retriever that are under way at a time."""


@dataclass(frozen=True, eq=False)
class Question:
    """Which pages bookmarks choose. query [H, D]; weights: log_scale and nearness of the layer. keys_of: of
    pages [first, last) below n_pages, called if the retriever does not know them."""

    layer: int
    row: Row
    query: Tensor
    q_start: int
    weights: tuple[float, float]
    n_pages: int
    keys_of: Callable[[int, int], np.ndarray]

    def header(self) -> dict[str, Any]:
        at = {"context_id": self.row.row_id, "layer": self.layer, "q_start": self.q_start}
        return at | {"weights": list(self.weights), "q_shape": list(self.query.shape)}


@dataclass(frozen=True, eq=False)
class Asked:
    """One answer of a message under way."""

    reply: Future[Reply]
    index: int

    def result(self, timeout_s: float) -> Tensor:
        """Chunk starts int64 [Hsel, n]. Raises DeadlineExceeded, or what the call raised."""
        try:
            reply = self.reply.result(timeout_s)
        except FutureTimeout:
            raise DeadlineExceeded(
                f"the retriever did not answer within {timeout_s} s; raise retriever.timeout_s, or look "
                "at its load"
            ) from None
        return _starts(reply.buffers[self.index], reply.header["shapes"][self.index])


@dataclass
class _Context:
    known: dict[int, int]
    """Per layer, leading pages that the retriever has or will have."""
    added: Future[Reply] | None = None
    """The latest message with keys, if it was not waited for."""
    asked: list[Future[Reply]] = field(default_factory=list)


class RetrieverClient:
    """For the engine's one thread. Raises what calls raise: Unavailable, DeadlineExceeded."""

    def __init__(self, config: RetrieverConfig, retrievers: dict[str, str]) -> None:
        self._timeout_s = config.timeout_s
        self._channels: dict[str, Channel] = {n: connect(at) for n, at in retrievers.items()}
        self._pools = {
            name: ThreadPoolExecutor(N_UNDER_WAY, f"ask-{name}")
            for name in retrievers
            if config.asynchronous
        }
        self._contexts: dict[str, _Context] = {}
        self._closing: dict[str, Future[Reply]] = {}

    def update(self, addresses: dict[str, str]) -> None:
        """A retriever came back at another address: it has lost its contexts, so they are re-sent."""
        for name, address in addresses.items():
            channel = self._channels.get(name)
            if channel is not None and channel.address != address:
                channel.close()
                self._channels[name] = connect(address)
                self._contexts.clear()

    def known(self, row: Row, layer: int) -> int:
        """Leading pages of the row that its retriever knows; opens the context."""
        return self._context(row).known.get(layer, 0)

    def add(self, row: Row, layer: int, first: int, last: int, rows: Tensor) -> None:
        """What `page_summaries` made of pages [first, last); `first` are known."""
        self._call(row, "add", _added(row, layer, first, last, rows), [_bytes(rows)])
        self._context(row).known[layer] = last

    def select(self, row: Row, header: dict[str, Any], tensors: Sequence[Tensor]) -> Tensor:
        header = {"context_id": row.row_id, **header}
        return _blocks(self._call(row, "select", header, [_bytes(t) for t in tensors]))

    def choose(self, asked: Question) -> Tensor:
        """Pages chosen by bookmarks: starts int64 [Hsel, n]."""
        first = self.known(asked.row, asked.layer)
        if first < asked.n_pages:
            self.add(asked.row, asked.layer, first, asked.n_pages, _keys(asked, first))
        return _blocks(self._call(asked.row, "choose", asked.header(), [_bytes(asked.query)]))

    def ask(self, asked: Sequence[Question]) -> list[Asked]:
        """The same without waiting: one message to each retriever, or some where there are many keys to
        send."""
        answers: dict[int, Asked] = {}
        by_shard: dict[str, list[int]] = {}
        for i, one in enumerate(asked):
            by_shard.setdefault(self._shard(one.row), []).append(i)
        for shard, mine in by_shard.items():
            self._send_keys(shard, [asked[i] for i in mine])
            contexts = {asked[i].row.row_id: self._context(asked[i].row) for i in mine}
            header = {"adds": [], "asks": [asked[i].header() for i in mine]}
            queries = [_bytes(asked[i].query) for i in mine]
            reply = self._send(shard, "ask", header, queries, list(contexts.values()))
            answers |= {i: Asked(reply, at) for at, i in enumerate(mine)}
        return [answers[i] for i in range(len(asked))]

    def close(self, row: Row) -> None:
        """The row's context ends; whoever asks for it again sends it anew."""
        context = self._contexts.pop(row.row_id, None)
        if context is None:
            return
        header = {"context_id": row.row_id}
        if not self._pools:
            self._call(row, "close", header)
            return
        self._closing = {name: f for name, f in self._closing.items() if not f.done()}
        shard, before = self._shard(row), [*context.asked, *_pending(context)]
        # a retriever that is gone has forgotten the context anyway: nobody waits for this
        self._closing[row.row_id] = self._submit(shard, before, "close", header, [])

    # --- messages -------------------------------------------------------------------------------

    def _context(self, row: Row) -> _Context:
        if row.row_id not in self._contexts:
            closing = self._closing.pop(row.row_id, None)
            if closing is not None:
                wait([closing], self._timeout_s)
            header = {"context_id": row.row_id, "keys": [bytes(k) for k in row.keys]}
            known = self._call(row, "open", header).header["known"]
            self._contexts[row.row_id] = _Context({int(k): int(v) for k, v in known.items()})
        return self._contexts[row.row_id]

    def _send_keys(self, shard: str, asked: Sequence[Question]) -> None:
        """Those that questions need and the retriever was not sent yet."""
        adds: list[dict[str, Any]] = []
        buffers: list[memoryview] = []
        contexts: dict[str, _Context] = {}
        for i, one in enumerate(asked):
            first = self.known(one.row, one.layer)
            if first < one.n_pages:
                keys = _keys(one, first)
                adds.append(_added(one.row, one.layer, first, one.n_pages, keys))
                buffers.append(_bytes(keys))
                context = contexts[one.row.row_id] = self._context(one.row)
                context.known[one.layer] = one.n_pages
            full = sum(buffer.nbytes for buffer in buffers) >= MESSAGE_BYTES
            if adds and (full or i + 1 == len(asked)):
                header = {"adds": adds, "asks": []}
                added = self._send(shard, "ask", header, buffers, list(contexts.values()))
                for context in contexts.values():
                    context.added = added
                adds, buffers, contexts = [], [], {}

    def _send(
        self,
        shard: str,
        method: str,
        header: dict[str, Any],
        buffers: Sequence[Buffer],
        contexts: Sequence[_Context],
    ) -> Future[Reply]:
        """A call that is not waited for, after the keys of its contexts have arrived."""
        before = [future for context in contexts for future in _pending(context)]
        sent = self._submit(shard, before, method, header, buffers)
        for context in contexts:
            context.asked = [f for f in context.asked if not f.done()] + [sent]
        return sent

    def _submit(
        self,
        shard: str,
        before: Sequence[Future[Reply]],
        method: str,
        header: dict[str, Any],
        buffers: Sequence[Buffer],
    ) -> Future[Reply]:
        channel = self._channels[shard]

        def act() -> Reply:
            wait(before)  # all were submitted earlier, so they have a thread already
            return channel.call(method, header, buffers, timeout_s=self._timeout_s)

        return self._pools[shard].submit(act)

    def _call(
        self, row: Row, method: str, header: dict[str, Any], buffers: Sequence[Buffer] = ()
    ) -> Reply:
        channel = self._channels[self._shard(row)]
        return channel.call(method, header, buffers, timeout_s=self._timeout_s)

    def _shard(self, row: Row) -> str:
        """Contexts are spread over retrievers by their first page, so that sharers meet."""
        name = row.keys[0] if row.keys else row.row_id.encode()
        return rendezvous(name, sorted(self._channels), 1)[0]  # type: ignore[arg-type]


def _pending(context: _Context) -> list[Future[Reply]]:
    return [] if context.added is None or context.added.done() else [context.added]


def _keys(asked: Question, first: int) -> Tensor:
    return torch.from_numpy(asked.keys_of(first, asked.n_pages))[:, :, None, None]


def _added(row: Row, layer: int, first: int, last: int, rows: Tensor) -> dict[str, Any]:
    at = {"context_id": row.row_id, "layer": layer, "first_page": first, "last_page": last}
    return at | {"shape": list(rows.shape)}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().reshape(-1).view(np.uint8).data


def _blocks(reply: Reply) -> Tensor:
    return _starts(reply.buffers[0], reply.header["shape"])


def _starts(data: Buffer, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<i8").reshape(shape).copy())
