"""The two shapes of a batch line, strict: the OpenAI batch shape and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.config import Config
from ..core.errors import BatchLineError, EmptyContext, SamplingError
from .row import ROLES, Message, RowSpec, check_model
from .sampling import FIELDS as SAMPLING_FIELDS
from .sampling import Sampling, parse_sampling

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


def _split_sampling(
    values: Mapping[str, Any], config: Config, prefix: str = ""
) -> tuple[dict[str, Any], Sampling]:
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


def parse_our_line(values: dict[str, Any], config: Config) -> RowSpec:
    """Raises ValidationError, BatchLineError, SamplingError, EmptyContext, UnsupportedModel."""
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


def parse_openai_line(values: dict[str, Any], config: Config) -> RowSpec:
    """Raises as parse_our_line does; fields of the body are named with their path."""
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
    role = ROLES.get(message.role)
    if role is None:
        field = f"{where}.role"
        raise BatchLineError(f"{field}: '{message.role:.40}' is not supported", field=field)
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
