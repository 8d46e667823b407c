"""`longreach serve`: gateway and parts until a signal, then drain; a second signal ends at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from ..core.config import Config, load_config
from ..core.fault_config import chaos_options
from .chaos import RECORD_NAME, Chaos
from .cli_base import ConfigFiles, Sets, err, out, with_overrides
from .runtime import Runtime, part_ids

log = logging.getLogger(__name__)

EXIT_AT_ONCE = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    wiring: Annotated[
        Literal["ray", "inprocess"] | None,
        typer.Option(help="Overrides cluster.wiring."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Overrides gateway.port; 0 picks one.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Overrides gateway.state_dir.")] = None,
    keep_parts: Annotated[
        bool,
        typer.Option(help="Leave the parts running at the end; the next serve adopts them."),
    ] = False,
    chaos: Annotated[
        str | None,
        typer.Option(
            help="Inject faults on purpose: a YAML file with a `faults` section, or for example "
            "seed=7,kill=store:20s,pause=worker:30s/2s,drop=0.01,delay=0.05:50ms,corrupt=0.01"
        ),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Of the log on stderr.")
    ] = "warning",
) -> None:
    """Start the cluster and its gateway; runs until SIGTERM or SIGINT, then drains."""
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    files, sets = chaos_options(chaos)
    tree = with_overrides(
        load_config([*config, *files], [*set_, *sets]),
        cluster={"wiring": wiring},
        gateway={"port": port, "state_dir": str(state_dir) if state_dir else None},
    )
    raise typer.Exit(run(tree, make_runtime(tree), keep_parts=keep_parts))


def make_runtime(config: Config) -> Runtime:
    """The wiring that the configuration names; ray is imported only for its own."""
    if config.cluster.wiring == "inprocess":
        from .local_runtime import LocalRuntime

        return LocalRuntime(config)
    from .ray_runtime import RayRuntime

    return RayRuntime(config, config.gateway.state_dir)


def run(config: Config, runtime: Runtime, *, keep_parts: bool = False) -> int:
    """Serve until a signal, in the main thread. Returns the exit code: 0 after a clean drain.

    Raises what Gateway.start raises, KeyboardInterrupt for a signal while starting.
    """
    from .gateway import Gateway

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    stopping = threading.Event()
    gateway = Gateway(config, runtime)
    chaos: Chaos | None = None
    n_running = 0
    try:
        _on_signals(_interrupt)
        address = gateway.start()

        def on_signal(signum: int, frame: FrameType | None) -> None:
            if stopping.is_set():
                os._exit(EXIT_AT_ONCE)
            stopping.set()

        _on_signals(on_signal)
        if config.faults.strikes:
            parts = [part_id for ids in part_ids(config).values() for part_id in ids]
            record = Path(config.gateway.state_dir) / RECORD_NAME
            chaos = Chaos(config.faults, runtime, parts, record)
            chaos.start()
        out.print(f"serving at {address}", soft_wrap=True)
        out.print(f"state in {Path(config.gateway.state_dir).resolve()}", soft_wrap=True)
        while not stopping.wait(1.0):
            pass
        timeout_s = config.gateway.drain_timeout_s
        err.print(f"draining for at most {timeout_s:.0f} s; a second signal ends at once")
        n_running = gateway.drain(timeout_s)
    finally:
        if chaos is not None:
            chaos.stop()
        gateway.stop(keep_parts=keep_parts)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if n_running:
        err.print(f"{n_running} rows still ran; they are in the journal for the next start")
    return 0


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for signum in SIGNALS:
        signal.signal(signum, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """While starting up: end what was begun. A second signal ends at once."""
    _on_signals(lambda signum, frame: os._exit(EXIT_AT_ONCE))
    raise KeyboardInterrupt
