"""What a batch cost and gained: row statistics summed up from result lines. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SECONDS = "seconds_"


@dataclass
class Summary:
    """Sums over the rows of one batch."""

    rows: Counter[str] = field(default_factory=Counter)
    """Rows by state: answered, failed, cancelled."""
    total: Counter[str] = field(default_factory=Counter)
    """Row statistics, summed (names of workers/row.py)."""
    largest: dict[str, float] = field(default_factory=dict)
    """Row statistics, the largest of any row."""

    def add_line(self, line: str) -> None:
        """Take in one result line. Raises ValueError if it is not one."""
        value = json.loads(line)
        error = value.get("error")
        if error:
            self.rows["cancelled" if error.get("code") == "CANCELLED" else "failed"] += 1
            return
        self.rows["answered"] += 1
        self.add_stats(value["response"]["body"].get("longreach", {}).get("stats", {}))

    def add_stats(self, stats: Mapping[str, Any]) -> None:
        for name, number in stats.items():
            if isinstance(number, int | float):
                self.total[name] += number  # type: ignore[assignment]
                self.largest[name] = max(self.largest.get(name, 0.0), number)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._ratio("tokens_prefilled", self.total["prefill_s"])

    @property
    def decode_tokens_per_s(self) -> float:
        return self._ratio("tokens_decoded", self.total["decode_s"])

    @property
    def hit_ratio(self) -> float | None:
        """Share of the blocks' leaves found on the device; None if nothing was asked for."""
        asked = self.total["bank_hits"] + self.total["bank_misses"]
        return self.total["bank_hits"] / asked if asked else None

    @property
    def mass_kept(self) -> float | None:
        """Sampled share of dense attention mass on the keys attended; None without a sample."""
        n = self.total["mass_kept_n"]
        return self.total["mass_kept_sum"] / n if n else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the worker by part, the longest first."""
        parts = {
            name.removeprefix(_SECONDS): float(value)
            for name, value in self.total.items()
            if name.startswith(_SECONDS)
        }
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    def _ratio(self, name: str, seconds: float) -> float:
        return self.total[name] / seconds if seconds > 0 else 0.0


def summarize(lines: Iterable[str]) -> Summary:
    """Sum of all result lines."""
    summary = Summary()
    for line in lines:
        summary.add_line(line)
    return summary


def answer_text(line: str) -> str:
    """The answer of a result line, or its error as `REASON: message`."""
    value = json.loads(line)
    if value.get("error"):
        return f"{value['error']['code']}: {value['error']['message']}"
    choice = value["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])
