"""The decode worker behind the transport: rows in by `generate`, everything else is control."""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..core.config import Config
from ..core.errors import InvalidInput, StaleEpoch
from ..core.page_key import PageKey
from ..kernels.ops import warm_up
from ..kvstore.link_faults import link_faults
from ..kvstore.membership import Membership
from ..kvstore.page_client import PageClient
from ..kvstore.transport import Reply
from .engine import Engine
from .engine_loop import EngineLoop
from .executors import load_model, make_executor
from .memory import keep_for_good
from .model_source import model_dir, model_geometry, policies_of, recipe_for
from .row import RowRequest
from .sampling import Sampling
from .threads import use_threads

_log = logging.getLogger(__name__)


class DecodeService:
    """One decode worker: model, engine and page client in one process.

    The constructor loads the model (seconds). `on_fatal` is called when the engine's thread dies;
    an actor must then exit hard, so that it is started again.
    """

    def __init__(
        self,
        config: Config,
        stores: dict[str, str],
        retrievers: dict[str, str],
        worker_id: str,
        node_id: str,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._config = config
        self._epoch = 0
        self._lock = threading.Lock()
        self._n_generate = 0
        self._started_s = time.monotonic()
        self._totals: dict[str, float] = {}
        use_threads(config.model.n_threads)
        if config.model.device == "cpu":
            _log.warning("compiling kernels, if this is their first run here (a minute or two)")
            _log.warning("kernels are ready after %.1f s", warm_up())
        directory = model_dir(config.model)
        model = load_model(config.model, directory)
        geometry = model_geometry(config)
        recipe = recipe_for(config).fingerprint()
        self._link_faults = link_faults(config.faults, worker_id)
        self._client = PageClient(
            stores,
            geometry,
            recipe,
            replicas=config.store.replicas,
            lease_s=config.store.lease_s,
            timeout_s=config.store.timeout_s,
            node_id=node_id,
            owner=f"{worker_id}/{uuid.uuid4().hex[:8]}",
            wrap_channel=self._link_faults,
            hedge=config.store.hedge,
            write_behind_bytes=config.store.write_behind_bytes,
            prefetch_bytes=config.store.prefetch_bytes,
        )
        self._client.release_former(f"{worker_id}/")
        policies = policies_of(config, geometry.n_layers)
        executor = make_executor(
            config, model, geometry, policies, recipe, self._client, retrievers
        )
        self._engine = Engine(config, model, executor, recipe, _load_tokenizer(directory))
        self._loop = EngineLoop(self._engine, on_fatal or (lambda exc: None))
        self._recipe = recipe
        self._geometry = geometry
        keep_for_good()

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        act = getattr(self, f"_do_{method}", None)
        if act is None:
            raise InvalidInput(f"a decode worker has no method {method!r}")
        if "epoch" in header:
            self._check_epoch(int(header["epoch"]))
        return act(header, buffers)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._loop.stop()
        self._client.close()

    # --- methods --------------------------------------------------------------------------------

    def _do_hello(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        return Reply(
            {
                "worker_id": self.worker_id,
                "model": self._config.model.name,
                "recipe": self._recipe.hex(),
                **self._geometry.to_dict(),
            }
        )

    def _do_epoch(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        return Reply({"epoch": self._epoch})

    def _check_epoch(self, epoch: int) -> None:
        """A gateway that started later owns this worker; rows of the one before it are dropped."""
        with self._lock:
            if epoch < self._epoch:
                raise StaleEpoch(
                    f"epoch {epoch} is older than {self._epoch}: another gateway has taken over"
                )
            newer = epoch > self._epoch
            self._epoch = epoch
        if newer:
            self._loop.cancel_all()

    def _do_generate(
        self, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Iterator[Reply]:
        if not buffers or len(buffers[0]) % 4:
            raise InvalidInput("generate needs the prompt's token ids as little-endian uint32")
        prompt = np.frombuffer(buffers[0], dtype="<u4")
        forced = np.frombuffer(buffers[1], dtype="<u4") if len(buffers) > 1 else ()
        with self._lock:
            self._n_generate += 1
            # a row that is routed here again must not meet its former self
            row_id = f"{header['row_id']}#{self._epoch}.{self._n_generate}"
        request = RowRequest(
            row_id=row_id,
            prompt=prompt,
            n_context_tokens=int(header.get("n_context_tokens", len(prompt))),
            sampling=Sampling.parse(header.get("sampling") or {}),
            forced=tuple(int(t) for t in forced),
            tenant=str(header.get("tenant", "")),
            n_prefilled=int(header.get("n_prefilled", 0)),
        )
        return self._loop.generate(request)

    def _do_cancel(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        prefix = f"{header['row_id']}#"

        def act() -> int:
            rows = [r.row_id for r in self._engine.rows if r.row_id.startswith(prefix)]
            for row_id in rows:
                self._engine.cancel(row_id)
            return len(rows)

        return Reply({"cancelled": self._loop.run(act, self._config.store.timeout_s)})

    def _do_lookup(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        """Leading pages of a prompt that this worker holds now."""
        pages = self._engine.flow.pages
        held = 0
        for key in header["keys"]:
            page_id = pages.page_of_key.get(PageKey(key))
            if page_id is None or not pages.complete[page_id]:
                break
            held += 1
        return Reply({"held": held})

    def _do_stores(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        """Which stores and retrievers there are now: one died, came back, drains or joined."""
        self._client.update_stores(Membership.from_wire(header["membership"]))
        retrievers = {str(k): str(v) for k, v in header.get("retrievers", {}).items()}
        act = functools.partial(self._engine.update_retrievers, retrievers)
        self._loop.run(act, self._config.store.timeout_s)
        return Reply({})

    def _do_stats(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        stats: dict[str, Any] = {
            "rows": self._loop.n_rows,
            "uptime_s": time.monotonic() - self._started_s,
            "pages_known": len(self._engine.flow.pages),
            "bank_slots": self._engine.flow.memory.n_slots,
            "bank_slots_used": self._engine.flow.memory.n_used,
        }
        stats.update({f"store_{k}": v for k, v in self._client.stats().items()})
        if self._link_faults is not None:
            stats.update(self._link_faults.stats())
        return Reply(stats)

    def _do_drain(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        self._loop.drain()
        return Reply({"rows": self._loop.n_rows})

    def _do_health(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        return Reply({"status": "serving", "rows": self._loop.n_rows})


def _load_tokenizer(directory: Any) -> Any | None:
    from transformers import AutoTokenizer

    if not any((directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
        _log.warning("%s has no tokenizer: answers carry token ids without text", directory)
        return None
    return AutoTokenizer.from_pretrained(directory)
