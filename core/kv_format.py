"""Names of stored KV formats, and what a format asks of the rest of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .stage import KV_BLOCK, LayerPolicy

KvDtype = Literal["float32", "float16", "bfloat16", "int8", "float8", "int4", "int4c"]


def format_problem(
    kv_dtype: KvDtype, device: str, page_tokens: int, policies: Sequence[LayerPolicy]
) -> str | None:
    """Why a format cannot go with these settings; None if it can."""
    if kv_dtype != "int4c":
        return None
    if device != "cpu":
        return f"cache.kv_dtype int4c with model.device {device}: no GPU kernel reads it; use int4 or int8"
    if page_tokens % KV_BLOCK:
        return (
            f"cache.page_tokens ({page_tokens}) must be a multiple of {KV_BLOCK} with cache.kv_dtype "
            f"int4c, which rounds keys of {KV_BLOCK} tokens together"
        )
    for i, policy in enumerate(policies):
        for used in (policy, policy.in_prefill):
            if not used.selects_sealed:
                return (
                    f"attention.policies.{i}.window ({used.window}) must exceed its first chunk "
                    f"({used.stages[0].chunk}) by {KV_BLOCK} or more with cache.kv_dtype int4c: keys of a "
                    f"query's own block of {KV_BLOCK} are not rounded yet and cannot be selected"
                )
    return None
