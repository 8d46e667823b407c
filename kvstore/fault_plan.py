"""What goes wrong, when: a pure function of the seed, the place, the method and how often it was called.

No state, no clock: two runs that make the same calls meet the same faults in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash

from ..core.fault_config import FaultsConfig, Sometimes

_SCALE = 2.0**-64


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to one call. The shell that asks takes what concerns it."""

    drop: bool = False
    lose_answer: bool = False
    delay_s: float = 0.0
    cut_s: float = 0.0
    corrupt: bool = False
    at_rest: bool = False
    """With corrupt: the store's own copy, not what is on the way."""
    where: float = 0.0
    """With corrupt or lose_answer: which bit, or after how many replies, as a share (0 to 1)."""
    disk_full: bool = False
    disk_error: bool = False
    disk_delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Strike:
    """A part is killed, or paused for for_s, at_s seconds after the start."""

    at_s: float
    kind: Literal["kill", "pause"]
    part: str
    for_s: float = 0.0


def chance(seed: int, *what: str | int) -> float:
    """A number of [0, 1), the same for the same arguments."""
    text = "\0".join(map(str, (seed, *what)))
    return xxhash.xxh3_64_intdigest(text.encode()) * _SCALE


class FaultPlan:
    """A configuration read as decisions."""

    def __init__(self, config: FaultsConfig) -> None:
        self.config = config

    def decide(self, where: str, method: str, n: int) -> Faults:
        """Faults of the n-th call (from 0) of a method at a place."""
        plan = self.config

        def hit(kind: str, share: float) -> bool:
            return share > 0 and chance(plan.seed, where, method, n, kind) < share

        def lasting(kind: str, sometimes: Sometimes | None) -> float:
            if sometimes is None or not hit(kind, sometimes.share):
                return 0.0
            return sometimes.seconds

        corrupt = hit("corrupt", plan.corrupt)
        lose_answer = hit("lose_answer", plan.lose_answer)
        return Faults(
            drop=hit("drop", plan.drop),
            lose_answer=lose_answer,
            delay_s=lasting("delay", plan.delay),
            cut_s=lasting("cut", plan.cut),
            corrupt=corrupt,
            at_rest=corrupt and hit("at_rest", 0.5),
            where=chance(plan.seed, where, method, n, "where") if corrupt or lose_answer else 0.0,
            disk_full=hit("disk_full", plan.disk_full),
            disk_error=hit("disk_error", plan.disk_error),
            disk_delay_s=lasting("slow_disk", plan.slow_disk),
        )


def schedule(
    config: FaultsConfig, part_ids: Sequence[str], until_s: float, from_s: float = 0.0
) -> list[Strike]:
    """Kills and pauses after from_s and up to until_s, in order. A longer time only adds to it."""
    strikes = []
    until_s = min(until_s, config.strikes_for or until_s)
    for kind, plans in (("kill", config.kill), ("pause", config.pause)):
        for i, plan in enumerate(plans):
            candidates = sorted(part for part in part_ids if plan.strikes(part))
            n = int(from_s // plan.every_s)
            while candidates and (at_s := (n + 1) * plan.every_s) <= until_s:
                n += 1
                if at_s <= from_s:
                    continue
                drawn = int(chance(config.seed, kind, i, n) * len(candidates))
                for_s = getattr(plan, "for_s", 0.0)
                strikes.append(Strike(at_s, kind, candidates[drawn], for_s))  # type: ignore[arg-type]
    return sorted(strikes, key=lambda strike: (strike.at_s, strike.kind, strike.part))
