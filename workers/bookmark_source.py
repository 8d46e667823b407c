"""Which trained bookmarks a configuration asks for. Loads no torch until they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.config import Config
from ..core.errors import ConfigError

if TYPE_CHECKING:
    from .bookmarks import Bookmarks

SHIPPED = Path(__file__).parent / "data" / "bookmarks-smollm2-135m.safetensors"
"""Those of the embedded model."""


def weights_path(config: Config) -> Path:
    """The file of `retriever.weights`. Raises ConfigError if there is none."""
    name = config.retriever.weights
    if name == "embedded" and config.model.name != "embedded":
        raise ConfigError(
            f"retriever.weights: embedded are those of model.name: embedded, not of "
            f"{config.model.name!r}; train some with `longreach train-retriever`",
            path="retriever.weights",
        )
    path = SHIPPED if name == "embedded" else Path(name or "").expanduser()
    if not path.is_file():
        raise ConfigError(
            f"retriever.weights: {path} is no file; make one with `longreach train-retriever`",
            path="retriever.weights",
        )
    return path


def weights_fingerprint(config: Config) -> str:
    """Hash of the file, hex: the name of what these bookmarks make."""
    return hashlib.sha256(weights_path(config).read_bytes()).hexdigest()


def bookmarks_of(config: Config) -> Bookmarks | None:
    """None where no stage is scored by bookmarks. Raises ConfigError for a file that is no such weights."""
    if not config.attention.by_bookmark:
        return None
    from .bookmark_file import load_bookmarks

    return load_bookmarks(weights_path(config))
