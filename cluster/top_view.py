"""One moment of a gateway: taken from its calls, drawn for a terminal, or as plain values."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ..core.errors import LongreachError
from .client import Client
from .proto import admin_pb2, jobs_pb2, kv_pb2
from .render import human_bytes, human_count, human_seconds, state_name
from .render_kv import hit_rate, share, stat_dict
from .tier_metrics import failures_of, tiered

MAX_JOBS = 8
"""Jobs shown; the rest is counted."""
BAR_WIDTH = 12
_TRAFFIC = {
    "written": ("store_bytes_written",),
    "read": ("store_bytes_read_inplace", "store_bytes_read_wire"),
}
"""A worker's counters of bytes to and from the stores."""


@dataclass(frozen=True)
class Frame:
    """taken_s: monotonic. jobs: of those that have not ended, the newest; n_jobs counts all of them."""

    taken_s: float
    stats: admin_pb2.StatsResponse
    stores: kv_pb2.KvStatResponse
    jobs: list[jobs_pb2.JobUpdate] = field(default_factory=list)
    n_jobs: int = 0


def take_frame(client: Client) -> Frame:
    """Raises the client's errors."""
    stats = client.stats()
    active = client.jobs(active_only=True, limit=1000)
    updates: list[jobs_pb2.JobUpdate] = []
    for job in active[:MAX_JOBS]:
        try:
            updates += itertools.islice(client.watch(job.job_id), 1)
        except LongreachError:  # it ended meanwhile and was deleted, or the gateway went away
            continue
    return Frame(time.monotonic(), stats, client.kv.stat(), updates, len(active))


def frame_dict(frame: Frame) -> dict[str, Any]:
    stats = frame.stats
    parts = {
        part.part: {**part.labels, **part.numbers}
        for part in stats.parts
        if part.labels.get("kind") != "store"
    }
    return {
        "gateway": {
            "version": stats.version,
            "model": stats.model,
            "epoch": stats.epoch,
            "uptime_s": stats.uptime_s,
            "draining": stats.draining,
            **_rates(frame),
            **stats.gateway,
        },
        "parts": parts,
        "kv": stat_dict(frame.stores),
        "jobs": [
            {
                "job_id": update.job.job_id,
                "state": state_name(update.job.state),
                "rows_ended": _ended(update.job),
                "rows_total": update.job.rows.total,
                "rows_running": update.job.rows.running,
                "prefill_tokens_per_s": update.prefill_tokens_per_s,
                "decode_tokens_per_s": update.decode_tokens_per_s,
                "eta_s": update.eta_s if update.eta_s >= 0 else None,
            }
            for update in frame.jobs
        ],
        "n_jobs": frame.n_jobs,
    }


def frame_view(frame: Frame, last: Frame | None) -> Group:
    """last: the frame before this one, for rates per second."""
    shown: list[RenderableType] = [_gateway(frame), _workers(frame, last), _stores(frame, last)]
    if frame.jobs:
        shown.append(_jobs(frame))
    return Group(*shown)


def _rates(frame: Frame) -> dict[str, float]:
    """Tokens per second of all jobs over about the last ten seconds, as the gateway measures them."""
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return {name: sum(getattr(update, name) for update in frame.jobs) for name in names}


def _gateway(frame: Frame) -> Text:
    stats, rates = frame.stats, _rates(frame)
    numbers = stats.gateway
    state = "draining" if stats.draining else "serving"
    return Text(
        f"{time.strftime('%H:%M:%S')}  longreach {stats.version}  {stats.model}  {state} for "
        f"{human_seconds(stats.uptime_s)}  epoch {stats.epoch}\n"
        f"rows {human_count(numbers.get('rows_running', 0))} running, "
        f"{human_count(numbers.get('rows_queued', 0))} queued   "
        f"prefill {rates['prefill_tokens_per_s']:.0f} tokens/s, "
        f"decode {rates['decode_tokens_per_s']:.1f}   "
        f"streams {human_count(numbers.get('streams_open', 0))}"
    )


