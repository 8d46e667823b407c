"""One service of a process: built, served at an address of its own, asked for health, drained.

The common part of the actor shells; imports no ray and, until `build` runs, nothing heavy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..core.errors import ConfigError, LongreachError, as_longreach_error
from .transport import Server, Service, serve

log = logging.getLogger(__name__)

EXIT_FATAL = 1


class Serving:
    """Builds and serves; a service that cannot be built is remembered and raised by `address`.

    A constructor that raises would leave an actor dead with the error as text only; so the error
    waits here for whoever asks, and the process stays until it is told to go.
    """

    def __init__(self, build: Callable[[], Service], host: str) -> None:
        self._server: Server | None = None
        self._service: Any = None
        self._failure: LongreachError | None = None
        try:
            self._service = build()
            self._server = serve(self._service, f"tcp://{host}:0")
        except Exception as exc:
            log.exception("part could not be built")
            self._failure = as_longreach_error(exc)

    def address(self) -> str:
        """Where the service answers. Raises what kept it from being built."""
        if self._failure is not None or self._server is None:
            raise self._failure or LongreachError("not served")
        return self._server.address

    def health(self) -> dict[str, Any]:
        """This process, and whether the service was built."""
        return {"pid": os.getpid(), "ok": self._failure is None}

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones end for timeout_s, release what is held."""
        if self._server is not None:
            self._server.stop(timeout_s)
        close = getattr(self._service, "close", None)
        if close is not None:
            close()


def exit_now(reason: object = "fatal error") -> None:
    """End this process at once, without clean-up that could hang; it is started again.

    For a broken engine: a new process is the only state known to be good, and retries of actor
    calls would go to the same broken one.
    """
    log.critical("exiting: %s", reason)
    os._exit(EXIT_FATAL)


def thread_settings(n_threads: int) -> dict[str, str]:
    """Environment that bounds the CPU threads of numerical libraries; 0 takes all cores.

    They read it when they are imported, so an actor sets it before it builds its service.
    """
    n = str(n_threads or os.cpu_count() or 1)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, n)


def builder(name: str) -> Any:
    """The function behind `module:function`. Raises ConfigError if there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"part builder {name!r} cannot be imported: {exc}") from exc
