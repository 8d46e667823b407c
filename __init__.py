"""longreach: answers over contexts far larger than an accelerator's memory.

The public names are resolved lazily: importing the package imports nothing of ours, because test
runners may import this file a second time under the checkout's folder name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Client": ".cluster.client",
    "Config": ".core.config",
    "LocalRuntime": ".cluster.local_runtime",
    "LongreachError": ".core.errors",
    "load_config": ".core.config",
}

__all__ = ["Client", "Config", "LocalRuntime", "LongreachError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
