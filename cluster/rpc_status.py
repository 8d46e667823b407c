"""Errors to gRPC: rich statuses, one guard around every method, a bound on open streams."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ..core.errors import (
    Draining,
    InvalidInput,
    LongreachError,
    ResourceExhausted,
    as_longreach_error,
)

log = logging.getLogger("longreach.gateway")
DOMAIN = "longreach"
RETRY_S = 1.0
FULL_RETRY_S = 5.0
MAX_METADATA_CHARS = 400
"""Details travel in HTTP trailers, whose size peers bound."""
F = TypeVar("F", bound=Callable[..., Any])


def status_of(error: LongreachError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo; RetryInfo or BadRequest where they apply."""
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.grpc_code), message=error.message[:2000]
    )
    metadata = {str(k): str(v)[:MAX_METADATA_CHARS] for k, v in error.details.items()}
    _add(
        status,
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata),
    )
    if error.retryable:
        seconds = FULL_RETRY_S if isinstance(error, ResourceExhausted | Draining) else RETRY_S
        delay = duration_pb2.Duration(seconds=int(seconds))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, InvalidInput):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=str(error.details.get("field", "")),
            description=error.message[:MAX_METADATA_CHARS],
            reason=error.reason,
        )
        _add(status, error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def abort(context: Any, error: LongreachError) -> NoReturn:
    """End the call with the error's status; raises what grpc needs to see."""
    context.abort_with_status(rpc_status.to_status(status_of(error)))
    raise AssertionError("abort_with_status returned")


class StreamSlots:
    """Open streams hold a thread each: a bound keeps threads free for short calls."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._n_open = 0
        self._lock = threading.Lock()

    @property
    def n_open(self) -> int:
        return self._n_open

    @contextmanager
    def take(self) -> Iterator[None]:
        """Raises ResourceExhausted when all are taken."""
        with self._lock:
            if self._n_open >= self._limit:
                raise ResourceExhausted(
                    f"{self._limit} streams are open at this gateway; close some, or try later",
                    limit=self._limit,
                )
            self._n_open += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_open -= 1


def unary(method: F) -> F:
    """A method that answers once; what it raises becomes a rich status."""

    @wraps(method)
    def guarded(self: Any, request: Any, context: Any) -> Any:
        try:
            return method(self, request, context)
        except Exception as exc:
            _fail(self, method.__name__, context, exc)

    return guarded  # type: ignore[return-value]


def long_call(method: F) -> F:
    """A unary answer to a stream of requests, or one that waits: it takes a stream slot."""

    @wraps(method)
    def guarded(self: Any, request: Any, context: Any) -> Any:
        try:
            with self.service.streams.take():
                return method(self, request, context)
        except Exception as exc:
            _fail(self, method.__name__, context, exc)

    return guarded  # type: ignore[return-value]


def streaming(method: F) -> F:
    """A method that yields; it takes a stream slot while it is open."""

    @wraps(method)
    def guarded(self: Any, request: Any, context: Any) -> Any:
        try:
            with self.service.streams.take():
                yield from method(self, request, context)
        except Exception as exc:
            _fail(self, method.__name__, context, exc)

    return guarded  # type: ignore[return-value]


def _fail(servicer: Any, name: str, context: Any, exc: Exception) -> NoReturn:
    if isinstance(exc, grpc.RpcError):
        raise exc  # the client vanished while its stream was read
    error = as_longreach_error(exc)
    if not isinstance(exc, LongreachError):
        log.exception("%s", name)
    servicer.service.metrics.refused(name, error.reason)
    abort(context, error)


def _add(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
