"""Sampling values by their OpenAI names, checked once at the door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..core.errors import SamplingError

MAX_STOPS = 16
MAX_STOP_CHARS = 256
FIELDS = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
"""Names that a request may use; `max_completion_tokens` is another name of `max_tokens`."""


class Sampling(BaseModel):
    """How an answer's tokens are drawn. The defaults are greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: int = Field(default=256, gt=0)
    """Longest answer in tokens."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of probability mass that may be drawn from."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Random numbers are a hash of (seed, position)."""
    stop: tuple[str, ...] = Field(default=(), max_length=MAX_STOPS)
    """Strings that end the answer and are not part of it."""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        for text in stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise ValueError(
                    f"each string must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}"
                )
        return stop

    def to_wire(self) -> dict[str, Any]:
        """Header field `sampling` of the worker's `generate`."""
        return {**self.model_dump(), "stop": list(self.stop)}


def parse_sampling(values: Mapping[str, Any], max_new_tokens: int) -> Sampling:
    """Check the given fields (None means unset; `stop` may be one string).

    Raises SamplingError whose `details['field']` names the first field that is wrong.
    """
    given = {key: value for key, value in values.items() if value is not None}
    longer = given.pop("max_completion_tokens", None)
    if longer is not None and given.setdefault("max_tokens", longer) != longer:
        raise SamplingError(
            f"max_tokens ({given['max_tokens']}) and max_completion_tokens ({longer}) differ; "
            "give one",
            field="max_tokens",
        )
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    elif isinstance(given.get("stop"), list):
        given["stop"] = tuple(given["stop"])
    try:
        sampling = Sampling(**given)
    except ValidationError as exc:
        first = exc.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "sampling"
        shown = repr(first["input"])
        raise SamplingError(f"{field}: {first['msg']} (given: {shown[:80]})", field=field) from exc
    if sampling.max_tokens > max_new_tokens:
        raise SamplingError(
            f"max_tokens: {sampling.max_tokens} exceeds gateway.max_new_tokens ({max_new_tokens})",
            field="max_tokens",
        )
    return sampling
