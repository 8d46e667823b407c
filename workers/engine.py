"""The decode engine: chunked prefill, continuous batching, exact resume. One thread calls `step`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.config import Config
from ..core.errors import (
    Cancelled,
    ContextTooLong,
    DataLoss,
    EmptyContext,
    InvalidInput,
    LongreachError,
    NumericalError,
    StoreFull,
    as_longreach_error,
)
from ..core.page_key import RecipeFingerprint, prompt_keys
from .detokenizer import Detokenizer
from .executor import Executor
from .model import ModelAdapter
from .page_errors import PageLost
from .row import Row, RowRequest, RowState
from .sampling import sample
from .scheduler import chunk_end, plan_step, prefill_start, rows_that_fit

LEASE_CHECK_S = 1.0
MAX_RESTARTS = 3
"""Times a row may start again after losing pages before it fails with DATA_LOSS."""


@dataclass(frozen=True)
class RowEvent:
    """Something that happened to a row; `payload` is what goes to the gateway."""

    row_id: str
    kind: Literal["progress", "token", "done", "error"]
    payload: dict[str, Any]
    error: LongreachError | None = None


class Engine:
    """Rows in, events out. Not thread-safe: submit, cancel and step run on one thread."""

    def __init__(
        self,
        config: Config,
        model: ModelAdapter,
        executor: Executor,
        recipe: RecipeFingerprint,
        tokenizer: Any | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._executor = executor
        self.flow = executor.flow
        self._rows: dict[str, Row] = {}
        self._order = 0
        self._next_lease_check_s = 0.0
        self._events: deque[RowEvent] = deque()
        self._max_rows = rows_that_fit(
            config.cache.device_pages,
            self._chunk_tokens(),
            config.cache.page_tokens,
            config.worker.max_rows,
        )

    # --- the outside ----------------------------------------------------------------------------

    @property
    def n_rows(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Sequence[Row]:
        return tuple(self._rows.values())

    @property
    def can_progress(self) -> bool:
        """False when every row waits for pages of another row or for the store."""
        return any(row.state is not RowState.WAITING for row in self._rows.values())

    def submit(self, request: RowRequest) -> None:
        """Take a row. Raises InvalidInput and its kin; an accepted row always ends with an event."""
        if request.row_id in self._rows:
            raise InvalidInput(f"row {request.row_id} is already running on this worker")
        n_prompt, limit = len(request.prompt), self._config.model.max_context_tokens
        if n_prompt == 0:
            raise EmptyContext(f"row {request.row_id} has a prompt of zero tokens")
        if n_prompt > limit:
            raise ContextTooLong(
                f"row {request.row_id}: {n_prompt} tokens exceed max_context_tokens ({limit})"
            )
        if int(request.prompt.max()) >= self._model.vocab_size:
            raise InvalidInput(
                f"row {request.row_id}: token id {int(request.prompt.max())} is outside the "
                f"vocabulary ({self._model.vocab_size})"
            )
        if len(request.forced) > request.sampling.max_tokens:
            raise InvalidInput(
                f"row {request.row_id}: {len(request.forced)} tokens to replay exceed "
                f"max_tokens ({request.sampling.max_tokens})"
            )
        self._order += 1
        attention = self._config.attention
        question = attention.question_start(n_prompt, request.n_context_tokens)
        keys = prompt_keys(
            request.prompt,
            question,
            attention.question_block,
            self._recipe,
            self._config.cache.page_tokens,
        )
        row = Row(request, keys, question, time.monotonic(), self._order)
        row.stats.tokens_prompt = n_prompt
        row.replay = list(request.forced)
        self._rows[request.row_id] = row

    def update_retrievers(self, addresses: dict[str, str]) -> None:
        """Where retrievers are now: one died, came back or joined."""
        self._executor.update_retrievers(addresses)

    def cancel(self, row_id: str) -> None:
        """The row ends with CANCELLED before the next chunk or token; unknown rows are ignored."""
        if row_id in self._rows:
            self._rows[row_id].cancelled = True

    def step(self) -> list[RowEvent]:
        """One decode token for every decoding row, then one prefill chunk. Returns what happened."""
        self.flow.poll()
        self._check_leases()
        for row in [r for r in self._rows.values() if r.cancelled]:
            self._fail(row, Cancelled(f"row {row.row_id} was cancelled"))
        plan = plan_step(
            list(self._rows.values()),
            self._max_rows,
            lambda r: r.wait_key is None or self.flow.is_settled(r.wait_key),
        )
        for row in plan.admit:
            self._guard([row], lambda r=row: self._open(r))
        for row in plan.queued:
            self.flow.prefetch(row)
        if plan.decode:
            self._guard(plan.decode, lambda: self._decode(plan.decode))
        prefill = plan.prefill
        if prefill is None:
            admitted = [r for r in plan.admit if r.state is RowState.PREFILL]
            prefill = admitted[0] if admitted else None
        if prefill is not None and prefill.row_id in self._rows:
            self._guard([prefill], lambda: self._prefill(prefill))
        events = list(self._events)
        self._events.clear()
        return events

    def _check_leases(self) -> None:
        now = time.monotonic()
        if now < self._next_lease_check_s:
            return
        self._next_lease_check_s = now + LEASE_CHECK_S
        lost = self.flow.lost_leases()
        for page_id in lost:
            self.flow.lose(page_id)
        for row in [r for r in self._rows.values() if lost & set(r.page_ids)]:
            self._restart(row)

    # --- life of a row --------------------------------------------------------------------------

    def _guard(self, rows: Sequence[Row], act) -> None:  # type: ignore[no-untyped-def]
        """Run a part of the step; a failure ends or restarts the rows it concerns, never others."""
        try:
            act()
        except PageLost as lost:
            self.flow.lose(lost.page_id)
            for row in rows:
                if lost.page_id in row.page_ids:
                    self._restart(row)
        except StoreFull as full:
            # the row that came last gives up its pages and waits its turn; the others take this step again
            running = [r for r in self._rows.values() if r.state is not RowState.QUEUED]
            self._fail(max([*rows, *running], key=lambda r: r.order), full)
        except NumericalError as error:
            # the error names its row; the others have lost nothing and take this step again
            for row in rows:
                if len(rows) == 1 or error.details.get("row_id") == row.row_id:
                    self._fail(row, error)
        except Exception as exc:
            if len(rows) == 1:
                self._fail(rows[0], as_longreach_error(exc))
                return
            # a joint step cannot tell whose fault it was: every row starts again by itself
            for row in rows:
                self._restart(row, as_longreach_error(exc))

    def _restart(self, row: Row, cause: LongreachError | None = None) -> None:
        row.stats.restarts += 1
        if row.stats.restarts > MAX_RESTARTS:
            self._fail(
                row,
                cause
                or DataLoss(
                    f"row {row.row_id}: pages were lost {row.stats.restarts} times; no store "
                    "returned good bytes"
                ),
            )
            return
        row.stats.pages_recomputed += len(row.page_ids)
        row.replay, row.tokens = [*row.tokens, *row.replay[len(row.tokens) :]], []
        self._close(row)
        row.n_done = 0
        row.state = RowState.QUEUED

    def _open(self, row: Row) -> None:
        now = time.monotonic()
        if row.prefill_started_s is None:
            row.prefill_started_s = now
            row.stats.queue_s = now - row.submitted_s
        row.wait_key = self.flow.open(row)
        if row.wait_key is not None:
            row.state = RowState.WAITING
            return
        page_tokens = self._config.cache.page_tokens
        reused = row.n_existing_pages * page_tokens
        if row.stats.restarts:
            row.stats.pages_recomputed -= row.n_existing_pages
        else:
            n_before = min(row.request.n_prefilled, row.n_prompt) // page_tokens
            row.stats.pages_recomputed = max(
                n_before - row.n_existing_pages, row.n_unreadable_pages, 0
            )
        row.n_done = prefill_start(row.n_prompt, reused)
        row.stats.tokens_reused = row.n_done
        row.stats.pages_context = len(row.keys)
        self._executor.opened(row)
        row.state = RowState.PREFILL
        self._emit(row, "progress", row.progress())

    def _prefill(self, row: Row) -> None:
        started = time.monotonic()
        if not self._executor.prepare(row):
            row.stats.prefill_s += time.monotonic() - started
            return
        start = row.n_done
        end = chunk_end(start, row.n_prompt, self._chunk_tokens())
        self.flow.reserve(row, end)
        logits = self._executor.prefill(row, end)
        row.n_done = end
        self.flow.complete(row, start, end)
        row.stats.tokens_prefilled += end - start
        row.stats.prefill_s += time.monotonic() - started
        if logits is None:
            self._emit(row, "progress", row.progress())
            return
        row.state = RowState.DECODE
        self._emit(row, "progress", row.progress())
        row.text = Detokenizer(self._tokenizer, row.request.sampling.stop)
        row.stats.tokens_replayed = len(row.replay)
        self._take(row, logits)

    def _decode(self, rows: Sequence[Row]) -> None:
        started = time.monotonic()
        for row in rows:
            self.flow.reserve(row, row.n_done + 1)
            self.flow.reserve_early(row, row.n_done + self._executor.n_ahead)
        logits = self._executor.decode(rows)
        for row in rows:
            row.n_done += 1
            self.flow.complete(row, row.n_done - 1, row.n_done)
        share_s = (time.monotonic() - started) / len(rows)
        for i, row in enumerate(rows):
            row.stats.decode_s += share_s
            row.stats.tokens_decoded += 1
            self._guard([row], lambda r=row, at=i: self._take(r, logits[at]))

    def _take(self, row: Row, logits: torch.Tensor) -> None:
        """Choose the next token (or replay it), tell the gateway, end the row when it is complete."""
        assert row.text is not None
        n_tokens = len(row.tokens)
        if n_tokens < len(row.replay):
            row.tokens.append(row.replay[n_tokens])
            row.text.push(row.tokens[-1])
            self._end_if_complete(row)
            return
        token_id = sample(logits.numpy(), row.request.sampling, row.n_done)
        row.tokens.append(token_id)
        if row.stats.ttft_s == 0.0:
            row.stats.ttft_s = time.monotonic() - row.submitted_s
        delta = "" if token_id in self._model.eos_token_ids else row.text.push(token_id)
        self._emit(row, "token", {"index": n_tokens, "token_id": token_id, "text": delta})
        self._end_if_complete(row)

    def _end_if_complete(self, row: Row) -> None:
        assert row.text is not None
        if row.tokens[-1] in self._model.eos_token_ids or row.text.stopped:
            self._finish(row, "stop")
        elif len(row.tokens) >= row.request.sampling.max_tokens:
            self._finish(row, "length")

    def _finish(self, row: Row, reason: str) -> None:
        row.stats.pages_device = self.flow.memory.pages_of_row(row)
        payload = {
            "finish_reason": reason,
            "text": row.text.text if row.text else "",
            "token_ids": list(row.tokens),
            "n_tokens": len(row.tokens),
            "stats": row.stats.to_dict(),
        }
        self._drop(row)
        self._emit(row, "done", payload)

    def _fail(self, row: Row, error: LongreachError) -> None:
        self._drop(row)
        self._events.append(RowEvent(row.row_id, "error", row.stats.to_dict(), error))

    def _drop(self, row: Row) -> None:
        row.state = RowState.ENDED
        self._close(row)
        self._rows.pop(row.row_id, None)

    def _close(self, row: Row) -> None:
        self.flow.close(row)
        self._executor.closed(row)

    def _emit(self, row: Row, kind: Any, payload: dict[str, Any]) -> None:
        self._events.append(RowEvent(row.row_id, kind, {"event": kind, **payload}))

    def _chunk_tokens(self) -> int:
        """New pages are pinned until stored, so a chunk takes at most a quarter of the bank."""
        cache = self._config.cache
        return min(
            self._config.worker.prefill_chunk_tokens,
            max(1, cache.device_pages // 4) * cache.page_tokens,
        )
