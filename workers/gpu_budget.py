"""What a GPU and its host have to hold for a configuration, said before the start: what does not fit and
what to change (pure). Bytes are gpu_needs.py's, time is gpu_estimate.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from ..core.errors import ConfigError
from ..core.kv_format import KvDtype
from ..core.stage import QUERY_BLOCK
from .gpu_estimate import (
    DecodeEstimate,
    GpuMachine,
    PrefillEstimate,
    estimate_decode,
    estimate_prefill,
    prefill_order,
)
from .gpu_needs import GpuLoad, Need, Place, needs_of, step_pages_of, sum_of

FORMATS: tuple[KvDtype, ...] = tuple(name for name in get_args(KvDtype) if name != "int4c")
"""What GPU kernels read."""


@dataclass(frozen=True)
class FormatFit:
    """A KV format with everything else unchanged."""

    kv_dtype: KvDtype
    device_bytes: int
    host_bytes: int
    fits: bool


@dataclass(frozen=True)
class GpuBudget:
    """Sums, what does not fit, and estimates of time."""

    load: GpuLoad
    machine: GpuMachine
    needs: tuple[Need, ...]
    formats: tuple[FormatFit, ...]
    """From the most exact to the smallest."""
    step_pages: int
    """Pages that one decode step of all rows reads in a layer, at most."""
    decode: DecodeEstimate
    prefill: PrefillEstimate
    problems: tuple[str, ...] = field(default=())
    """What does not fit, with numbers and what to change; empty if all does."""

    def bytes_of(self, place: Place) -> int:
        return sum_of(self.needs, place)

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def best_format(self) -> KvDtype | None:
        """The most exact KV format that fits, with everything else unchanged."""
        return next((f.kv_dtype for f in self.formats if f.fits), None)

    def check(self) -> None:
        """Raises ConfigError with all that does not fit."""
        if self.problems:
            raise ConfigError("; ".join(self.problems), path="cache.device_pages")

    def describe(self) -> list[tuple[str, int | None, str]]:
        """Rows of (what, bytes or None, note) for a table; estimates say that they are."""
        rows: list[tuple[str, int | None, str]] = []
        for place, room in self._rooms():
            rows += [(n.what, n.n_bytes, n.note) for n in self.needs if n.place == place]
            used = self.bytes_of(place)
            rows.append((f"{place} in all", used, f"of {_gb(room)}: {100 * used / room:.0f} %"))
        if self.load.device_pages < min(self.step_pages, self.load.n_pages):
            note = f"a step may read {self.step_pages} pages of a layer, cache.device_pages holds "
            rows.append(
                (
                    "bank of a step",
                    None,
                    f"{note}{self.load.device_pages}: the rest is read in place",
                )
            )
        d, p = self.decode, self.prefill
        parts = f"weights {_gb(d.weight_bytes)}, selection {_gb(d.selection_bytes)}, "
        parts += f"attention {_gb(d.attention_bytes)}, over the link {_gb(d.link_bytes)}"
        rows.append(("a decode step, estimate", None, f"{1e3 * d.seconds:.1f} ms; {parts}"))
        order = "layer after layer" if p.order.layer_major else "chunk after chunk"
        note = f"{p.seconds:.0f} s, {order}; computing {p.compute_s:.0f} s, link {p.link_s:.0f} s"
        rows.append(("prefill of a context, estimate", None, note))
        return rows

    def _rooms(self) -> tuple[tuple[Place, int], ...]:
        return ("device", self.machine.device_bytes), ("host", self.machine.host_bytes)


def plan_gpu(
    load: GpuLoad,
    machine: GpuMachine,
    *,
    hit_ratio: float = 0.9,
    layer_overhead_us: float = 30.0,
    new_share: float = 0.2,
) -> GpuBudget:
    """hit_ratio, layer_overhead_us, new_share: assumptions of the estimates, see gpu_estimate.py.

    Never raises for what does not fit: see `problems` and `check`.
    """
    needs = needs_of(load)
    formats = tuple(_format_fit(load, machine, name) for name in _by_bytes(load))
    bank = next(n.n_bytes for n in needs if n.what == "bank")
    room = machine.device_bytes - sum_of(needs, "device") + bank
    order = prefill_order(
        load.model,
        load.policies,
        load.geometry,
        context_tokens=load.context_tokens,
        chunk_tokens=load.chunk_tokens,
        device_pages=load.device_pages,
        room_bytes=room,
        new_share=new_share,
    )
    return GpuBudget(
        load,
        machine,
        needs,
        formats,
        step_pages_of(load),
        estimate_decode(
            load.model,
            load.policies,
            load.geometry,
            machine,
            context_tokens=load.row_tokens,
            rows=load.rows,
            device_pages=load.device_pages,
            hit_ratio=hit_ratio,
            layer_overhead_us=layer_overhead_us,
        ),
        estimate_prefill(
            load.model, load.policies, order, machine, context_tokens=load.context_tokens
        ),
        _problems(load, machine, needs, formats),
    )


def _problems(
    load: GpuLoad, machine: GpuMachine, needs: tuple[Need, ...], formats: Sequence[FormatFit]
) -> tuple[str, ...]:
    problems = []
    rooms: tuple[tuple[Place, int], ...] = (
        ("device", machine.device_bytes),
        ("host", machine.host_bytes),
    )
    for place, room in rooms:
        used = sum_of(needs, place)
        if used <= room:
            continue
        changes = _changes(load, machine, place)
        largest = max((n for n in needs if n.place == place and n.key), key=lambda n: n.n_bytes)
        if largest.key == "attention.policies":
            changes.append(
                "larger chunks, or scorer: search in the last stage, have smaller tables"
            )
        problems.append(
            f"the {place} needs {_gb(used)} and has {_gb(room)} (most of it: {largest.what}, "
            f"{_gb(largest.n_bytes)}, by {largest.key}); {'; '.join(changes)}"
        )
    if problems:
        best = next((f.kv_dtype for f in formats if f.fits), None)
        problems.append(
            f"cache.kv_dtype: {best} is the most exact format with which all fits"
            if best is not None
            else "no cache.kv_dtype makes all of it fit"
        )
    return tuple(problems)


def _changes(load: GpuLoad, machine: GpuMachine, place: Place) -> list[str]:
    """Single changes that make one place fit, the least painful first."""
    room = machine.device_bytes if place == "device" else machine.host_bytes

    def fits(**changed: int) -> bool:
        return sum_of(needs_of(replace(load, **changed)), place) <= room  # type: ignore[arg-type]

    changes = []
    if place == "device":
        pages = _largest(load.device_pages, lambda n: fits(device_pages=n))
        if pages:
            changes.append(f"cache.device_pages: {pages} fits")
        chunk = _largest(
            load.chunk_tokens // QUERY_BLOCK, lambda n: fits(chunk_tokens=n * QUERY_BLOCK)
        )
        if chunk:
            changes.append(f"worker.prefill_chunk_tokens: {chunk * QUERY_BLOCK} fits")
    tokens = _largest(
        load.context_tokens // load.page_tokens, lambda n: fits(context_tokens=n * load.page_tokens)
    )
    if tokens:
        changes.append(f"model.max_context_tokens: {tokens * load.page_tokens} fits")
    rows = _largest(load.rows, lambda n: fits(rows=n))
    if rows:
        changes.append(f"worker.max_rows: {rows} fits")
    return changes or ["no single value among pages, chunk, context and rows is enough"]


def _largest(top: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [1, top] that fits, 0 if none does; what fits n fits less."""
    low, high = 0, top + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _by_bytes(load: GpuLoad) -> list[KvDtype]:
    """Formats from the most bytes to the fewest, as they stand in the configuration where equal."""
    return sorted(FORMATS, key=lambda name: -replace(load, kv_dtype=name).geometry.row_nbytes)


def _format_fit(load: GpuLoad, machine: GpuMachine, name: KvDtype) -> FormatFit:
    needs = needs_of(replace(load, kv_dtype=name))
    device, host = sum_of(needs, "device"), sum_of(needs, "host")
    fits = device <= machine.device_bytes and host <= machine.host_bytes
    return FormatFit(name, device, host, fits)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
