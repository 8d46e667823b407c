"""Rows computed by the CPU's kernels: numba where it is there, plain torch otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.config import Config
from ..core.errors import ConfigError, LongreachError
from ..core.page_key import RecipeFingerprint
from ..core.stage import LayerPolicy
from ..kvstore.page import PageGeometry
from ..kvstore.page_client import PageClient
from .ask_ahead import AskAhead
from .bookmark_file import fingerprint
from .bookmark_groups import BookmarkGroups
from .bookmark_index import BookmarkIndex
from .bookmark_store import BookmarkStore
from .bookmarks import Bookmarks
from .cpu_memory import CpuMemory
from .decode_step import DecodeStep
from .layer_attention import LayerAttention
from .model import ModelAdapter
from .page_flow import PageFlow
from .prefill_bookmarks import PrefillBookmarks
from .prefill_step import PrefillStep
from .row import Row
from .scheduler import min_device_pages, query_blocks
from .summary_index import SummaryIndex

_log = logging.getLogger(__name__)


class CpuExecutor:
    """An `Executor`. Raises ConfigError if the bank is too small for the policies."""

    def __init__(
        self,
        config: Config,
        model: ModelAdapter,
        geometry: PageGeometry,
        policies: tuple[LayerPolicy, ...],
        recipe: RecipeFingerprint,
        client: PageClient | None,
        retrievers: dict[str, str],
        bookmarks: Bookmarks | None = None,
    ) -> None:
        needed = min_device_pages(policies, geometry.page_tokens)
        if config.cache.device_pages < needed:
            raise ConfigError(
                f"cache.device_pages ({config.cache.device_pages}) is less than the {needed} pages "
                "that sink, window and one group of selected blocks need"
            )
        self._config = config
        self._model = model
        self.memory = CpuMemory(geometry, config.cache.device_pages, client)
        self.flow = PageFlow(geometry, self.memory, recipe, client, config.store.timeout_s * 3)
        self.memory.reader.with_room = self.flow.with_room
        self.index = SummaryIndex(config.retriever, policies, geometry.page_tokens, retrievers)
        self.bookmarks: BookmarkIndex | None = None
        if bookmarks is not None:
            self.bookmarks = BookmarkIndex(
                bookmarks, model, policies, self.memory.reader, self.flow.versions_of, self.index
            )
            if config.retriever.asynchronous:
                begin, timeout_s = self.bookmarks.begin, config.retriever.timeout_s
                self.bookmarks.ahead = AskAhead(policies, begin, self.index.close, timeout_s)
            if client is not None:
                groups = BookmarkGroups(geometry, self.bookmarks.layers, fingerprint(bookmarks))
                self.bookmarks.store = BookmarkStore(groups, client, self.flow.is_writing)
                self.flow.write_beside = self.bookmarks.store.poll
        self.attention = self._attention(policies)
        self.prefill_attention = self.attention
        if any(policy.prefill_stages is not None for policy in policies):
            self.prefill_attention = self._attention([policy.in_prefill for policy in policies])
        self.n_ahead = self.attention.most_ahead

    def _attention(self, policies: Sequence[LayerPolicy]) -> LayerAttention:
        return LayerAttention(
            self.memory,
            self.flow.versions_of,
            policies,
            self._model.rope,
            self.index,
            self._model.n_heads,
            self.bookmarks,
        )

    def opened(self, row: Row) -> None:
        page_tokens = self._config.cache.page_tokens
        n_pages = -(-(row.n_prompt + row.request.sampling.max_tokens) // page_tokens)
        # new pages take the lowest numbers that are free
        n_reserved = len(self.flow.pages) + n_pages - row.n_existing_pages
        self.index.reserve(n_reserved)
        if self.bookmarks is not None:
            self.bookmarks.reserve(n_reserved)
        n_layers = len(self.attention.policies)
        row.selections = [None] * n_layers
        row.plans = [None] * n_layers

    def prepare(self, row: Row) -> bool:
        n_pages = row.n_done // self._config.cache.page_tokens
        return self.bookmarks is None or self.bookmarks.bring_up(row, n_pages)

    def prefill(self, row: Row, end: int) -> Tensor | None:
        start, question_block = row.n_done, self._config.attention.question_block
        blocks = query_blocks(start, end, row.question_start, question_block)
        beside = None
        if self.bookmarks is not None:
            beside = PrefillBookmarks(self.bookmarks, row, start, end, blocks)
        step = PrefillStep(
            self.prefill_attention, row, start, blocks, row.question_start, question_block, beside
        )
        tokens = torch.from_numpy(row.request.prompt[start:end].astype("int64"))
        started = time.monotonic()
        if self.bookmarks is None or not beside:
            hidden = self._model.hidden(tokens, step, decode=False)
        else:
            trained = self.bookmarks.bookmarks
            hidden = self._model.hidden_beside(tokens, step, trained, len(beside))
            beside.finish()
        row.stats.seconds_linear += time.monotonic() - started - step.seconds
        return self._model.logits(hidden[-1:])[0] if end == row.n_prompt else None

    def decode(self, rows: Sequence[Row]) -> Tensor:
        if self.bookmarks is not None:
            self.bookmarks.refresh(rows)
        step = DecodeStep(self.attention, rows, self._config.worker.audit_interval)
        tokens = torch.tensor([row.next_token() for row in rows], dtype=torch.int64)
        started = time.monotonic()
        hidden = self._model.hidden(tokens, step, decode=True)
        step.finish()
        logits = self._model.logits(hidden)
        linear_s = (time.monotonic() - started - step.seconds) / len(rows)
        for row in rows:
            row.stats.seconds_linear += linear_s
        return logits

    def closed(self, row: Row) -> None:
        row.selections, row.plans, row.audit, row.bookmark = [], [], None, None
        if self.bookmarks is not None:
            self.bookmarks.close(row)
        try:
            self.index.close(row)
        except LongreachError as exc:
            # a retriever that is gone has forgotten the context anyway
            _log.warning("closing a context at the retriever failed: %s", exc)

    def update_retrievers(self, addresses: dict[str, str]) -> None:
        self.index.update_retrievers(addresses)
