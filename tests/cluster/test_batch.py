"""A bad line fails only its row, and says which line and which field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.cluster.batch import BatchRow, LineSplitter, parse_batch
from longreach.core.config import Config
from longreach.core.errors import (
    AlreadyExists,
    BatchLineError,
    EmptyContext,
    SamplingError,
    UnsupportedModel,
)

from .fakes import make_config

OURS = {"custom_id": "a", "context": "some text", "question": "what?"}
BODY = {"messages": [{"role": "user", "content": "hello"}]}
OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path, "gateway.max_line_bytes=2000", "gateway.max_new_tokens=500")


def parse(config: Config, *lines: Any) -> list[BatchRow]:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(parse_batch([b"\n".join(encoded)], config))


def one(config: Config, line: Any) -> BatchRow:
    (row,) = parse(config, line)
    return row


def test_our_shape(config: Config) -> None:
    row = one(
        config,
        {**OURS, "answer_prefix": "It is", "max_tokens": 7, "temperature": 0.5, "stop": "\n"},
    )
    assert row.spec is not None
    assert row.spec.kind == "context"
    assert (row.spec.context, row.spec.answer_prefix) == ("some text", "It is")
    assert row.spec.sampling.max_tokens == 7
    assert row.spec.sampling.temperature == 0.5
    assert row.spec.sampling.stop == ("\n",)


def test_openai_chat_shape(config: Config) -> None:
    content = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    body = {
        "model": "embedded",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": content},
        ],
        "answer_prefix": "So",
        "max_completion_tokens": 9,
        "n": 1,
        "logprobs": False,
        "tools": [],
        "stream": False,
        "user": "someone",
    }
    row = one(config, {**OPENAI, "body": body})
    assert row.error is None
    assert row.spec is not None
    assert row.spec.kind == "chat"
    assert [m.content for m in row.spec.messages] == ["be brief", "a b"]
    assert row.spec.answer_prefix == "So"
    assert row.spec.sampling.max_tokens == 9


def test_openai_completion_shape(config: Config) -> None:
    row = one(config, {**OPENAI, "url": "/v1/completions", "body": {"prompt": "once upon"}})
    assert row.spec is not None
    assert row.spec.kind == "completion"
    assert row.spec.messages[0].content == "once upon"


BAD_LINES: list[tuple[Any, type[Exception], str]] = [
    (b"{not json", BatchLineError, ""),
    (b"[1, 2]", BatchLineError, ""),
    (b'{"custom_id": "\xff"}', BatchLineError, ""),
    (b"[" * 1900, BatchLineError, ""),
    (b'{"custom_id": "a", "context": "x", "question": "y", "top_p": NaN}', BatchLineError, ""),
    ({**OURS, "context": "x" * 3000}, BatchLineError, ""),
    ({**OURS, "custom_id": ""}, BatchLineError, "custom_id"),
    ({**OURS, "custom_id": 5}, BatchLineError, "custom_id"),
    ({"context": "x", "question": "y"}, BatchLineError, "custom_id"),
    ({**OURS, "question": ""}, BatchLineError, "question"),
    ({**OURS, "colour": 1}, BatchLineError, "colour"),
    ({**OURS, "context_id": "ctx-1"}, BatchLineError, "context"),
    ({"custom_id": "a", "question": "y"}, BatchLineError, "context"),
    ({**OURS, "context": "  \n"}, EmptyContext, "context"),
    ({**OURS, "model": "gpt-9"}, UnsupportedModel, ""),
    ({**OURS, "max_tokens": 0}, SamplingError, "max_tokens"),
    ({**OURS, "max_tokens": -1}, SamplingError, "max_tokens"),
    ({**OURS, "max_tokens": 501}, SamplingError, "max_tokens"),
    ({**OURS, "max_tokens": 1.5}, SamplingError, "max_tokens"),
    ({**OURS, "max_tokens": 3, "max_completion_tokens": 4}, SamplingError, "max_tokens"),
    ({**OURS, "temperature": -0.1}, SamplingError, "temperature"),
    ({**OURS, "temperature": 2.1}, SamplingError, "temperature"),
    ({**OURS, "temperature": "0.5"}, SamplingError, "temperature"),
    ({**OURS, "temperature": True}, SamplingError, "temperature"),
    ({**OURS, "top_p": 0}, SamplingError, "top_p"),
    ({**OURS, "top_p": 1.01}, SamplingError, "top_p"),
    ({**OURS, "seed": 2**63}, SamplingError, "seed"),
    ({**OURS, "stop": [""]}, SamplingError, "stop"),
    ({**OURS, "stop": ["x"] * 17}, SamplingError, "stop"),
    ({**OURS, "stop": 3}, SamplingError, "stop"),
    ({**OPENAI, "method": "GET"}, BatchLineError, "method"),
    ({**OPENAI, "url": "/v1/embeddings"}, BatchLineError, "url"),
    ({**OPENAI, "body": []}, BatchLineError, "body"),
    ({**OPENAI, "body": {}}, BatchLineError, "body.messages"),
    ({**OPENAI, "body": {"messages": []}}, BatchLineError, "body.messages"),
    ({**OPENAI, "body": {**BODY, "n": 2}}, BatchLineError, "body.n"),
    ({**OPENAI, "body": {**BODY, "tools": [{}]}}, BatchLineError, "body.tools"),
    ({**OPENAI, "body": {**BODY, "logprobs": True}}, BatchLineError, "body.logprobs"),
    ({**OPENAI, "body": {**BODY, "stream": True}}, BatchLineError, "body.stream"),
    (
        {**OPENAI, "body": {**BODY, "response_format": {"type": "json_object"}}},
        BatchLineError,
        "body.response_format",
    ),
    ({**OPENAI, "body": {**BODY, "whatever": 1}}, BatchLineError, "body.whatever"),
    ({**OPENAI, "body": {**BODY, "temperature": 9}}, SamplingError, "body.temperature"),
    ({**OPENAI, "body": {**BODY, "model": "gpt-9"}}, UnsupportedModel, ""),
    (
        {**OPENAI, "body": {"messages": [{"role": "tool", "content": "x"}]}},
        BatchLineError,
        "body.messages.0.role",
    ),
    (
        {**OPENAI, "body": {"messages": [{"role": "user", "content": " "}]}},
        EmptyContext,
        "body",
    ),
    (
        {
            **OPENAI,
            "body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        },
        BatchLineError,
        "body.messages.0.content.0",
    ),
]


@pytest.mark.parametrize(("line", "kind", "field"), BAD_LINES)
def test_a_bad_line_names_its_number_and_field(
    config: Config, line: Any, kind: type[Exception], field: str
) -> None:
    good = {**OURS, "custom_id": "good"}
    before, bad, after = parse(config, {**good, "custom_id": "first"}, line, good)
    assert before.error is None
    assert after.error is None
    assert bad.spec is None
    assert type(bad.error) is kind
    assert bad.error.details["line"] == 2
    assert bad.error.message.startswith("line 2:")
    assert bad.error.details.get("field", "") == field
    assert field in bad.error.message


def test_a_repeated_custom_id_fails_the_later_row(config: Config) -> None:
    first, second = parse(config, OURS, OURS)
    assert first.error is None
    assert isinstance(second.error, AlreadyExists)
    assert "line 1" in second.error.message
    assert second.custom_id == "a"


def test_a_bad_line_still_takes_its_custom_id(config: Config) -> None:
    first, second = parse(config, {**OURS, "max_tokens": -1}, OURS)
    assert first.custom_id == "a"
    assert isinstance(second.error, AlreadyExists)


def test_empty_lines_are_skipped_but_counted(config: Config) -> None:
    rows = parse(config, b"", OURS, b"  \r", b"oops")
    assert [(row.line, row.error is None) for row in rows] == [(2, True), (4, False)]


def test_byte_order_mark_is_allowed(config: Config) -> None:
    assert one(config, b"\xef\xbb\xbf" + json.dumps(OURS).encode()).error is None


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=8),
    cut=st.integers(1, 7),
)
def test_lines_do_not_depend_on_the_chunks(lines: list[bytes], cut: int) -> None:
    data = b"\n".join(lines)

    def split(size: int) -> list[tuple[int, Any]]:
        splitter = LineSplitter(20)
        found = []
        for start in range(0, len(data), size):
            found += list(splitter.feed(data[start : start + size]))
        return found + list(splitter.finish())

    whole = split(max(1, len(data)))
    assert split(cut) == whole
    for number, line in whole:
        true_line = lines[number - 1]
        assert line == true_line if len(true_line) <= 20 else line.n_bytes == len(true_line)


@given(st.binary(max_size=60))
def test_no_line_raises(data: bytes) -> None:
    config = Config()
    for row in parse_batch([data], config):
        assert (row.spec is None) != (row.error is None)
