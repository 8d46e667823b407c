"""From logits to a token. Random numbers are a hash of (seed, position), so a replay repeats them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..core.errors import NumericalError, SamplingError


class Sampling(BaseModel):
    """Sampling by the OpenAI names. temperature 0 is greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        stops = (value,) if isinstance(value, str) else tuple(value or ())
        if len(stops) > 16:
            raise ValueError(f"{len(stops)} stop strings, at most 16")
        if any(not s for s in stops):
            raise ValueError("an empty stop string would end every answer at once")
        return stops

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Sampling:
        """Raises SamplingError that names the field and the value."""
        try:
            return cls.model_validate(fields)
        except ValidationError as exc:
            first = exc.errors()[0]
            name = ".".join(str(p) for p in first["loc"]) or "sampling"
            raise SamplingError(
                f"{name}: {first['msg']} (given: {first['input']!r})", field=name
            ) from exc


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and absolute position alone."""
    key = np.array([seed & (2**64 - 1), position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def sample(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    """logits float32 [vocab] -> token id. Ties go to the lower id.

    Raises NumericalError if any logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).sum())
        raise NumericalError(
            f"{bad} of {len(logits)} logits at position {position} are not finite",
            position=position,
        )
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    cumulative = probabilities[order].cumsum()
    # the smallest set whose mass reaches top_p; always at least one token
    n_kept = min(int(np.searchsorted(cumulative, sampling.top_p)) + 1, len(order))
    kept = cumulative[:n_kept]
    pick = int(np.searchsorted(kept, uniform(sampling.seed, position) * kept[-1], side="right"))
    return int(order[min(pick, n_kept - 1)])
