"""What every section of the configuration is: frozen, and an error for a key that it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    # no infinities: a deadline of .inf would be a wait without end
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
