"""One question answered while the client listens: the same attempts as a batch row, not journaled."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator

from ..core.config import Config
from ..core.errors import Cancelled, LongreachError
from .jobs import pause_s
from .metrics import Metrics
from .preparer import Preparer
from .results import Outcome
from .row import RowSpec
from .worker_pool import CancelSwitch, NewToken, Progress, RowEvent, WorkerPool, can_retry

log = logging.getLogger("longreach.dispatch")


class Interactive:
    """Thread-safe; each row runs in its caller's thread."""

    def __init__(
        self, config: Config, preparer: Preparer, pool: WorkerPool, metrics: Metrics
    ) -> None:
        self._config = config
        self._preparer = preparer
        self._pool = pool
        self._metrics = metrics
        self._n_running = 0
        self._lock = threading.Lock()

    @property
    def n_running(self) -> int:
        return self._n_running

    def run(self, spec: RowSpec, switch: CancelSwitch) -> Iterator[tuple[str, RowEvent]]:
        """(row_id, event) until the Outcome. A lost worker is replaced without a trace but time.

        Raises Cancelled after switch.cancel(), or the row's own error.
        """
        row_id = f"gen-{secrets.token_hex(8)}"
        started_s = time.monotonic()
        with self._lock:
            self._n_running += 1
        try:
            yield row_id, Progress("queued", 0, 0, 0)
            prepared = self._preparer.prepare(spec)
            yield row_id, Progress("queued", 0, 0, prepared.n_prompt_tokens)
            tokens: list[int] = []
            best = n_losses = most_prefilled = 0
            while True:
                try:
                    for event in self._pool.run(
                        row_id, prepared, spec.sampling, list(tokens), switch, most_prefilled
                    ):
                        if isinstance(event, NewToken):
                            tokens.append(event.token_id)
                        if isinstance(event, Progress | NewToken):
                            n_prefilled = event.prefilled if isinstance(event, Progress) else 0
                            most_prefilled = max(most_prefilled, n_prefilled)
                            score = max(best, n_prefilled + len(tokens))
                            n_losses = 0 if score > best else n_losses
                            best = score
                        if isinstance(event, Outcome):
                            seconds = time.monotonic() - started_s
                            self._metrics.answered("interactive", event, seconds)
                        yield row_id, event
                    return
                except LongreachError as exc:
                    switch.check()
                    n_losses += 1
                    if not can_retry(exc) or n_losses >= self._config.gateway.max_attempts:
                        raise
                    log.warning("row %s is routed again: %s", row_id, exc)
                    self._metrics.lost(exc.reason)
                    switch.wait(pause_s(n_losses))
        except LongreachError as exc:
            if not isinstance(exc, Cancelled):
                self._metrics.failed("interactive", exc.reason)
            raise
        finally:
            with self._lock:
                self._n_running -= 1
