"""What the tests of training share: tiny models that read text, texts, bookmark files, a run that stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from longreach.workers.bookmark_file import save_bookmarks, weights_fingerprint
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.embedded import ensure_embedded_model
from longreach.workers.training_run import Progress

from .tiny import make_tiny


def copy_tokenizer(directory: Path) -> None:
    """The embedded model's."""
    for path in ensure_embedded_model().iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(path, directory)


def make_tiny_reader(directory: Path, **changes: Any) -> Path:
    """A tiny Llama with the embedded model's tokenizer."""
    embedded = ensure_embedded_model()
    vocab = int(json.loads((embedded / "config.json").read_text())["vocab_size"])
    made = make_tiny("llama", directory, vocab_size=vocab, **changes)
    copy_tokenizer(made)
    return made


def save_for(
    path: Path, bookmarks: Bookmarks, model: Path, recall: dict[str, float] | None = None
) -> Path:
    """A file of bookmarks that were trained for a model."""
    name = weights_fingerprint(model)
    save_bookmarks(
        path, bookmarks, model="tiny", model_fingerprint=name, training={}, recall=recall or {}
    )
    return path


def river_texts(folder: Path) -> Path:
    folder.mkdir()
    for i in range(30):
        lines = [f"In year {1000 * i + n} the river ran past mill {n * i}." for n in range(60)]
        (folder / f"{i}.txt").write_text(" ".join(lines))
    return folder


class Stop(Exception):
    pass


class StopAfter(Progress):
    def __init__(self, step: int) -> None:
        super().__init__()
        self._last = step

    def stepped(self, step: int, row: dict[str, float]) -> None:
        if step == self._last:
            raise Stop
