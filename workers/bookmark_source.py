"""Which trained bookmarks a configuration asks for. Their name is read without loading torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..core.config import Config
from ..core.errors import ConfigError

if TYPE_CHECKING:
    from .bookmarks import Bookmarks

EMBEDDED = "embedded"
"""Name of the weights that are shipped for the embedded model."""
SHIPPED = Path(__file__).parent / "data" / "bookmarks-smollm2-135m.safetensors"
CARD = "longreach_bookmarks"
"""Of a file's metadata; see `bookmark_file`."""


def weights_file(name: Path | str) -> Path:
    """The file that a path, or EMBEDDED, stands for."""
    return SHIPPED if str(name) == EMBEDDED else Path(name).expanduser()


def weights_path(config: Config) -> Path:
    """The file of `retriever.weights`. Raises ConfigError if there is none."""
    name = config.retriever.weights
    if name == EMBEDDED and config.model.name != "embedded":
        raise ConfigError(
            "retriever.weights: embedded are those of model.name: embedded, not of "
            f"{config.model.name!r}; train some with `longreach train-retriever`",
            path="retriever.weights",
        )
    path = weights_file(name or "")
    if not path.is_file():
        raise ConfigError(
            f"retriever.weights: {path} is no file; make one with `longreach train-retriever`",
            path="retriever.weights",
        )
    return path


def retriever_fingerprint(config: Config) -> str:
    """Of the configured bookmarks, hexadecimal: the name of what they make."""
    path = weights_path(config)
    try:
        with safe_open(path, framework="np") as file:
            return str(json.loads(file.metadata()[CARD])["fingerprint"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"retriever.weights: {path} holds no bookmarks of `longreach train-retriever`: {exc}",
            path="retriever.weights",
        ) from exc


def bookmarks_of(config: Config) -> Bookmarks | None:
    """None where no stage is scored by bookmarks. Raises ConfigError for weights of another model or page
    size, or a damaged file."""
    if not config.attention.by_bookmark:
        return None
    # not above: the gateway names pages and loads no torch
    from .bookmark_file import load_bookmarks
    from .model_source import model_dir

    bookmarks = load_bookmarks(weights_path(config), model_dir(config.model))
    page_tokens = bookmarks.shape.page_tokens
    if page_tokens != config.cache.page_tokens:
        raise ConfigError(
            f"retriever.weights are for pages of {page_tokens} tokens, cache.page_tokens is "
            f"{config.cache.page_tokens}: they must be equal",
            path="cache.page_tokens",
        )
    return bookmarks
