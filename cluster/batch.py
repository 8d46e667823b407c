"""Batch lines to rows: the OpenAI batch shape and ours, strict. A bad line fails only its row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from ..core.config import Config
from ..core.errors import (
    AlreadyExists,
    BatchLineError,
    EmptyContext,
    LongreachError,
    SamplingError,
)
from .row import Message, RowSpec, check_model
from .sampling import FIELDS as SAMPLING_FIELDS
from .sampling import parse_sampling

MAX_CUSTOM_ID_CHARS = 512
_URLS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
}
"""OpenAI fields that we do not have, with the values that ask for nothing."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _ChatMessage(_Strict):
    role: str
    content: str | list[dict[str, Any]]
    name: str | None = None


class _ChatBody(_Strict):
    messages: list[_ChatMessage] = Field(min_length=1)
    model: str = ""
    answer_prefix: str = ""
    user: str | None = None
    metadata: dict[str, Any] | None = None


class _CompletionBody(_Strict):
    prompt: str
    model: str = ""
    answer_prefix: str = ""
    user: str | None = None
    metadata: dict[str, Any] | None = None


class _OpenAiLine(_Strict):
    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)
    method: str
    url: str
    body: dict[str, Any]


class _OurLine(_Strict):
    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)
    context: str | None = None
    context_id: str | None = Field(default=None, min_length=1)
    context_uri: str | None = Field(default=None, min_length=1)
    question: str = Field(min_length=1)
    answer_prefix: str = ""
    model: str = ""


@dataclass(frozen=True)
class BatchRow:
    """One line's outcome: `spec`, or `error` (then `custom_id` is what could be read, or empty)."""

    line: int
    custom_id: str
    spec: RowSpec | None = None
    error: LongreachError | None = None


@dataclass(frozen=True)
class _Oversized:
    n_bytes: int


class LineSplitter:
    """Cuts a stream of byte chunks into lines, never holding more than one line's bound."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._n_bytes = 0
        self._line = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | _Oversized]]:
        """(1-based line number, line without its newline) for each line that the chunk ends."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk[start:end])
            yield self._take()
            start = end + 1
        self._add(chunk[start:])

    def finish(self) -> Iterator[tuple[int, bytes | _Oversized]]:
        """The last line, if the stream did not end with a newline."""
        if self._n_bytes:
            yield self._take()

    def _add(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._n_bytes <= self._max:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _take(self) -> tuple[int, bytes | _Oversized]:
        self._line += 1
        line: bytes | _Oversized = (
            b"".join(self._parts) if self._n_bytes <= self._max else _Oversized(self._n_bytes)
        )
        self._parts = []
        self._n_bytes = 0
        return self._line, line


def parse_batch(chunks: Iterable[bytes], config: Config) -> Iterator[BatchRow]:
    """Rows of a JSONL stream in file order; empty lines are skipped but counted."""
    splitter = LineSplitter(config.gateway.max_line_bytes)
    first_line: dict[str, int] = {}

    def rows(lines: Iterable[tuple[int, bytes | _Oversized]]) -> Iterator[BatchRow]:
        for number, line in lines:
            if isinstance(line, bytes) and not line.strip():
                continue
            row = parse_line(number, line, config)
            known = first_line.setdefault(row.custom_id, number) if row.custom_id else number
            if known != number:
                error = AlreadyExists(
                    f"line {number}: custom_id '{row.custom_id}' was used in line {known}; "
                    "give each row its own",
                    line=number,
                    field="custom_id",
                )
                row = BatchRow(number, row.custom_id, error=error)
            yield row

    for chunk in chunks:
        yield from rows(splitter.feed(chunk))
    yield from rows(splitter.finish())


def parse_line(number: int, line: bytes | _Oversized, config: Config) -> BatchRow:
    """One line to a row. Never raises; what is wrong is in `error`, with line number and field."""
    custom_id = ""
    try:
        values = _read_json(number, line, config)
        given = values.get("custom_id")
        if isinstance(given, str) and len(given) <= MAX_CUSTOM_ID_CHARS:
            custom_id = given
        spec = _openai_row(values, config) if "body" in values else _our_row(values, config)
        return BatchRow(number, custom_id, spec=spec)
    except ValidationError as exc:
        return BatchRow(number, custom_id, error=_line_error(number, exc))
    except LongreachError as exc:
        exc.details.setdefault("line", number)
        if not exc.message.startswith(f"line {number}:"):
            exc = type(exc)(f"line {number}: {exc.message}", **exc.details)
        return BatchRow(number, custom_id, error=exc)


def _read_json(number: int, line: bytes | _Oversized, config: Config) -> dict[str, Any]:
    if isinstance(line, _Oversized):
        raise BatchLineError(
            f"line {number}: {line.n_bytes} bytes exceed gateway.max_line_bytes "
            f"({config.gateway.max_line_bytes}); upload the context and give its context_id",
            line=number,
        )
    if line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]  # editors on Windows put a byte order mark before the first line
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BatchLineError(
            f"line {number}: not valid UTF-8 at byte {exc.start}", line=number
        ) from exc
    try:
        values = from_json(line, allow_inf_nan=False, cache_strings="keys")
    except ValueError as exc:
        raise BatchLineError(f"line {number}: not valid JSON: {exc}", line=number) from exc
    if not isinstance(values, dict):
        raise BatchLineError(
            f"line {number}: expected a JSON object, got {type(values).__name__}", line=number
        )
    return values


