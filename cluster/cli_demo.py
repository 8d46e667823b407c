"""`longreach demo`: a cluster, a batch, its progress, the answers beside the facts, one table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ..core.errors import FailedPrecondition, InternalError, Unavailable, UnreadableUri
from . import render
from .cli_base import err, local_address, out
from .client import Client
from .proto import jobs_pb2
from .summary import Summary, answer_text, summarize

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: the demo's documents and configuration are read from it."""
START_TIMEOUT_S = 180.0
DENSE_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 90.0
_POLL_S = 0.2


def demo(
    batch: Annotated[Path, typer.Option(help="JSONL of the demo.")] = ROOT
    / "examples/demo/batch.jsonl",
    config: Annotated[Path, typer.Option(help="Configuration.")] = ROOT / "configs/dev.yaml",
    wiring: Annotated[
        Literal["ray", "inprocess"] | None, typer.Option(help="Overrides cluster.wiring.")
    ] = None,
    dense: Annotated[
        bool, typer.Option(help="Also ask plain dense attention, at lowest priority beside.")
    ] = True,
) -> None:
    """Answer a batch over long documents on a one-node cluster, then shut everything down."""
    for path in (batch, config):
        if not path.exists():
            raise FailedPrecondition(f"{path} is missing; run the demo from a checkout")
    expected = _expected(batch)
    started_s = time.monotonic()
    dense_answers: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="longreach-demo-") as name:
        folder = Path(name)
        with _asking_dense(folder, batch, dense) as dense_path:
            lines, last = _run_batch(folder, batch, config, wiring, started_s)
        if dense:
            dense_answers = json.loads(dense_path.read_text(encoding="utf-8"))
    answers = {json.loads(line)["custom_id"]: answer_text(line) for line in lines}
    n_right = sum(_right(answers.get(name, ""), fact) for name, fact in expected.items())
    out.print(_answers_table(answers, expected, dense_answers))
    summary: Summary = summarize(lines)
    out.print(render.summary_table(summary))
    took = render.human_seconds(time.monotonic() - started_s)
    out.print(f"{n_right} of {len(expected)} facts found; everything took {took}")
    if last is None or last.state != jobs_pb2.JOB_STATE_COMPLETED or summary.rows["failed"]:
        raise typer.Exit(1)


def _run_batch(
    folder: Path, batch: Path, config: Path, wiring: str | None, started_s: float
) -> tuple[list[str], jobs_pb2.Job | None]:
    """Result lines and the job's last state; the cluster is gone when this returns."""
    with _serving(folder, config, wiring) as address, Client(address) as client:
        out.print(f"cluster up after {render.human_seconds(time.monotonic() - started_s)}")
        job = client.submit(batch)
        last = render.follow_job(out, client.watch(job.job_id, interval_s=0.5))
        return [line.line for line in client.results(job.job_id)], last


@contextmanager
def _serving(state_dir: Path, config: Path, wiring: str | None) -> Iterator[str]:
    """A gateway of its own process on a free port; ended, with its parts, on the way out."""
    command = [sys.executable, "-m", "longreach", "serve", "--config", str(config)]
    command += ["--port", "0", "--state-dir", str(state_dir / "state")]
    command += ["--wiring", wiring] if wiring else []
    log_path = state_dir / "serve.log"
    with log_path.open("w") as log_file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,  # the batch names its documents relative to the checkout
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends it in order
        )
    try:
        with err.status("starting the cluster"):
            address = _wait_address(process, state_dir / "state", log_path)
        yield address
    finally:
        with err.status("stopping the cluster"):
            _stop(process, log_path)


def _wait_address(process: subprocess.Popen[bytes], state_dir: Path, log_path: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unavailable(f"serve ended with code {process.returncode}: {_tail(log_path)}")
        address = local_address(state_dir)
        if address:
            return address
        time.sleep(_POLL_S)
    raise Unavailable(f"serve was not up within {START_TIMEOUT_S:.0f} s: {_tail(log_path)}")


def _stop(process: subprocess.Popen[bytes], log_path: Path) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_TIMEOUT_S)
        raise InternalError(f"serve did not stop in {STOP_TIMEOUT_S:.0f} s") from None
    if code:
        err.print(f"serve ended with code {code}: {_tail(log_path)}", markup=False)


def _tail(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:]) or "it said nothing"


def _expected(batch: Path) -> dict[str, str]:
    """The fact each answer should hold, by custom_id (expected.json beside the batch)."""
    path = batch.with_name("expected.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UnreadableUri(f"{path}: {exc}") from exc
    return {str(name): str(fact) for name, fact in facts.items()}


@contextmanager
def _asking_dense(folder: Path, batch: Path, wanted: bool) -> Iterator[Path]:
    """Plain transformers attention answers the same lines in a process of the lowest priority: it
    takes what the cluster leaves of the processors, and the rest of its time afterwards."""
    answers = folder / "dense.json"
    if not wanted:
        yield answers
        return
    command = ["nice", "-n", "19", sys.executable, "-m", "longreach", "dense", str(batch.resolve())]
    log_path = folder / "dense.log"
    with log_path.open("w") as log_file:
        process = subprocess.Popen(
            [*command, "--out", str(answers)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield answers
        with err.status("waiting for dense attention to answer the same questions"):
            if process.wait(DENSE_TIMEOUT_S):
                raise InternalError(f"dense attention failed: {_tail(log_path)}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def ask_dense(
    batch: Annotated[Path, typer.Argument(help="JSONL in our row shape, with local documents.")],
    out_path: Annotated[Path, typer.Option("--out", help="Where to write {custom_id: answer}.")],
) -> None:
    """Ask plain Hugging Face dense attention (the embedded model) the questions of a batch."""
    from ..workers.dense import answer_batch

    out_path.write_text(json.dumps(answer_batch(batch)), encoding="utf-8")


def _answers_table(
    answers: Mapping[str, str], expected: Mapping[str, str], dense: Mapping[str, str]
) -> Table:
    columns = ["question", "fact in the document", "longreach", ""]
    table = Table(*columns, *(["dense attention", ""] if dense else []), title="Answers")
    for name, fact in expected.items():
        said = answers.get(name, "(no answer)")
        cells = [name, fact, _short(said), _mark(said, fact)]
        if dense:
            said = dense.get(name, "(no answer)")
            cells += [_short(said), _mark(said, fact)]
        table.add_row(*cells)
    return table


def _right(answer: str, fact: str) -> bool:
    return fact.casefold() in " ".join(answer.split()).casefold()


def _mark(answer: str, fact: str) -> str:
    return "[green]right[/green]" if _right(answer, fact) else "[red]wrong[/red]"


def _short(text: str, n_chars: int = 60) -> str:
    line = " ".join(text.split())
    shown = line if len(line) <= n_chars else line[: n_chars - 1] + "…"
    return shown.replace("[", "\\[")
