"""The part of the Python client that operators use: the stores' state, checks, snapshots, drains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .proto import kv_pb2 as pb

_DROP_S = 600.0
_STREAM_S = 24 * 3600.0
"""Longest verify, snapshot or restore; the gateway bounds how long one may be silent."""


class KvClient:
    """`Client.kv`. What a store could not answer is in its `error` field; the call itself succeeds."""

    def __init__(
        self,
        stub: Any,
        call: Callable[..., Any],
        send: Callable[..., Any],
        stream: Callable[..., Iterator[Any]],
    ) -> None:
        self._stub = stub
        self._call = call
        self._send = send
        self._stream = stream

    def stat(self) -> pb.KvStatResponse:
        response: pb.KvStatResponse = self._call(self._stub.Stat, pb.KvStatRequest())
        return response

    def verify(self, store_id: str = "") -> Iterator[pb.VerifyUpdate]:
        """Counts so far, until every store has checked every page that it holds."""
        return self._stream(self._stub.Verify, pb.VerifyRequest(store_id=store_id), _STREAM_S)

    def scrub(self, *, start: bool = False) -> pb.ScrubResponse:
        request = pb.ScrubRequest(start=start)
        response: pb.ScrubResponse = self._call(self._stub.Scrub, request)
        return response

    def snapshot(
        self, context_id: str, uri: str, *, with_text: bool = True
    ) -> Iterator[pb.SnapshotUpdate]:
        """The last update has `done`. The URI is one that the gateway reaches."""
        request = pb.SnapshotRequest(context_id=context_id, uri=uri, no_text=not with_text)
        return self._stream(self._stub.Snapshot, request, _STREAM_S)

    def restore(self, uri: str) -> Iterator[pb.SnapshotUpdate]:
        """The last update has `done`."""
        return self._stream(self._stub.Restore, pb.RestoreRequest(uri=uri), _STREAM_S)

    def drop(self, context_id: str = "", *, everything: bool = False) -> pb.DropResponse:
        request = pb.DropRequest(context_id=context_id, all=everything)
        response: pb.DropResponse = self._send(self._stub.Drop, request, _DROP_S)
        return response

    def drain(
        self, store_id: str, *, wait: bool = False, timeout_s: float = 3600.0
    ) -> Iterator[pb.DrainUpdate]:
        """The store takes no new pages and hands over those it has; with wait until it has."""
        request = pb.DrainStoreRequest(store_id=store_id, wait=wait)
        return self._stream(self._stub.DrainStore, request, timeout_s)