def _line_error(number: int, exc: ValidationError) -> BatchLineError:
    first = exc.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return BatchLineError(f"line {number}: {field}: {message}", line=number, field=field)


def _split_sampling(
    values: Mapping[str, Any], config: Config, prefix: str = ""
) -> tuple[dict[str, Any], Any]:
    rest = {key: value for key, value in values.items() if key not in SAMPLING_FIELDS}
    try:
        sampling = parse_sampling(
            {key: values[key] for key in SAMPLING_FIELDS if key in values},
            config.gateway.max_new_tokens,
        )
    except SamplingError as exc:
        field = f"{prefix}{exc.details.get('field', '')}"
        raise SamplingError(f"{prefix}{exc.message}", field=field) from exc
    return rest, sampling


def _our_row(values: dict[str, Any], config: Config) -> RowSpec:
    rest, sampling = _split_sampling(values, config)
    line = _OurLine.model_validate(rest)
    names = ("context", "context_id", "context_uri")
    given = [name for name in names if getattr(line, name) is not None]
    if len(given) != 1:
        raise BatchLineError(
            f"context: give exactly one of {', '.join(names)} (given: {', '.join(given) or 'none'})",
            field="context",
        )
    if line.context is not None and not line.context.strip():
        raise EmptyContext("context: the context is empty", field="context")
    check_model(line.model, config)
    return RowSpec(**line.model_dump(), sampling=sampling)


def _openai_row(values: dict[str, Any], config: Config) -> RowSpec:
    line = _OpenAiLine.model_validate(values)
    if line.method != "POST":
        raise BatchLineError(f"method: '{line.method}' is not supported, only POST", field="method")
    kind = _URLS.get(line.url)
    if kind is None:
        raise BatchLineError(
            f"url: '{line.url}' is not supported, only {' and '.join(_URLS)}", field="url"
        )
    rest, sampling = _split_sampling(_without_neutral(line.body), config, "body.")
    try:
        body = (_ChatBody if kind == "chat" else _CompletionBody).model_validate(rest)
    except ValidationError as exc:
        first = exc.errors()[0]
        field = ".".join(("body", *(str(part) for part in first["loc"])))
        message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        raise BatchLineError(f"{field}: {message}", field=field) from exc
    if isinstance(body, _ChatBody):
        messages = tuple(_message(i, message) for i, message in enumerate(body.messages))
    else:
        messages = (Message(role="user", content=body.prompt),)
    if not any(message.content.strip() for message in messages):
        raise EmptyContext("body: the prompt is empty", field="body")
    check_model(body.model, config)
    return RowSpec(
        custom_id=line.custom_id,
        kind="chat" if kind == "chat" else "completion",
        messages=messages,
        answer_prefix=body.answer_prefix,
        model=body.model,
        sampling=sampling,
    )


def _without_neutral(body: dict[str, Any]) -> dict[str, Any]:
    """Drop fields we do not have where they ask for nothing; refuse them by name otherwise."""
    rest = {}
    for key, value in body.items():
        if key not in _NEUTRAL:
            rest[key] = value
        elif value is not None and not any(value == neutral for neutral in _NEUTRAL[key]):
            raise BatchLineError(f"body.{key}: {value!r:.80} is not supported", field=f"body.{key}")
    return rest


def _message(index: int, message: _ChatMessage) -> Message:
    where = f"body.messages.{index}"
    role = {"developer": "system"}.get(message.role, message.role)
    if role not in ("system", "user", "assistant"):
        raise BatchLineError(f"{where}.role: '{role}' is not supported", field=f"{where}.role")
    if isinstance(message.content, str):
        return Message(role=role, content=message.content)
    texts = []
    for i, part in enumerate(message.content):
        kind, text = part.get("type"), part.get("text")
        if kind != "text" or not isinstance(text, str):
            field = f"{where}.content.{i}"
            raise BatchLineError(
                f"{field}: part of type {kind!r:.40} is not supported, only text", field=field
            )
        texts.append(text)
    return Message(role=role, content="".join(texts))
