"""Batch commands against a running gateway: submit, jobs, watch, results, cancel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UnreadableUri
from . import render
from .cli_base import DEFAULT_STATE_DIR, Address, StateDir, connect, err, out
from .proto import jobs_pb2

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id, as `submit` printed it.")]


def submit(
    batch: Annotated[str, typer.Argument(help="JSONL file; with --uri a URI the gateway reads.")],
    uri: Annotated[bool, typer.Option("--uri", help="Pass BATCH by reference.")] = False,
    name: Annotated[str, typer.Option(help="A label for people; else the file's name.")] = "",
    key: Annotated[
        str, typer.Option(help="Idempotency key: submitting again answers the first job.")
    ] = "",
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Submit a batch; prints the job id alone on stdout."""
    with connect(address, state_dir) as client:
        if uri:
            job = client.submit(uri=batch, name=name, idempotency_key=key)
        else:
            job = client.submit(Path(batch), name=name, idempotency_key=key)
    out.print(job.job_id, soft_wrap=True)


def jobs(
    active: Annotated[
        bool, typer.Option("--active", help="Only jobs that have not ended.")
    ] = False,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=1000)] = 100,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """List jobs, newest first."""
    with connect(address, state_dir) as client:
        out.print(render.jobs_table(client.jobs(limit=limit, active_only=active)))


def watch(
    job_id: JobId,
    interval_s: Annotated[float, typer.Option(help="Seconds between updates.", min=0.1)] = 1.0,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Show a job's progress until it has ended. Exit code 1 unless it completed."""
    with connect(address, state_dir) as client:
        job = render.follow_job(out, client.watch(job_id, interval_s=interval_s))
    if job is None or job.state != jobs_pb2.JOB_STATE_COMPLETED:
        raise typer.Exit(1)


def results(
    job_id: JobId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else stdout.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job has ended.")
    ] = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Fetch result lines (JSONL) in the order rows ended."""
    n_lines = 0
    with connect(address, state_dir) as client:
        lines = client.results(job_id, follow=follow)
        if output is None:
            for line in lines:
                sys.stdout.write(line.line + "\n")
                sys.stdout.flush()
            return
        # the gateway is asked before a file of that name is overwritten
        first = next(lines, None)
        try:
            with output.open("w", encoding="utf-8") as file:
                while first is not None:
                    file.write(first.line + "\n")
                    file.flush()
                    n_lines += 1
                    first = next(lines, None)
        except OSError as exc:
            raise UnreadableUri(f"{output}: {exc.strerror}") from exc
    err.print(f"{n_lines} rows written to {output}", soft_wrap=True)


def cancel(job_id: JobId, address: Address = "", state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Cancel a job; rows answered before stay answered."""
    with connect(address, state_dir) as client:
        job = client.cancel(job_id)
    out.print(f"{job.job_id} {render.state_name(job.state)}", soft_wrap=True)
