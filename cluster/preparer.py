"""From a row's spec to tokens that a worker can run: read the context, tokenize, check limits."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..core.config import Config
from ..core.errors import InvalidInput
from ..core.page_key import PageKey
from ..kvstore.page import PageGeometry
from .contexts import ROW_SOURCE, ContextStore
from .journal import Journal
from .plan import RowSize, check_row
from .row import RowSpec
from .uri import read_uri

BUILD_AT_ONCE = 2
"""Prompts tokenized at the same time."""


class Prompt(Protocol):
    """What a prompt builder makes (workers/prompt.py)."""

    token_ids: np.ndarray
    n_context_tokens: int


class PromptBuilder(Protocol):
    """The tokenizer's side (workers/prompt.py). Used from many threads."""

    def build(self, context: str, question: str, answer_prefix: str = "") -> Any: ...

    def build_messages(self, messages: list[dict[str, Any]], answer_prefix: str = "") -> Any: ...

    def page_keys(self, prompt: Any) -> list[PageKey]: ...


@dataclass(frozen=True)
class Prepared:
    """A row ready to be routed. token_ids: little-endian uint32 bytes [n_prompt_tokens]."""

    token_ids: bytes
    n_prompt_tokens: int
    n_context_tokens: int
    keys: tuple[PageKey, ...]


@dataclass(frozen=True)
class ContextPages:
    """The full pages that every row on a context begins with. token_ids: uint32 [n_pages * page_tokens]."""

    token_ids: np.ndarray
    keys: tuple[PageKey, ...]


class Preparer:
    """Thread-safe."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        contexts: ContextStore,
        prompts: PromptBuilder,
        geometry: PageGeometry,
    ) -> None:
        self._config = config
        self._journal = journal
        self._contexts = contexts
        self._prompts = prompts
        self._geometry = geometry
        self._uri_locks: dict[str, tuple[threading.Lock, int]] = {}
        self._uri_lock = threading.Lock()
        self._building = threading.Semaphore(BUILD_AT_ONCE)

    def import_uri(self, uri: str, source: str, hold: set[str] | None = None) -> str:
        """Read a URI into the context store; its context_id."""
        with closing(self._open_uri(uri)) as chunks:
            return self._contexts.add(chunks, source, hold).context_id

    def _open_uri(self, uri: str) -> Generator[bytes, None, None]:
        gateway = self._config.gateway
        return read_uri(
            uri,
            max_bytes=self._contexts.max_bytes,
            timeout_s=gateway.uri_timeout_s,
            protocols=gateway.uri_protocols,
        )

    def _read_text(self, uri: str) -> str:
        """For a row that is asked once: nothing is kept."""
        try:
            return b"".join(self._open_uri(uri)).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise InvalidInput(f"{uri}: not valid UTF-8 at byte {exc.start}", uri=uri) from exc

    def prepare(self, spec: RowSpec, row_id: str | None = None) -> Prepared:
        """row_id: of a journaled row, whose URI is bound to what was read first.

        Raises the InvalidInput family, NotFound (context), UnreadableUri.
        """
        context, context_id = spec.context, spec.context_id
        if spec.context_uri is not None and row_id is not None:
            context_id = self._bind(spec.context_uri, row_id)
        elif spec.context_uri is not None:
            context = self._read_text(spec.context_uri)
        # a prompt of millions of tokens takes memory and time: few are made at once
        with self._building:
            if spec.messages:
                messages = [message.model_dump() for message in spec.messages]
                prompt = self._prompts.build_messages(messages, spec.answer_prefix)
            else:
                if context_id is not None:
                    context = self._contexts.text(context_id)
                prompt = self._prompts.build(context or "", spec.question, spec.answer_prefix)
            return self._check(spec, prompt)

    def context_pages(self, text: str) -> ContextPages:
        """What rows on this context share, whatever they ask. Raises InvalidInput if it fills no page."""
        with self._building:
            # any question does: context and question are tokenized apart
            prompt = self._prompts.build(text, "?")
            keys = self._prompts.page_keys(prompt)
        page_tokens = self._config.cache.page_tokens
        n_pages = prompt.n_context_tokens // page_tokens
        if not n_pages:
            raise InvalidInput(
                f"the context has {prompt.n_context_tokens} tokens, a page has {page_tokens}: "
                "there is no whole page"
            )
        token_ids = np.asarray(prompt.token_ids[: n_pages * page_tokens], dtype="<u4")
        return ContextPages(token_ids, tuple(keys[:n_pages]))

    def _check(self, spec: RowSpec, prompt: Prompt) -> Prepared:
        token_ids = np.ascontiguousarray(prompt.token_ids, dtype="<u4")
        keys = tuple(self._prompts.page_keys(prompt))
        check_row(
            RowSize(
                spec.custom_id,
                len(token_ids),
                prompt.n_context_tokens,
                spec.sampling.max_tokens,
                keys,
            ),
            self._config,
            self._geometry,
        )
        return Prepared(token_ids.tobytes(), len(token_ids), prompt.n_context_tokens, keys)

    def _bind(self, uri: str, row_id: str) -> str:
        """The context that a journaled row's URI stands for."""
        # one reader per URI: rows of one job share what the first one read, also after a restart
        with self._alone(f"{row_id.rpartition('.')[0]} {uri}"):
            hold: set[str] = set()
            try:
                context_id = self._journal.bound_context(row_id)
                if context_id is None:
                    context_id = self.import_uri(uri, ROW_SOURCE, hold)
                self._journal.bind_context(
                    row_id, context_id, self._contexts.get(context_id).n_bytes
                )
            finally:
                self._contexts.release(hold)
        return context_id

    @contextmanager
    def _alone(self, name: str) -> Any:
        with self._uri_lock:
            lock, users = self._uri_locks.get(name, (threading.Lock(), 0))
            self._uri_locks[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._uri_lock:
                lock, users = self._uri_locks[name]
                if users == 1:
                    del self._uri_locks[name]
                else:
                    self._uri_locks[name] = (lock, users - 1)
