"""Trained bookmarks in a safetensors file; its metadata say for which model and page size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.errors import ConfigError
from .bookmarks import Bookmarks, BookmarkShape


def save_bookmarks(path: Path, bookmarks: Bookmarks, card: dict[str, str] | None = None) -> None:
    """card: what else is known of them, kept beside the shape."""
    tensors = {name: x.detach().half().contiguous() for name, x in bookmarks.state_dict().items()}
    metadata = {**(card or {}), "shape": json.dumps(asdict(bookmarks.shape))}
    save_file(tensors, path, metadata=metadata)


def load_bookmarks(path: Path) -> Bookmarks:
    """Raises ConfigError for a file that is damaged, or holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            shape = BookmarkShape(**json.loads((file.metadata() or {})["shape"]))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        bookmarks = Bookmarks(shape)
        bookmarks.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise ConfigError(
            f"retriever.weights: {path} holds no bookmarks of `longreach train-retriever`: {exc}",
            path="retriever.weights",
        ) from exc
    if not all(bool(x.isfinite().all()) for x in tensors.values()):
        raise ConfigError(
            f"retriever.weights: {path} holds numbers that are not finite",
            path="retriever.weights",
        )
    return bookmarks.requires_grad_(False)
