"""gRPC statuses back into the error tree: the client's half of the rich error details."""

from __future__ import annotations

from functools import cache
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ..core import errors
from ..core.errors import LongreachError

_BY_STATUS: dict[str, type[LongreachError]] = {
    "INVALID_ARGUMENT": errors.InvalidInput,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.Cancelled,
    "ABORTED": errors.Aborted,
    "DATA_LOSS": errors.DataLoss,
}


def error_from_rpc(exc: grpc.RpcError, address: str) -> LongreachError:
    """The error the gateway raised, or the nearest one to what the channel reports."""
    code = exc.code().name
    message = exc.details() or code
    status = rpc_status.from_call(exc)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            kind = _by_reason().get(info.reason, _BY_STATUS.get(code, errors.InternalError))
            return kind(message, **dict(info.metadata))
    if code == "UNAVAILABLE":
        return errors.Unavailable(
            f"no gateway answers at {address} ({message}); start one with `longreach serve`, "
            "or name it with --address"
        )
    if code == "DEADLINE_EXCEEDED":
        return errors.DeadlineExceeded(f"the gateway at {address} did not answer in time")
    return _BY_STATUS.get(code, errors.InternalError)(message)


@cache
def _by_reason() -> dict[str, type[LongreachError]]:
    found: dict[str, type[LongreachError]] = {}
    waiting: list[Any] = [LongreachError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found[kind("").reason] = kind
    return found
