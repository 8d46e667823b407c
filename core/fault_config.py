"""What a fault plan says: which parts are killed or paused, and how often calls, bytes and disks fail.

Every value has a short text, the same in YAML and after `longreach serve --chaos`:
`store:20s` (a part and how often), `worker:30s/2s` (and for how long), `0.05:50ms` (a share of the
calls and a time). The same seed gives the same faults.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .errors import ConfigError
from .section import Section

PART_KINDS = ("store", "worker", "retriever")
_UNIT_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", value.strip())
    if found is None:
        raise ValueError("a time is a number with ms, s, m or h, for example 50ms")
    return float(found[1]) * _UNIT_S[found[2]]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""Of the calls that a fault can strike. 1 is refused: nothing would ever succeed."""


class Sometimes(Section):
    """A share of the calls, and a time: `0.05:50ms`."""

    share: Share
    """Share of the calls that it strikes."""
    seconds: Seconds
    """How long it lasts each time."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        share, colon, seconds = value.partition(":")
        if not colon:
            raise ValueError("expected a share and a time, for example 0.05:50ms")
        return {"share": share, "seconds": seconds}


class Kill(Section):
    """A part and how often it is killed: `store:20s`."""

    parts: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(min_length=1)
    """Kinds (store, worker, retriever) or ids (store-1); each time one of them is drawn."""
    every_s: Seconds
    """Seconds between two strikes."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts, colon, every = value.partition(":")
        if not colon:
            raise ValueError("expected parts and a time, for example store:20s or store+worker:20s")
        every, slash, duration = every.partition("/")
        split: dict[str, Any] = {"parts": tuple(parts.split("+")), "every_s": every}
        return {**split, "for_s": duration} if slash else split

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        for part in parts:
            if part == "gateway":
                raise ValueError(
                    "the gateway is what strikes, so it cannot be struck by its own plan: "
                    "kill -9 its process and start serve again on the same state directory"
                )
            if not re.fullmatch(rf"({'|'.join(PART_KINDS)})(-\d+)?", part):
                raise ValueError(f"no part {part!r}; kinds are {', '.join(PART_KINDS)}")
        return parts

    def strikes(self, part_id: str) -> bool:
        return part_id in self.parts or part_id.rpartition("-")[0] in self.parts


class Pause(Kill):
    """A part, how often it is paused, and for how long: `worker:30s/2s`."""

    for_s: Seconds
    """Seconds until it goes on."""

    @model_validator(mode="after")
    def _shorter(self) -> Pause:
        if self.for_s >= self.every_s:
            raise ValueError(
                f"paused for {self.for_s:g} s every {self.every_s:g} s, it would never run"
            )
        return self


class FaultsConfig(Section):
    """Faults that are injected on purpose. Nothing of it is there unless a value says so."""

    seed: int = 0
    """Every decision is a hash of it: the same seed gives the same faults."""
    kill: Annotated[tuple[Kill, ...], BeforeValidator(_as_tuple)] = ()
    """`store:20s`: SIGKILL of a random store every 20 s; `store+worker:20s`: of either; a list is
    several such plans."""
    pause: Annotated[tuple[Pause, ...], BeforeValidator(_as_tuple)] = ()
    """`worker:30s/2s`: every 30 s a random worker stands still for 2 s."""
    strikes_for: Seconds | None = None
    """`10m`: nothing is killed or paused later than that after the start; none never ends."""
    drop: Share = 0.0
    """Share of requests to stores, workers and retrievers that are lost before they take effect: the
    caller waits until its deadline."""
    lose_answer: Share = 0.0
    """Share of requests that take effect but whose answer is lost; a stream falls silent."""
    delay: Sometimes | None = None
    """`0.05:50ms`: that share of requests and streamed replies comes later by so much."""
    cut: Sometimes | None = None
    """`0.001:2s`: with that share of a worker's calls to a store the link is cut for so long."""
    corrupt: Share = 0.0
    """Share of pages read or sent of which a bit is flipped, on the way or in the store's memory."""
    disk_full: Share = 0.0
    """Share of writes to a store's disk tier that find the disk full."""
    disk_error: Share = 0.0
    """Share of reads and writes of a store's disk tier that fail with an I/O error."""
    slow_disk: Sometimes | None = None
    """`0.01:100ms`: that share of reads and writes of a store's disk tier takes so much longer."""

    @model_validator(mode="after")
    def _something_works(self) -> FaultsConfig:
        if self.drop + self.lose_answer >= 1:
            raise ValueError(
                f"drop ({self.drop:g}) and lose_answer ({self.lose_answer:g}) leave no call answered"
            )
        return self

    @property
    def in_parts(self) -> bool:
        """Whether a shell is put around stores, workers and retrievers."""
        return self.of_disks or any(
            (self.pause, self.drop, self.lose_answer, self.delay, self.cut, self.corrupt)
        )

    @property
    def of_disks(self) -> bool:
        return any((self.disk_full, self.disk_error, self.slow_disk))

    @property
    def strikes(self) -> bool:
        """Whether parts are killed or paused."""
        return bool(self.kill or self.pause)

    def check_parts(self, part_ids: Iterable[str]) -> None:
        """Raises ValueError if a strike names parts of which the configuration has none."""
        there = list(part_ids)
        for strike in (*self.kill, *self.pause):
            for part in strike.parts:
                if not any(part in (p, p.rpartition("-")[0]) for p in there):
                    raise ValueError(f"faults: there is no part {part!r}, only {', '.join(there)}")


def chaos_sets(text: str) -> list[str]:
    """`seed=7,kill=store:20s,...` as `--set` assignments; a key given twice makes a list.

    Raises ConfigError for an entry without `=`.
    """
    values: dict[str, list[str]] = {}
    for entry in text.split(","):
        key, equals, value = (piece.strip() for piece in entry.partition("="))
        if not (key and equals and value):
            raise ConfigError(
                f"--chaos {text!r}: {entry!r} is not kind=value, and no YAML file has that name",
                path="faults",
            )
        values.setdefault(key, []).append(value)
    return [
        f"faults.{key}=" + (given[0] if len(given) == 1 else f"[{', '.join(given)}]")
        for key, given in values.items()
    ]


def chaos_options(text: str | None) -> tuple[list[Path], list[str]]:
    """What `--chaos` adds to the configuration files and to the assignments."""
    if not text:
        return [], []
    if Path(text).suffix in (".yaml", ".yml") or Path(text).is_file():
        return [Path(text)], []
    return [], chaos_sets(text)
