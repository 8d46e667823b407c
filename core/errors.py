"""The one error tree. Every class says which gRPC status it becomes and whether a retry can help.

LongreachError
├── InvalidInput            INVALID_ARGUMENT     the request itself is wrong
│   ├── ConfigError         a configuration value or key is wrong (names the dotted path)
│   ├── BatchLineError      one line of a batch is malformed (names the line number)
│   ├── SamplingError       a sampling value is out of range
│   ├── EmptyContext        a context of zero tokens
│   ├── ContextTooLong      more tokens than the configured limit
│   └── UnreadableUri       a context URI is missing or cannot be read
├── NotFound                NOT_FOUND            no such job, context, page
├── AlreadyExists           ALREADY_EXISTS       same name, other content (duplicate custom_id)
├── FailedPrecondition      FAILED_PRECONDITION  the system is not in a state to do this
│   ├── UnsupportedModel    unknown model, or a feature we refuse by name
│   ├── AlreadyEnded        cancel of a job that has ended
│   └── AlreadyServing      second serve on the same port or journal
├── ResourceExhausted       RESOURCE_EXHAUSTED   full now, try later (retryable)
│   ├── QueueFull           the gateway's queue is at its limit
│   ├── StoreFull           no page slot can be freed
│   ├── BankTooSmall        device_pages cannot hold what one pass needs (not retryable)
│   └── PinRefused          host memory cannot be registered with the device (not retryable)
├── Unavailable             UNAVAILABLE          a part is gone or draining (retryable)
│   ├── WorkerLost          the decode worker died or stopped answering
│   ├── StoreUnreachable    no replica of a store answered
│   └── Draining            shutting down, no new work
├── DeadlineExceeded        DEADLINE_EXCEEDED    a wait reached its deadline (retryable)
├── Cancelled               CANCELLED            the client or an operator cancelled
├── Aborted                 ABORTED              a newer owner exists
│   ├── StaleEpoch          an older gateway epoch speaks
│   └── LeaseExpired        a page lease ran out before it was completed
├── DataLoss                DATA_LOSS            no good copy is left
│   └── PageCorrupt         bytes do not match their checksum or recipe
├── NumericalError          INTERNAL             NaN or infinity in a row's arithmetic
└── InternalError           INTERNAL             our own bug
"""

from __future__ import annotations

from typing import Any


class LongreachError(Exception):
    """Base of all errors that cross a boundary. `details` holds plain msgpack-able values only."""

    grpc_code = "INTERNAL"
    retryable = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    @property
    def reason(self) -> str:
        """Stable machine-readable name, e.g. ``CONTEXT_TOO_LONG``."""
        name = type(self).__name__
        return "".join(
            ("_" + c if c.isupper() and i and not name[i - 1].isupper() else c)
            for i, c in enumerate(name)
        ).upper()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self).__name__, self.message, self.details))

    def to_wire(self) -> dict[str, Any]:
        return {"error": type(self).__name__, "message": self.message, "details": self.details}


class InvalidInput(LongreachError):
    """The request itself is wrong; sending it again unchanged cannot succeed."""

    grpc_code = "INVALID_ARGUMENT"


class ConfigError(InvalidInput):
    """A configuration value or key is wrong; the message names the dotted path."""


class BatchLineError(InvalidInput):
    """One line of a batch is malformed; `details['line']` is its 1-based number."""


class SamplingError(InvalidInput):
    """A sampling value is out of range; `details['field']` names it."""


class EmptyContext(InvalidInput):
    """A context of zero tokens."""


class ContextTooLong(InvalidInput):
    """More tokens than the configured limit allows."""


class UnreadableUri(InvalidInput):
    """A context URI is missing or cannot be read."""


class NotFound(LongreachError):
    """No such job, context, row or page."""

    grpc_code = "NOT_FOUND"


class AlreadyExists(LongreachError):
    """The name is taken by other content."""

    grpc_code = "ALREADY_EXISTS"


class FailedPrecondition(LongreachError):
    """The system is not in a state to do this."""

    grpc_code = "FAILED_PRECONDITION"


class UnsupportedModel(FailedPrecondition):
    """Unknown model, or a model feature that is refused by name."""


class AlreadyEnded(FailedPrecondition):
    """The job has ended and cannot change any more."""


class AlreadyServing(FailedPrecondition):
    """Another serve process holds this port or this journal."""


class ResourceExhausted(LongreachError):
    """Full now; the same request can succeed later."""

    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class QueueFull(ResourceExhausted):
    """The gateway's queue is at its limit."""


class StoreFull(ResourceExhausted):
    """No page slot can be freed in a store."""


class BankTooSmall(ResourceExhausted):
    """`device_pages` cannot hold what one attention pass needs."""

    retryable = False


class PinRefused(ResourceExhausted):
    """Host memory cannot be taken or registered with the device; `details` say which bytes and why."""

    retryable = False


class Unavailable(LongreachError):
    """A part is gone or draining; retry elsewhere or later."""

    grpc_code = "UNAVAILABLE"
    retryable = True


class WorkerLost(Unavailable):
    """The decode worker died or stopped answering."""


class StoreUnreachable(Unavailable):
    """No replica of a store answered."""


class Draining(Unavailable):
    """Shutting down: no new work is taken."""


class DeadlineExceeded(LongreachError):
    """A wait reached its deadline."""

    grpc_code = "DEADLINE_EXCEEDED"
    retryable = True


class Cancelled(LongreachError):
    """The client or an operator cancelled."""

    grpc_code = "CANCELLED"


class Aborted(LongreachError):
    """A newer owner exists; the caller must start again from current state."""

    grpc_code = "ABORTED"


class StaleEpoch(Aborted):
    """The speaker's gateway epoch is older than one already seen."""


class LeaseExpired(Aborted):
    """A page lease ran out before it was completed."""


class DataLoss(LongreachError):
    """No good copy of the data is left."""

    grpc_code = "DATA_LOSS"


class PageCorrupt(DataLoss):
    """Page bytes do not match their checksum or recipe."""


class NumericalError(LongreachError):
    """NaN or infinity in a row's arithmetic; names the layer and position."""


class InternalError(LongreachError):
    """Our own bug."""


def _tree(base: type[LongreachError]) -> dict[str, type[LongreachError]]:
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found.update(_tree(sub))
    return found


def _rebuild(name: str, message: str, details: dict[str, Any]) -> LongreachError:
    error = _tree(LongreachError).get(name, InternalError)(message)
    # not as keywords: a foreign key such as "message" must not break the rebuilding
    error.details = details
    return error


def error_from_wire(wire: dict[str, Any]) -> LongreachError:
    """Inverse of `to_wire`; an unknown class name becomes InternalError. Never raises."""
    details = wire.get("details")
    return _rebuild(
        str(wire.get("error")),
        str(wire.get("message", "no message")),
        {str(k): v for k, v in details.items()} if isinstance(details, dict) else {},
    )


def as_longreach_error(exc: BaseException) -> LongreachError:
    """Wrap anything that is not ours, so that no stack trace crosses a wire."""
    if isinstance(exc, LongreachError):
        return exc
    return InternalError(f"{type(exc).__name__}: {exc}")
