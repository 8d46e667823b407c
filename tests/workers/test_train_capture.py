"""What is captured of a dense forward is what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.errors import ContextTooLong
from longreach.kernels.ops import Rope
from longreach.workers.model import ModelAdapter
from longreach.workers.train_capture import CELL, CaptureFolder
from longreach.workers.train_prompt import Ask, Stream

from .tiny import VOCAB, make_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


def stream_of(n_tokens: int, seed: int = 0) -> Stream:
    ids = np.random.default_rng(seed).integers(0, VOCAB, n_tokens)
    return Stream("a stream", ids, (Ask(40, ((3, 9), (20, 21))), Ask(n_tokens - 1, ())))


def rope_of(plain: Any) -> Rope:
    return Rope(plain.model.rotary_emb.inv_freq)


def test_mass_and_keys_are_those_of_transformers(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = CaptureFolder(tmp_path, "tiny", lambda: ModelAdapter(directory, own_kernels=False))
    stream = stream_of(300)
    found = folder.get(stream, lambda _: None, full=True)
    n = 300 // CELL
    assert found.n_tokens == n * CELL
    assert found.asks == (Ask(40, ((3, 9), (20, 21))),)  # the other lies behind the cut

    plain = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        made = plain(found.token_ids[None], output_attentions=True, output_hidden_states=True)
    shares = torch.cat(made.attentions)  # [L, H, T, T]
    cells = shares.view(*shares.shape[:2], n, CELL, n, CELL).sum(dim=(3, 5))
    torch.testing.assert_close(found.head_mass().float(), cells, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.mass(), cells.sum(dim=1), rtol=2e-3, atol=2e-3)
    for i, layer in enumerate(plain.model.layers):
        with torch.no_grad():
            normed = layer.input_layernorm(made.hidden_states[i][0])
            heads = [
                getattr(layer.self_attn, f"{side}_proj")(normed).unflatten(-1, (-1, 16))
                for side in "qkv"
            ]
        q, k, v = (head.transpose(0, 1) for head in heads)
        rotated = rope_of(plain).rotate(k, torch.arange(n * CELL))
        stored = (found.queries()[i], found.keys()[i], *found.rotated_keys_values()[i])
        for kept, wanted in zip(stored, (q, k, rotated, v), strict=True):
            torch.testing.assert_close(kept.float(), wanted, rtol=2e-3, atol=2e-3)


def test_a_context_is_read_once(directory: Path, tmp_path: Path) -> None:
    loaded = []

    def load() -> ModelAdapter:
        loaded.append(1)
        return ModelAdapter(directory, own_kernels=False)

    folder = CaptureFolder(tmp_path, "tiny", load)
    said: list[str] = []
    first = folder.get(stream_of(64), said.append)
    assert CaptureFolder(tmp_path, "tiny", load).get(stream_of(64), said.append).path == first.path
    assert len(said) == len(loaded) == 1
    assert folder.get(stream_of(64, seed=1), said.append).path != first.path
    assert CaptureFolder(tmp_path, "other", load).get(stream_of(64), said.append).path != first.path
    assert not list(tmp_path.glob("*.part"))


def test_a_context_beyond_the_window_is_refused(directory: Path, tmp_path: Path) -> None:
    folder = CaptureFolder(tmp_path, "tiny", lambda: ModelAdapter(directory, own_kernels=False))
    with pytest.raises(ContextTooLong, match=r"528 tokens, more than the model's window of 512"):
        folder.get(stream_of(540), lambda _: None)
