"""Headers on the wire: whatever arrives, the only error is InvalidInput."""

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longreach.core import codec
from longreach.core.codec import WIRE_VERSION, pack_header, unpack_header
from longreach.core.errors import InvalidInput

_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), _values, max_size=8))
def test_round_trip(header: dict[str, Any]) -> None:
    packed = pack_header(header)
    assert unpack_header(packed) == header
    assert unpack_header(memoryview(packed)) == header


def _unpacks_or_is_invalid(data: bytes) -> None:
    try:
        header = unpack_header(data)
    except InvalidInput:
        return
    assert isinstance(header, dict)
    assert all(isinstance(key, str) for key in header)


@given(st.binary(max_size=200))
@example(b"")
@example(bytes((WIRE_VERSION,)))
def test_arbitrary_bytes_raise_nothing_but_invalid_input(data: bytes) -> None:
    _unpacks_or_is_invalid(data)


@given(st.binary(max_size=200))
@example(b"\x81\x81\xa1a\x01\x02")  # a map as a key
@example(b"\x81\x91\x01\x02")  # a list as a key
@example(b"\x81\x01\x02")  # a number as a key of the header itself
@example(b"\x81\xa1\xff\x01")  # a key that is not UTF-8
@example(b"\x81\xa1a\xd7\xff" + b"\xff" * 8)  # a timestamp with too many nanoseconds
@example(b"\x81\xa1a" + b"\x91" * 2000 + b"\x01")  # nesting beyond the parser's stack
@example(b"\x81\xa1a\xdd\xff\xff\xff\xff")  # a list that claims 2**32 entries
@example(b"\x81\xa1a\x01tail")  # more than one object
def test_arbitrary_payloads_raise_nothing_but_invalid_input(payload: bytes) -> None:
    _unpacks_or_is_invalid(bytes((WIRE_VERSION,)) + payload)


@given(st.dictionaries(st.text(max_size=8), _values, max_size=4), st.data())
def test_damaged_headers_raise_nothing_but_invalid_input(
    header: dict[str, Any], data: st.DataObject
) -> None:
    packed = bytearray(pack_header(header))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    _unpacks_or_is_invalid(bytes(packed))
    _unpacks_or_is_invalid(bytes(packed[:at]))


@pytest.mark.parametrize("payload", [[1, 2], "text", 7, None])
def test_a_header_must_be_a_map(payload: object) -> None:
    with pytest.raises(InvalidInput, match="must be a map"):
        unpack_header(bytes((WIRE_VERSION,)) + msgpack.packb(payload))


def test_another_wire_version_is_named() -> None:
    packed = bytes((WIRE_VERSION + 1,)) + pack_header({"a": 1})[1:]
    with pytest.raises(InvalidInput, match=f"version {WIRE_VERSION + 1}.*speaks {WIRE_VERSION}"):
        unpack_header(packed)


def test_an_oversized_header_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_HEADER_BYTES", 64)
    assert unpack_header(pack_header({"a": "x" * 40}))
    with pytest.raises(InvalidInput, match="exceeds 64"):
        unpack_header(pack_header({"a": "x" * 64}))


def test_bytes_and_text_stay_apart() -> None:
    header = {"key": b"\xff\x00", "name": "\xff"}
    back = unpack_header(pack_header(header))
    assert isinstance(back["key"], bytes)
    assert isinstance(back["name"], str)
