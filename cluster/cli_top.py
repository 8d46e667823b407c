"""`longreach top`: the gateway, its parts and its jobs, once a second."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from ..core.errors import LongreachError
from .cli_base import DEFAULT_STATE_DIR, Address, StateDir, connect, out
from .top_view import Frame, frame_dict, frame_view, take_frame

CALL_TIMEOUT_S = 10.0
"""A gateway that takes longer is shown as silent."""


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and leave.")] = False,
    interval_s: Annotated[float, typer.Option(help="Seconds between frames.", min=0.1)] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a frame, on a line of its own.")
    ] = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Show rows, workers, stores and jobs as they are now. Ctrl-C leaves."""
    if once:
        frame = _frame(address, state_dir)
        if as_json:
            _print_json(frame)
        else:
            out.print(frame_view(frame, None))
        return
    if as_json or not out.is_terminal:
        _lines(address, state_dir, interval_s, as_json)
        return
    last: Frame | None = None
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                frame = _frame(address, state_dir)
                live.update(frame_view(frame, last), refresh=True)
                last = frame
            except LongreachError as exc:
                live.update(_silent(exc), refresh=True)
            time.sleep(interval_s)


def _lines(address: str, state_dir: Path, interval_s: float, as_json: bool) -> None:
    """For pipes and files: frame after frame."""
    last: Frame | None = None
    while True:
        try:
            frame = _frame(address, state_dir)
            if as_json:
                _print_json(frame)
            else:
                out.print(frame_view(frame, last))
            last = frame
        except LongreachError as exc:
            if as_json:
                line = json.dumps({"error": exc.reason, "message": exc.message})
                out.print(line, soft_wrap=True, markup=False)
            else:
                out.print(_silent(exc))
        time.sleep(interval_s)


def _frame(address: str, state_dir: Path) -> Frame:
    # a client a frame: the next gateway may answer at another address
    with connect(address, state_dir, timeout_s=CALL_TIMEOUT_S) as client:
        return take_frame(client)


def _print_json(frame: Frame) -> None:
    out.print(json.dumps(frame_dict(frame)), soft_wrap=True, markup=False)


def _silent(exc: LongreachError) -> Text:
    return Text(f"{time.strftime('%H:%M:%S')} no answer: {exc.reason}: {exc.message}", "bold red")
