"""Result lines: the OpenAI batch output shape, plus our statistics. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.errors import LongreachError

_HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@dataclass(frozen=True)
class Outcome:
    """What a worker answered to a row."""

    text: str
    finish_reason: str
    n_tokens: int
    stats: dict[str, float] = field(default_factory=dict)

    def usage(self, n_prompt_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": n_prompt_tokens,
            "completion_tokens": self.n_tokens,
            "total_tokens": n_prompt_tokens + self.n_tokens,
        }


def numeric_stats(stats: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a worker's flat stats; anything else is left out."""
    return {
        str(key): float(value)
        for key, value in stats.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def answer_line(
    *,
    row_id: str,
    custom_id: str,
    kind: Literal["context", "chat", "completion"],
    model: str,
    created_s: float,
    n_prompt_tokens: int,
    outcome: Outcome,
) -> str:
    """One line for a row that was answered."""
    choice: dict[str, Any] = {"index": 0}
    if kind == "completion":
        choice["text"] = outcome.text
    else:
        choice["message"] = {"role": "assistant", "content": outcome.text}
    choice["finish_reason"] = outcome.finish_reason
    body = {
        "id": f"cmpl-{row_id}",
        "object": "text_completion" if kind == "completion" else "chat.completion",
        "created": int(created_s),
        "model": model,
        "choices": [choice],
        "usage": outcome.usage(n_prompt_tokens),
        "longreach": {"stats": outcome.stats},
    }
    response = {"status_code": 200, "request_id": row_id, "body": body}
    return _line(row_id, custom_id, response, None)


def error_line(row_id: str, custom_id: str, error: LongreachError) -> str:
    """One line for a row that failed or was cancelled; `error.line` where the input is to blame."""
    shown: dict[str, Any] = {"code": error.reason, "message": error.message}
    shown |= {key: error.details[key] for key in ("line", "field") if key in error.details}
    status_code = _HTTP_STATUS.get(error.grpc_code, 500)
    body = {"error": {"message": error.message, "type": error.grpc_code, "code": error.reason}}
    response = {"status_code": status_code, "request_id": row_id, "body": body}
    return _line(row_id, custom_id, response, shown)


def _line(
    row_id: str, custom_id: str, response: dict[str, Any], error: dict[str, Any] | None
) -> str:
    value = {"id": row_id, "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
