import inspect
import pickle
import re

import grpc
import pytest

from longreach.core import errors
from longreach.core.codec import pack_header, unpack_header
from longreach.core.errors import (
    InternalError,
    InvalidInput,
    LongreachError,
    as_longreach_error,
    error_from_wire,
)

ALL = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LongreachError)
]
DETAILS = {"line": 7, "field": "max_tokens", "limits": [1, 2.5], "key": b"\x00\xff", "none": None}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_round_trips_through_pickle_and_wire(cls: type[LongreachError]) -> None:
    error = cls("3 of 4 pages are gone; submit again", **DETAILS)
    for back in (
        pickle.loads(pickle.dumps(error)),
        error_from_wire(unpack_header(pack_header(error.to_wire()))),
    ):
        assert type(back) is cls
        assert (back.message, back.details, str(back)) == (error.message, DETAILS, str(error))
        assert (back.reason, back.grpc_code) == (error.reason, error.grpc_code)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_status_and_reason_are_well_formed(cls: type[LongreachError]) -> None:
    assert cls.grpc_code in {code.name for code in grpc.StatusCode} - {"OK", "UNKNOWN"}
    assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", cls("x").reason)
    assert cls.__doc__
    assert cls.__doc__.strip().endswith(".")


@pytest.mark.parametrize(
    ("name", "reason", "code", "retryable"),
    [
        ("ContextTooLong", "CONTEXT_TOO_LONG", "INVALID_ARGUMENT", False),
        ("UnreadableUri", "UNREADABLE_URI", "INVALID_ARGUMENT", False),
        ("BatchLineError", "BATCH_LINE_ERROR", "INVALID_ARGUMENT", False),
        ("QueueFull", "QUEUE_FULL", "RESOURCE_EXHAUSTED", True),
        ("BankTooSmall", "BANK_TOO_SMALL", "RESOURCE_EXHAUSTED", False),
        ("WorkerLost", "WORKER_LOST", "UNAVAILABLE", True),
        ("DeadlineExceeded", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", True),
        ("StaleEpoch", "STALE_EPOCH", "ABORTED", False),
        ("AlreadyServing", "ALREADY_SERVING", "FAILED_PRECONDITION", False),
        ("PageCorrupt", "PAGE_CORRUPT", "DATA_LOSS", False),
        ("NumericalError", "NUMERICAL_ERROR", "INTERNAL", False),
    ],
)
def test_names_clients_depend_on(name: str, reason: str, code: str, retryable: bool) -> None:
    error = getattr(errors, name)("x")
    assert (error.reason, error.grpc_code, error.retryable) == (reason, code, retryable)


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    """Each class stands in the drawing with its parent; a code stands where a class sets one."""
    drawn: dict[str, str] = {}
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│ ]*)[├└]── (\w+) ", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        stack[depth:] = [found[2]]
        drawn[found[2]] = stack[depth - 1] if depth else "LongreachError"
    assert drawn == {
        cls.__name__: cls.__bases__[0].__name__ for cls in ALL if cls is not LongreachError
    }
    for cls in ALL:
        if "grpc_code" in vars(cls) and cls is not LongreachError:
            assert re.search(rf"── {cls.__name__} +{cls.grpc_code} ", errors.__doc__ or "")


def test_an_unknown_class_from_the_wire_becomes_internal_error() -> None:
    error = error_from_wire({"error": "FromTheFuture", "message": "m", "details": {"a": 1}})
    assert (type(error), error.message, error.details) == (InternalError, "m", {"a": 1})


@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"error": None, "message": None, "details": None},
        {"error": "Exception", "message": "not one of ours"},
        {"error": "InvalidInput", "details": {"message": "a key of ours", "self": 1}},
        {"error": "InvalidInput", "details": {3: "a number as a key"}},
        {"error": "InvalidInput", "details": [1, 2]},
    ],
)
def test_a_malformed_wire_error_still_becomes_an_error(wire: dict[str, object]) -> None:
    error = error_from_wire(wire)
    assert isinstance(error, InternalError | InvalidInput)
    pickle.loads(pickle.dumps(error))


def test_foreign_exceptions_are_wrapped_without_their_stack() -> None:
    ours = InvalidInput("x")
    assert as_longreach_error(ours) is ours
    wrapped = as_longreach_error(KeyError("slot 3"))
    assert (type(wrapped), wrapped.message) == (InternalError, "KeyError: 'slot 3'")
    assert wrapped.__traceback__ is None
