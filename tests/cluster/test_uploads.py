"""Uploads in chunks: whole, or refused."""

from __future__ import annotations

import pytest

from longreach.cluster.proto import contexts_pb2
from longreach.cluster.uploads import upload_parts, whole_upload
from longreach.core.errors import InvalidInput

Part = contexts_pb2.UploadContextRequest


def parts(*chunks: bytes) -> list[Part]:
    return list(upload_parts(Part, chunks))


@pytest.mark.parametrize("chunks", [(), (b"",), (b"a",), (b"ab", b"", b"c")])
def test_what_was_sent_arrives(chunks: tuple[bytes, ...]) -> None:
    assert b"".join(whole_upload(parts(*chunks))) == b"".join(chunks)


def test_bytes_arrive_before_the_end_is_known() -> None:
    received = whole_upload(iter(parts(b"ab", b"c")[:1]))
    assert next(received) == b"ab"
    with pytest.raises(InvalidInput, match="after 2 bytes without its end"):
        next(received)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([], "without its end"),
        (parts(b"a", b"b")[:2], "without its end"),
        (parts(b"a", b"b")[1:], "names 2 bytes but 1 arrived"),
        ([*parts(b"a"), *parts(b"b")], "chunk where"),
        ([*parts(b"a"), parts(b"")[1]], "end where"),
        ([Part()], "nothing where"),
    ],
)
def test_anything_else_is_refused(sent: list[Part], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        list(whole_upload(sent))
