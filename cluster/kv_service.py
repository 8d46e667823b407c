"""Kv: what operators ask of the stores. Every call to a store has a deadline of its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..core.errors import InvalidInput, LongreachError, NotFound, Unavailable
from ..kvstore.transport import Channel
from .background import in_background
from .proto import kv_pb2 as pb
from .proto import kv_pb2_grpc
from .results import numeric_stats
from .rpc_status import long_call, streaming, unary
from .service import Service
from .snapshots import Step
from .store_calls import (
    STAT_TIMEOUT_S,
    ask_all,
    drop_everything,
    drop_keys,
    each,
    store_states,
    told,
)
from .store_verify import verify_stores

DRAIN_POLL_S = 0.5
MAX_DROP_ROUNDS = 4
_NO_SUMS = ("_s", "epoch", "drained")
"""Endings of numbers that are not amounts."""


class KvServicer(kv_pb2_grpc.KvServicer):
    """Thread-safe."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @unary
    def Stat(self, request: pb.KvStatRequest, context: Any) -> pb.KvStatResponse:
        runtime, config = self.service.runtime, self.service.config
        response = pb.KvStatResponse(page_bytes=self.service.page_bytes)
        answers = ask_all(runtime.stores(), "stats", {}, STAT_TIMEOUT_S)
        totals: Counter[str] = Counter()
        for store_id, state in sorted(store_states(runtime, config).items()):
            answer = answers.get(store_id, Unavailable(f"store {store_id} is lost"))
            if isinstance(answer, LongreachError):
                response.stores.add(store_id=store_id, state=state, error=told(answer))
                continue
            numbers = numeric_stats(answer)
            totals.update({k: v for k, v in numbers.items() if not k.endswith(_NO_SUMS)})  # type: ignore[arg-type]
            response.stores.add(store_id=store_id, state=state, numbers=numbers)
        response.totals.update(totals)
        return response

    @streaming
    def Verify(self, request: pb.VerifyRequest, context: Any) -> Iterator[pb.VerifyUpdate]:
        channels = self._stores(request.store_id)
        timeout_s = self.service.config.store.timeout_s
        lost = {} if request.store_id else self._lost(channels)
        yield from verify_stores(channels, lost, context.is_active, timeout_s)

    @long_call
    def Scrub(self, request: pb.ScrubRequest, context: Any) -> pb.ScrubResponse:
        response = pb.ScrubResponse()
        asked = {"start": True} if request.start else {}
        for store_id, answer in self._ask(lambda c: _call(c, "scrub", asked)).items():
            if isinstance(answer, LongreachError):
                response.stores.add(store_id=store_id, error=told(answer))
                continue
            response.stores.add(
                store_id=store_id,
                running=bool(answer["running"]),
                pages_checked=int(answer["pages_checked"]),
                bad=int(answer["bad"]),
                last_round_s=float(answer["last_round_s"] or 0.0),
            )
        return response

    @streaming
    def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> Iterator[pb.SnapshotUpdate]:
        _require(request.context_id, "context_id")
        snapshots = self.service.snapshots
        steps = snapshots.save(request.context_id, request.uri, not request.no_text)
        return self._steps(steps, request.uri, "snapshot", context)

    @streaming
    def Restore(self, request: pb.RestoreRequest, context: Any) -> Iterator[pb.SnapshotUpdate]:
        self.service.dispatcher.check_accepting()
        steps = self.service.snapshots.load(request.uri)
        return self._steps(steps, request.uri, "restore", context)

    @long_call
    def Drop(self, request: pb.DropRequest, context: Any) -> pb.DropResponse:
        timeout_s = self.service.config.store.timeout_s
        response = pb.DropResponse()
        if bool(request.context_id) == request.all:
            raise InvalidInput("give one of context_id and all", field="context_id")
        if request.all:
            answers = self._drop(lambda channel: drop_everything(channel, timeout_s))
        else:
            text = self.service.contexts.text(request.context_id)
            keys = [bytes(key) for key in self.service.preparer.context_pages(text).keys]
            response.n_pages = len(keys)
            answers = self._drop(lambda channel: drop_keys(channel, keys, timeout_s))
        for store_id, answer in answers.items():
            if isinstance(answer, LongreachError):
                response.stores.add(store_id=store_id, error=told(answer))
            else:
                response.stores.add(store_id=store_id, n_dropped=answer)
        return response

    def _drop(self, drop: Callable[[Channel], int]) -> dict[str, Any]:
        """Rounds until nothing is left: a store that has not dropped yet may repair one that has."""
        answers = self._ask(drop)
        for _ in range(MAX_DROP_ROUNDS - 1):
            again = {s: n for s, n in self._ask(drop).items() if isinstance(n, int)}
            for store_id, n_dropped in again.items():
                if isinstance(answers.get(store_id), int):
                    answers[store_id] += n_dropped
            if not any(again.values()):
                break
        return answers

    @streaming
    def DrainStore(self, request: pb.DrainStoreRequest, context: Any) -> Iterator[pb.DrainUpdate]:
        _require(request.store_id, "store_id")
        # what the store says before it knows of this is about another membership
        epoch = self.service.runtime.drain_store(request.store_id).epoch
        heard_s = time.monotonic()
        silence_s = self.service.config.gateway.heartbeat_timeout_s
        while context.is_active():
            update = pb.DrainUpdate(store_id=request.store_id)
            try:
                status = _call(self._stores(request.store_id)[request.store_id], "repair_status")
                heard_s = time.monotonic()
                update.drained = bool(status["drained"]) and int(status["epoch"]) >= epoch
                update.to_move = int(status["to_move"]) + int(status["under_replicated"])
                update.pages_pushed = int(status["pages_pushed"])
                update.bytes_pushed = int(status["bytes_pushed"])
            except LongreachError as exc:
                if request.wait and time.monotonic() - heard_s > silence_s:
                    raise
                update.error = told(exc)
            yield update
            if update.drained or not request.wait:
                return
            time.sleep(DRAIN_POLL_S)

    def _steps(self, steps: Any, uri: str, name: str, context: Any) -> Iterator[pb.SnapshotUpdate]:
        config = self.service.config
        # a step may wait for files, or for a page that store after store refuses
        silence_s = max(config.gateway.uri_timeout_s, 5 * config.store.timeout_s)
        for step in in_background(steps, name, context.is_active, silence_s):
            yield _update(step, uri)

    def _stores(self, store_id: str = "") -> dict[str, Channel]:
        """Live stores, or the named one. Raises NotFound, Unavailable."""
        live = self.service.runtime.stores()
        if not store_id:
            return live
        states = store_states(self.service.runtime, self.service.config)
        if store_id not in states:
            raise NotFound(
                f"no store {store_id!r:.80}; there are {', '.join(sorted(states))}",
                store_id=store_id,
            )
        if store_id not in live:
            raise Unavailable(f"store {store_id} is lost; it counts again when it answers")
        return {store_id: live[store_id]}

    def _lost(self, live: dict[str, Channel]) -> dict[str, LongreachError]:
        states = store_states(self.service.runtime, self.service.config)
        return {s: Unavailable(f"store {s} is lost") for s in states if s not in live}

    def _ask(self, ask: Callable[[Channel], Any]) -> dict[str, Any]:
        """An answer or an error of every store that is known, by its id."""
        live = self._stores()
        return dict(sorted({**each(live, ask), **self._lost(live)}.items()))


def _call(channel: Channel, method: str, header: dict[str, Any] | None = None) -> dict[str, Any]:
    return channel.call(method, header, timeout_s=STAT_TIMEOUT_S).header


def _require(value: str, field: str) -> None:
    if not value:
        raise InvalidInput(f"{field} is missing", field=field)


def _update(step: Step, uri: str) -> pb.SnapshotUpdate:
    update = pb.SnapshotUpdate(
        phase=step.phase, pages=step.pages, total_pages=step.total_pages, bytes=step.n_bytes
    )
    if step.done is not None:
        manifest = step.done.manifest
        update.done.CopyFrom(
            pb.SnapshotDone(
                uri=uri,
                context_id=manifest.context_id if manifest.document is not None else "",
                n_tokens=manifest.n_tokens,
                n_pages=manifest.n_pages,
                n_bytes=manifest.n_bytes,
                seconds=step.done.seconds,
            )
        )
    return update
