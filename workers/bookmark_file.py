"""Trained bookmarks as a file: safetensors, with a card that says for which model and how well they do.

The weights are kept in float16, so what is loaded has been rounded once. The card's fingerprint is of
the rounded numbers: it finds damage, and names the summaries that the weights make.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import ConfigError
from .bookmark_source import CARD, weights_file
from .bookmarks import Bookmarks, BookmarkShape
from .model_source import head_dim_of, load_model_config
from .tensor_file import save_tensors

FORMAT = 2
"""2: pages rank by their distance too (`nearness`)."""


class Card(BaseModel):
    """What is known of trained bookmarks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    page_tokens: int
    rank: int | None
    model: str
    """The model's name, for people."""
    model_fingerprint: str
    """Of its weights, as `weights_fingerprint` gives it."""
    fingerprint: str
    """Of these bookmarks, hexadecimal."""
    training: dict[str, Any] = {}
    """Plan, data and licences."""
    recall: dict[str, float] = {}
    """On held-out contexts, as `train_retriever.evaluate` names it."""

    @property
    def shape(self) -> BookmarkShape:
        fields = BookmarkShape.__dataclass_fields__
        return BookmarkShape(**{name: getattr(self, name) for name in fields})


def shape_for(config: Any, page_tokens: int = 128, rank: int | None = 32) -> BookmarkShape:
    """The bookmarks of a model, of which config is transformers' configuration."""
    return BookmarkShape(
        n_layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        n_heads=int(config.num_attention_heads),
        n_kv_heads=int(config.num_key_value_heads),
        head_dim=head_dim_of(config),
        page_tokens=page_tokens,
        rank=rank,
    )


def fingerprint(bookmarks: Bookmarks) -> bytes:
    """32 bytes over the shape and every number, as a file would hold them."""
    digest = hashlib.sha256(repr(bookmarks.shape).encode())
    for name, tensor in sorted(_rounded(bookmarks).items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.digest()


def _rounded(bookmarks: Bookmarks) -> dict[str, Tensor]:
    named = bookmarks.state_dict().items()
    return {name: tensor.detach().cpu().half().contiguous() for name, tensor in named}


def weights_fingerprint(directory: Path) -> str:
    """Of a model's tensors: their names, shapes and bytes, whatever files they lie in. What else stands in
    its folder, such as the version of the library that wrote it, does not count."""
    paths = sorted(directory.glob("*.safetensors"))
    return _of_tensors(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths))


@functools.lru_cache(maxsize=8)
def _of_tensors(files: tuple[tuple[str, int, int], ...]) -> str:
    found = []
    for path, _, _ in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                digest = xxhash.xxh3_128(tensor.contiguous().view(torch.uint8).numpy())
                found.append(f"{name} {list(tensor.shape)} {tensor.dtype} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:32]


# --- writing and reading --------------------------------------------------------------------------


def save_bookmarks(
    path: Path,
    bookmarks: Bookmarks,
    *,
    model: str,
    model_fingerprint: str,
    training: dict[str, Any],
    recall: dict[str, float],
) -> Card:
    """Write the weights in float16 with their card; the file is replaced at once."""
    card = Card(
        **{name: getattr(bookmarks.shape, name) for name in BookmarkShape.__dataclass_fields__},
        model=model,
        model_fingerprint=model_fingerprint,
        fingerprint=fingerprint(bookmarks).hex(),
        training=training,
        recall=recall,
    )
    save_tensors(path, _rounded(bookmarks), {CARD: card.model_dump_json()})
    return card


def load_bookmarks(path: Path | str, model_directory: Path) -> Bookmarks:
    """The bookmarks in a file, checked against the model that will run them.

    path: a file, or "embedded". Raises ConfigError for a file that is missing, damaged or no file of
    bookmarks, and for one made for another model.
    """
    file = weights_file(path)
    card, tensors = _read(file)
    _check_model(file, card, model_directory)
    bookmarks = Bookmarks(card.shape)
    _check_names(file, tensors, bookmarks.state_dict())
    bookmarks.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if fingerprint(bookmarks).hex() != card.fingerprint:
        raise _refused(file, "damaged: the numbers are not those of its card")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _refused(file, "holds numbers that are not finite")
    return bookmarks.requires_grad_(False)


def _check_model(file: Path, card: Card, directory: Path) -> None:
    wanted = shape_for(load_model_config(directory), card.page_tokens, card.rank)
    if card.shape != wanted:
        raise _refused(
            file,
            f"made for {card.model} with {_said(card.shape)}; this model has {_said(wanted)}. "
            "Train some for it: longreach train-retriever",
        )
    found = weights_fingerprint(directory)
    if card.model_fingerprint != found:
        raise _refused(
            file,
            f"made for {card.model} with weights {card.model_fingerprint[:12]}, this "
            f"model's are {found[:12]}. Train some for it: longreach train-retriever",
        )


def _refused(file: Path, why: str) -> ConfigError:
    return ConfigError(f"retriever.weights: {file}: {why}", path="retriever.weights")


def read_card(path: Path | str) -> Card:
    """The card alone. Raises ConfigError as `load_bookmarks` does for the file itself."""
    return _read(weights_file(path))[0]


def _read(path: Path) -> tuple[Card, dict[str, Tensor]]:
    if not path.is_file():
        raise _refused(path, "no such file; make one with longreach train-retriever")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(CARD)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise _refused(path, f"damaged, or no safetensors: {exc}") from exc
    if about is None:
        raise _refused(path, "a safetensors file, but not of bookmarks")
    try:
        raw = json.loads(about)
        found = raw.get("format")
        card = Card.model_validate(raw) if found == FORMAT else None
    except (ValidationError, ValueError, AttributeError) as exc:
        raise _refused(path, f"its card cannot be read: {exc}") from exc
    if card is None:
        raise _refused(path, f"format {found}, this longreach reads {FORMAT}")
    return card, tensors


def _check_names(path: Path, found: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if shapes != expected:
        wrong = sorted(_differing(shapes.items(), expected.items()))
        raise _refused(path, f"damaged: tensors {', '.join(wrong)} are missing or of other shapes")


def _differing(a: Iterable[tuple[str, Any]], b: Iterable[tuple[str, Any]]) -> set[str]:
    return {name for name, _ in set(a) ^ set(b)}


def _said(shape: BookmarkShape) -> str:
    return (
        f"{shape.n_layers} layers, hidden {shape.hidden}, {shape.n_heads} query and "
        f"{shape.n_kv_heads} KV heads of {shape.head_dim}"
    )
