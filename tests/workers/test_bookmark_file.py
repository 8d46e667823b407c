"""Weights in a file: what is loaded is what was saved, for the model it was saved for, or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longreach.core.errors import ConfigError
from longreach.workers.bookmark_file import (
    fingerprint,
    load_bookmarks,
    read_card,
    save_bookmarks,
    shape_for,
    weights_fingerprint,
)
from longreach.workers.bookmark_source import EMBEDDED, SHIPPED
from longreach.workers.bookmarks import Bookmarks
from longreach.workers.embedded import ensure_embedded_model
from longreach.workers.model_source import load_model_config
from longreach.workers.train_data import PACKAGES

from .tiny import make_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def saved(directory: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = Bookmarks(shape_for(load_model_config(directory), page_tokens=64, rank=4))
    for parameter in made.parameters():
        parameter.data.normal_()
    path = tmp_path / "weights" / "tiny.safetensors"
    save_bookmarks(
        path,
        made,
        model="tiny",
        model_fingerprint=weights_fingerprint(directory),
        training={"steps": 3},
        recall={"recall all 0.333": 0.5},
    )
    return path


def test_what_is_loaded_was_saved(saved: Path, directory: Path) -> None:
    found = load_bookmarks(saved, directory)
    card = read_card(saved)
    assert found.shape == card.shape
    assert (found.shape.page_tokens, found.shape.rank) == (64, 4)
    assert card.recall == {"recall all 0.333": 0.5}
    assert fingerprint(found).hex() == card.fingerprint
    stored = load_file(saved)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    changed = load_bookmarks(saved, directory)
    changed.up["v"].data[0, 0, 0] += 1
    assert fingerprint(changed) != fingerprint(found)


def test_a_model_is_known_by_its_tensors(directory: Path, tmp_path: Path) -> None:
    """However they are laid out in files, and whatever wrote the configuration."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:5]}, tmp_path / "model-1.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "model-2.safetensors")
    assert weights_fingerprint(tmp_path) == weights_fingerprint(directory)
    tensors[names[7]][0] += 1
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "model-2.safetensors")
    assert weights_fingerprint(tmp_path) != weights_fingerprint(directory)


def test_weights_of_another_model(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    deeper = make_tiny("llama", tmp_path_factory.mktemp("deeper"), num_hidden_layers=4)
    with pytest.raises(ConfigError, match=r"made for tiny with 3 layers.*this model has 4 layers"):
        load_bookmarks(saved, deeper)
    other = make_tiny("mistral", tmp_path_factory.mktemp("other"))
    with pytest.raises(ConfigError, match=r"made for tiny with weights \w+, this model's are \w+"):
        load_bookmarks(saved, other)


def test_no_file_and_no_file_of_bookmarks(saved: Path, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_bookmarks(tmp_path / "none.safetensors", directory)
    with pytest.raises(ConfigError, match="but not of bookmarks"):
        load_bookmarks(directory / "model.safetensors", directory)


def test_damage_is_seen(saved: Path, directory: Path, tmp_path: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[-9] ^= 4
    flipped = tmp_path / "flipped.safetensors"
    flipped.write_bytes(raw)
    with pytest.raises(ConfigError, match="damaged: the numbers are not those of its card"):
        load_bookmarks(flipped, directory)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(raw[:-100])
    with pytest.raises(ConfigError, match="damaged, or no safetensors"):
        load_bookmarks(cut, directory)


def test_the_shipped_weights_fit_the_embedded_model() -> None:
    """Small enough to ship, with a card that says what they were made of."""
    assert SHIPPED.stat().st_size <= 8 << 20
    found, card = load_bookmarks(EMBEDDED, ensure_embedded_model()), read_card(EMBEDDED)
    assert found.shape == card.shape
    assert found.shape.page_tokens == 128
    assert sorted(card.training["text"]) == sorted(PACKAGES)
    assert card.recall["recall far 0.333"] > 0.5