def _workers(frame: Frame, last: Frame | None) -> Table:
    table = _table(
        "worker", "state", "rows", "bank", "pages", "to stores", "from stores", "restarts"
    )
    before = _parts(last)
    for name, part in _parts(frame).items():
        if part.labels.get("kind") != "worker":
            continue
        numbers = part.numbers
        traffic = [
            _traffic(numbers, before[name].numbers if name in before else None, keys, frame, last)
            for keys in _TRAFFIC.values()
        ]
        table.add_row(
            name,
            part.labels.get("state", ""),
            human_count(numbers.get("rows", 0)),
            _bar(numbers.get("bank_slots_used", 0), numbers.get("bank_slots", 0)),
            human_count(numbers.get("pages_known", 0)),
            *traffic,
            human_count(numbers.get("restarts", 0)),
        )
    return table


def _stores(frame: Frame, last: Frame | None) -> Table:
    table = _table(
        "store", "state", "arena", "disk", "pinned", "hits", "evicted", "repair", "failed"
    )
    page_bytes = frame.stores.page_bytes
    for store in frame.stores.stores:
        if store.error:
            table.add_row(store.store_id, store.state, Text("no answer", "red"))
            continue
        numbers = tiered(store.numbers)
        few = numbers.get("repair_under_replicated", 0)
        pushed = human_bytes(numbers.get("repair_bytes_pushed", 0))
        failed = sum(failures_of(numbers).values())
        failed += sum(numbers.get(name, 0) for name in ("corrupt_arena", "corrupt_disk"))
        failed += numbers.get("disk_errors", 0)
        table.add_row(
            store.store_id,
            store.state,
            _tier(numbers, "arena", page_bytes),
            _tier(numbers, "disk", page_bytes),
            human_count(numbers.get("pages_pinned", 0)),
            share(hit_rate(numbers)),
            human_count(numbers.get("evictions", 0)),
            f"{human_count(few)} few, {pushed} pushed",
            Text(human_count(failed), "red" if failed else ""),
        )
    return table


def _jobs(frame: Frame) -> Table:
    table = _table("job", "state", "rows", "done", "prefill/s", "decode/s", "ETA")
    for update in frame.jobs:
        job = update.job
        table.add_row(
            job.job_id,
            state_name(job.state),
            f"{_ended(job)}/{job.rows.total}, {job.rows.running} running",
            _bar(_ended(job), job.rows.total),
            f"{update.prefill_tokens_per_s:.0f}",
            f"{update.decode_tokens_per_s:.1f}",
            human_seconds(update.eta_s),
        )
    if frame.n_jobs > len(frame.jobs):
        table.add_row(f"and {frame.n_jobs - len(frame.jobs)} more")
    return table


def _table(first: str, *others: str) -> Table:
    return Table(Column(first, no_wrap=True), *others, box=box.SIMPLE, pad_edge=False)


def _parts(frame: Frame | None) -> dict[str, admin_pb2.PartStats]:
    return {part.part: part for part in frame.stats.parts} if frame is not None else {}


def _traffic(
    now: Mapping[str, float],
    before: Mapping[str, float] | None,
    keys: tuple[str, ...],
    frame: Frame,
    last: Frame | None,
) -> str:
    """Bytes per second since the frame before; the sum so far in the first frame."""
    total = sum(now.get(key, 0.0) for key in keys)
    if before is None or last is None or frame.taken_s <= last.taken_s:
        return human_bytes(total)
    grown = total - sum(before.get(key, 0.0) for key in keys)
    # a worker that came back counts from zero again
    return f"{human_bytes(max(0.0, grown) / (frame.taken_s - last.taken_s))}/s"


def _tier(numbers: Mapping[str, float], tier: str, page_bytes: int) -> RenderableType:
    pages, slots = numbers.get(f"{tier}_pages", 0), numbers.get(f"{tier}_slots", 0)
    if not slots:
        return Text("-")
    line = Table.grid(padding=(0, 1))
    line.add_row(_bar(pages, slots), human_bytes(pages * page_bytes))
    return line


def _bar(part: float, whole: float) -> RenderableType:
    return ProgressBar(total=max(whole, 1), completed=min(part, whole), width=BAR_WIDTH)


def _ended(job: jobs_pb2.Job) -> int:
    return int(job.rows.done + job.rows.failed + job.rows.cancelled)
