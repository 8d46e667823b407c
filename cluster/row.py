"""A row: one question on one context, as it is kept in the journal."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..core.config import Config
from ..core.errors import UnsupportedModel
from .sampling import Sampling


class RowState(StrEnum):
    """Life of a row; the last three are ends and never change."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (RowState.QUEUED, RowState.RUNNING)


class JobState(StrEnum):
    """Life of a job; the last three are ends and never change."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
"""Roles that a request may use, and what they mean here."""


class Message(BaseModel):
    """One message of a chat, plain text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Role
    content: str


class RowSpec(BaseModel):
    """What a row asks. Exactly one of context, context_id, context_uri and messages is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    custom_id: str
    kind: Literal["context", "chat", "completion"] = "context"
    """Shape of the request line; decides the shape of the result's body."""
    context: str | None = None
    context_id: str | None = None
    context_uri: str | None = None
    question: str = ""
    messages: tuple[Message, ...] = ()
    answer_prefix: str = ""
    model: str = ""
    sampling: Sampling = Sampling()

    @property
    def size_chars(self) -> int:
        """Characters of the prompt known so far; a context by name or URI counts as none."""
        return (
            len(self.context or "")
            + len(self.question)
            + len(self.answer_prefix)
            + sum(len(message.content) for message in self.messages)
        )


def check_model(name: str, config: Config) -> None:
    """Raise UnsupportedModel unless `name` is empty or one that this gateway serves."""
    served = (config.model.name, *config.model.served_names)
    if name and name not in served:
        raise UnsupportedModel(
            f"model '{name}' is not served here; served: {', '.join(served)}", model=name
        )


def max_context_bytes(config: Config) -> int:
    """Bound on a context's UTF-8 bytes, four times what ordinary text of that length needs."""
    return max(1 << 20, 16 * config.model.max_context_tokens)
