"""What the commands share: consoles, the error line, where the gateway is."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..core.config import Config, GatewayConfig
from ..core.errors import LongreachError, as_longreach_error
from .client import DEFAULT_ADDRESS, Client

log = logging.getLogger(__name__)

PIPE_COLUMNS = 160
"""Width of tables in a file or a pipe, unless COLUMNS says another."""


def _console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False)
    if made.is_terminal or "COLUMNS" in os.environ:
        return made
    return Console(stderr=stderr, highlight=False, width=PIPE_COLUMNS)


out = _console()
err = _console(stderr=True)

ConfigFiles = Annotated[
    list[Path],
    typer.Option("--config", help="YAML file; may be repeated, later files win."),
]
Sets = Annotated[
    list[str], typer.Option("--set", help="a.b.c=value, applied after the files; may be repeated.")
]
Address = Annotated[
    str,
    typer.Option(
        help="Gateway as host:port. Without it: the one serving in --state-dir, "
        f"else {DEFAULT_ADDRESS}."
    ),
]
StateDir = Annotated[
    Path, typer.Option(help="State directory of a gateway on this machine, to find its address.")
]
DEFAULT_STATE_DIR = Path(GatewayConfig().state_dir)


class Commands(TyperGroup):
    """Turns every error into one line on stderr and exit code 1; usage errors stay 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LongreachError as exc:
            fail(exc)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except Exception as exc:
            if _is_usage(exc):
                raise
            log.debug("unexpected", exc_info=True)
            fail(as_longreach_error(exc))


def fail(error: LongreachError) -> None:
    """Print `error: REASON: message` and leave with exit code 1."""
    message = " ".join(error.message.split())
    err.print(f"error: {error.reason}: {message}", soft_wrap=True, markup=False)
    raise typer.Exit(1)


def connect(address: str, state_dir: Path, *, timeout_s: float = 30.0) -> Client:
    """A client of the named gateway, or of the one that serves in the state directory. timeout_s:
    deadline of short calls."""
    found = address or local_address(state_dir) or DEFAULT_ADDRESS
    return Client(found, timeout_s=timeout_s)


def local_address(state_dir: Path) -> str:
    """Address that a gateway wrote to its state directory; empty if there is none."""
    try:
        return str(json.loads((state_dir / "gateway.json").read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def with_overrides(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with single fields replaced; None leaves a field as it is."""
    updates = {}
    for name, fields in sections.items():
        given = {key: value for key, value in fields.items() if value is not None}
        section = getattr(config, name)
        updates[name] = type(section).model_validate({**section.model_dump(), **given})
    return config.model_copy(update=updates)


def _is_usage(exc: Exception) -> bool:
    # typer brings its own copy of click; its usage errors carry an exit code
    return hasattr(exc, "exit_code") and hasattr(exc, "format_message")
