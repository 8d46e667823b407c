"""What a GPU and its host have to hold for a configuration, said before the start: bytes of every part, what
does not fit and what to change (pure). Time is gpu_estimate.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ..core.config import KvDtype
from ..core.errors import ConfigError
from ..core.stage import QUERY_BLOCK, LayerPolicy
from ..kvstore.page import PageGeometry
from .gpu_estimate import (
    ACTIVATION_BYTES,
    DecodeEstimate,
    GpuMachine,
    GpuModel,
    PrefillEstimate,
    estimate_decode,
    estimate_prefill,
    prefill_order,
    table_bytes,
)

RUNTIME_BYTES = 1 << 30
"""CUDA's context, captured graphs and what allocators round up: assumed, not computed."""
SPLITS = 64
"""Parts that attention of one row and KV head is cut into at most (performance.md 4.1)."""
FORMATS: tuple[KvDtype, ...] = get_args(KvDtype)
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Need:
    """One part of the whole. key: the configuration value that its size hangs on most, or empty."""

    what: str
    place: Place
    n_bytes: int
    note: str = ""
    key: str = ""


@dataclass(frozen=True)
class GpuLoad:
    """What a machine is asked to do; names as in the configuration."""

    model: GpuModel
    policies: tuple[LayerPolicy, ...]
    """One per layer, see `resolve_policies`."""
    kv_dtype: KvDtype
    page_tokens: int
    context_tokens: int
    """Longest context of a row, its answer included (model.max_context_tokens)."""
    rows: int
    """worker.max_rows; each with a context of its own, the worst case."""
    device_pages: int
    chunk_tokens: int
    """worker.prefill_chunk_tokens"""

    @property
    def geometry(self) -> PageGeometry:
        m = self.model
        return PageGeometry(m.n_layers, m.n_kv_heads, self.page_tokens, m.head_dim, self.kv_dtype)

    @property
    def n_pages(self) -> int:
        """Of all rows."""
        return self.rows * -(-self.context_tokens // self.page_tokens)


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
        return _sum(self.needs, place)

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
    room = machine.device_bytes - _sum(needs, "device") + bank
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
            context_tokens=load.context_tokens,
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


def needs_of(load: GpuLoad) -> tuple[Need, ...]:
    """Bytes of every part."""
    m, g, n_ids = load.model, load.geometry, load.n_pages
    n_banks = m.n_layers * m.n_kv_heads
    state = n_banks * load.device_pages * 3 * 4
    # address and slot of every leaf; of every page its place in the host, of every row its pages
    tables = n_banks * n_ids * (8 + 4) + n_ids * (8 + 4 * m.n_kv_heads + 4)
    summaries: dict[str, int] = {}
    for policy in load.policies:
        for name, n_bytes in table_bytes(policy, g, n_ids).items():
            summaries[name] = summaries.get(name, 0) + n_bytes
    parts = [
        Need("weights", "device", m.weight_bytes, key="model.name"),
        Need("page tables", "device", tables, f"{n_ids} pages", "model.max_context_tokens"),
        *(
            Need(f"summaries: {name}", "device", n, "all layers", "attention.policies")
            for name, n in summaries.items()
        ),
        Need("masks", "device", _mask_bytes(load), f"{load.rows} rows", "worker.max_rows"),
        Need(
            "bank",
            "device",
            load.device_pages * g.page_nbytes + state,
            f"{load.device_pages} pages of {g.page_nbytes} bytes in {load.kv_dtype}",
            "cache.device_pages",
        ),
        Need(
            "activations",
            "device",
            _activation_bytes(load),
            f"{load.chunk_tokens} tokens of a prefill chunk",
            "worker.prefill_chunk_tokens",
        ),
        Need(
            "scratch",
            "device",
            _scratch_bytes(load),
            "scores of a chunk, parts of attention",
            "worker.prefill_chunk_tokens",
        ),
        Need("runtime", "device", RUNTIME_BYTES, "assumed"),
        Need(
            "pages",
            "host",
            n_ids * g.page_nbytes,
            f"{load.rows} contexts of {load.context_tokens} tokens, pinned",
            "cache.kv_dtype",
        ),
    ]
    return tuple(parts)


def step_pages_of(load: GpuLoad) -> int:
    """Pages that attention of one decode step reads in the layer that reads most, of all rows: each selected
    block in a page of its own."""
    most, n_pages = 0, -(-load.context_tokens // load.page_tokens)
    for policy in load.policies:
        if policy.dense:
            return load.n_pages
        n = policy.stages[-1].keep // policy.block_tokens
        n += -(-policy.sink // load.page_tokens) + policy.window // load.page_tokens + 2
        most = max(most, min(n, n_pages))
    return load.rows * most


def _mask_bytes(load: GpuLoad) -> int:
    """As `DeviceMask.empty` makes them."""
    total = 0
    for policy in load.policies:
        if policy.dense:
            continue
        n_lists = 1 if policy.head_reduce == "all" else load.model.n_kv_heads
        stages = policy.stages
        entering = [a.keep // b.chunk for a, b in itertools.pairwise(stages)]
        items = sum(n + 1 for n in entering) + stages[-1].keep // stages[-1].chunk + 1
        total += load.rows * n_lists * items * 4
    return total


def _activation_bytes(load: GpuLoad) -> int:
    m = load.model
    # the residual, its norm and the sum; q, k, v and what attention returns; gate, up and their product
    per_token = 3 * m.hidden + (2 * m.n_heads + 2 * m.n_kv_heads) * m.head_dim + 3 * m.intermediate
    return load.chunk_tokens * per_token * ACTIVATION_BYTES + load.rows * m.vocab * 4


def _scratch_bytes(load: GpuLoad) -> int:
    """float32 scores of the stage that scores most, for every head and query block or row; partial results
    of attention. One layer at a time."""
    m = load.model
    n_blocks = max(load.rows, -(-load.chunk_tokens // QUERY_BLOCK))
    most = 0
    for policy in load.policies:
        entering = load.context_tokens
        for stage in policy.stages:
            most = max(most, -(-min(entering, load.context_tokens) // stage.chunk))
            entering = stage.keep
    parts = load.rows * m.n_heads * SPLITS * (m.head_dim + 2)
    return 4 * (n_blocks * m.n_heads * most + parts)


def _problems(
    load: GpuLoad, machine: GpuMachine, needs: tuple[Need, ...], formats: Sequence[FormatFit]
) -> tuple[str, ...]:
    problems = []
    rooms: tuple[tuple[Place, int], ...] = (
        ("device", machine.device_bytes),
        ("host", machine.host_bytes),
    )
    for place, room in rooms:
        used = _sum(needs, place)
        if used <= room:
            continue
        changes = _changes(load, machine, place)
        largest = max((n for n in needs if n.place == place and n.key), key=lambda n: n.n_bytes)
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
        return _sum(needs_of(replace(load, **changed)), place) <= room  # type: ignore[arg-type]

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
    device, host = _sum(needs, "device"), _sum(needs, "host")
    fits = device <= machine.device_bytes and host <= machine.host_bytes
    return FormatFit(name, device, host, fits)


def _sum(needs: Sequence[Need], place: Place) -> int:
    return sum(need.n_bytes for need in needs if need.place == place)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
