"""Terminal output: human sizes and times, tables, live progress of a job."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from .proto import jobs_pb2
from .summary import Summary

PLAIN_EVERY_S = 5.0
"""Without a terminal: seconds between lines of a job in which only numbers changed."""


def human_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def human_count(n: float) -> str:
    """12000 -> '12,000'."""
    return f"{n:,.0f}"


def human_seconds(seconds: float) -> str:
    """75 -> '1m 15s'; negative values are unknown."""
    if seconds < 0:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def state_name(state: jobs_pb2.JobState) -> str:
    return jobs_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()


def jobs_table(jobs: Iterable[jobs_pb2.Job]) -> Table:
    """One line per job, newest first."""
    # the id is copied into other commands: it must be whole, however narrow the terminal
    table = Table(Column("job", no_wrap=True, min_width=20), box=box.SIMPLE)
    for name in ("state", "rows", "failed", "in", "out", "created", "took", "name"):
        table.add_column(name, no_wrap=name == "state")
    for job in jobs:
        end_s = job.ended_s or time.time()
        table.add_row(
            job.job_id,
            state_name(job.state),
            f"{job.rows.done + job.rows.failed + job.rows.cancelled}/{job.rows.total}",
            str(job.rows.failed),
            human_count(job.prompt_tokens),
            human_count(job.decoded_tokens),
            datetime.fromtimestamp(job.created_s).strftime("%m-%d %H:%M"),
            human_seconds(end_s - job.started_s) if job.started_s else "-",
            job.name,
        )
    return table


def summary_table(summary: Summary) -> Table:
    """The one table after a batch."""
    total = summary.total
    rows = ", ".join(f"{n} {state}" for state, n in sorted(summary.rows.items())) or "none"
    hit, mass = summary.hit_ratio, summary.mass_kept
    table = Table("summary", "", show_header=False, title="Summary")
    table.add_row("rows", rows)
    table.add_row(
        "prompt tokens",
        f"{human_count(total['tokens_prefilled'])} prefilled, "
        f"{human_count(total['tokens_reused'])} reused",
    )
    table.add_row("prefill", f"{summary.prefill_tokens_per_s:.1f} tokens/s")
    table.add_row(
        "decode",
        f"{summary.decode_tokens_per_s:.1f} tokens/s "
        f"({human_count(total['tokens_decoded'])} tokens)",
    )
    table.add_row(
        "pages",
        f"at most {human_count(summary.largest.get('pages_device', 0))} on the device, of "
        f"{human_count(summary.largest.get('pages_context', 0))} in the largest context",
    )
    table.add_row(
        "pages recomputed",
        f"{human_count(total['pages_recomputed'])}, "
        f"{human_count(total['tokens_replayed'])} answer tokens replayed",
    )
    table.add_row("device to store", human_bytes(total["bytes_device_to_store"]))
    table.add_row("store to device", human_bytes(total["bytes_store_to_device"]))
    table.add_row("device hit ratio", "-" if hit is None else f"{hit:.1%}")
    table.add_row("attention mass kept", "-" if mass is None else _mass(mass, summary))
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary.seconds.items())
    table.add_row("seconds per part", parts or "-")
    return table


def follow_job(console: Console, updates: Iterable[jobs_pb2.JobUpdate]) -> jobs_pb2.Job | None:
    """Show a job until it has ended: live on a terminal, lines elsewhere. Returns the last state."""
    last: jobs_pb2.Job | None = None
    if not console.is_terminal:
        plain = _Plain()
        for update in updates:
            last = update.job
            for line in plain.lines(update):
                console.print(line, soft_wrap=True, markup=False, highlight=False)
        return last
    with Live(console=console, refresh_per_second=4) as live:
        for update in updates:
            last = update.job
            live.update(job_view(update))
    return last


def job_view(update: jobs_pb2.JobUpdate) -> Group:
    """The live view of one moment: a bar for the job, a line per running row."""
    job = update.job
    ended = job.rows.done + job.rows.failed + job.rows.cancelled
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows")
    )
    bar.add_task(f"{job.job_id} {state_name(job.state)}", total=job.rows.total, completed=ended)
    rows = Table.grid(padding=(0, 2))
    for row in update.active:
        doing, of = (
            (row.prefilled, row.total)
            if row.phase != "decode"
            else (
                row.decoded,
                row.max_tokens,
            )
        )
        rows.add_row(row.custom_id, row.phase, f"{human_count(doing)}/{human_count(of)} tokens")
    return Group(bar, rows, _rates(update))


class _Plain:
    """Lines for logs: at every change of state or of ended rows, else every few seconds."""

    def __init__(self) -> None:
        self._shown: tuple[object, ...] = ()
        self._shown_s = 0.0

    def lines(self, update: jobs_pb2.JobUpdate) -> Iterator[str]:
        job = update.job
        ended = job.rows.done + job.rows.failed + job.rows.cancelled
        state = (job.job_id, job.state, ended)
        now = time.monotonic()
        if state == self._shown and now - self._shown_s < PLAIN_EVERY_S:
            return
        self._shown, self._shown_s = state, now
        yield (
            f"{job.job_id} {state_name(job.state)}: {ended}/{job.rows.total} rows, "
            f"{job.rows.running} running, {_rates(update)}"
        )


def _rates(update: jobs_pb2.JobUpdate) -> str:
    prefilled, decoded = human_count(update.prefilled_tokens), human_count(update.decoded_tokens)
    if update.job.ended_s:
        took = human_seconds(update.job.ended_s - (update.job.started_s or update.job.created_s))
        return f"prefilled {prefilled} tokens, decoded {decoded}, took {took}"
    return (
        f"prefilled {prefilled} tokens ({update.prefill_tokens_per_s:.0f}/s), "
        f"decoded {decoded} ({update.decode_tokens_per_s:.1f}/s), "
        f"ETA {human_seconds(update.eta_s)}"
    )


def _mass(mass: float, summary: Summary) -> str:
    return f"{mass:.1%} ({human_count(summary.total['mass_kept_n'])} samples)"
