"""Decode runs block kernels where the model is what they compute, and its own modules everywhere else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.workers import decoder_blocks
from longreach.workers.model import ModelAdapter

from .tiny import KINDS, VOCAB, make_tiny


class Mixing:
    """Attention of the rows of a step over each other, so that q, k, v and scale all matter."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
        return ((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1).contiguous()


class Alone:
    """Attention of each row to itself alone, whatever is beside it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        v = v + k * scale
        return (q + v.repeat_interleave(len(q) // len(v), dim=0)).transpose(0, 1).contiguous()


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == decoder_blocks.__name__]


def by_modules(model: ModelAdapter, tokens: Tensor, step: Any) -> Tensor:
    return model._by_modules(tokens, step, True)


# biases and odd sizes, where a family has them
CHANGES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 72, "intermediate_size": 101, "num_attention_heads": 6}),
    ("qwen3", {"attention_bias": True, "head_dim": 32, "num_key_value_heads": 1}),
    ("mistral", {"num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("kind", "changes"), CHANGES, ids=str)
def test_blocks_compute_what_the_modules_compute(
    kind: str, changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelAdapter(make_random(kind, tmp_path, **changes))
    assert model._blocks is not None
    assert not refusals(caplog)
    for n_rows in (1, 2, 5, 8, 11):
        tokens = torch.arange(n_rows) * 37 % VOCAB
        got = model.logits(model.hidden(tokens, Mixing(), decode=True))
        want = model.logits(by_modules(model, tokens, Mixing()))
        assert float((got - want).abs().max()) < 1e-5 * float(want.std())


def make_random(kind: str, directory: Path, **changes: Any) -> Path:
    """`make_tiny`, with biases and norms that are not the zeros and ones of a fresh model."""
    from transformers import AutoModelForCausalLM

    make_tiny(kind, directory, **changes)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(directory)
    return directory


def test_a_row_has_the_same_bits_in_any_company(tmp_path: Path) -> None:
    model = ModelAdapter(make_tiny("qwen3", tmp_path))
    tokens = torch.arange(9) * 50
    whole = model.hidden(tokens, Alone(), decode=True)
    for n_rows in range(1, 9):
        for first in (0, 9 - n_rows):
            part = tokens[first : first + n_rows]
            got = model.hidden(part, Alone(), decode=True)
            assert torch.equal(got, whole[first : first + n_rows])


def test_a_result_outlives_the_next_step(tmp_path: Path) -> None:
    model = ModelAdapter(make_tiny("llama", tmp_path))
    first = model.hidden(torch.tensor([3, 4]), Alone(), decode=True)
    kept = first.clone()
    model.hidden(torch.tensor([5, 6]), Alone(), decode=True)
    assert torch.equal(first, kept)


def test_prefill_stays_with_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelAdapter(make_tiny("llama", tmp_path))
    monkeypatch.setattr(model, "_blocks", None)
    tokens = torch.arange(20)
    want = model.hidden(tokens, Alone(), decode=False)
    monkeypatch.undo()
    assert torch.equal(model.hidden(tokens, Alone(), decode=False), want)


def scaled(forward: Any) -> Any:
    """As models of other families scale what a part returns."""
    return lambda self, *args, **kwargs: 1.01 * forward(self, *args, **kwargs)


def scaled_result(forward: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.last_hidden_state *= 1.01
        return out

    return wrapped


def scaled_once(forward: Any) -> Any:
    """In the last layer alone."""
    calls = itertools.count(1)
    return lambda self, x: forward(self, x) * (1.01 if next(calls) % 3 == 0 else 1.0)


def attending_with_another_scale(forward: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.scaling
        self.scaling = 2 * before
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.scaling = before

    return wrapped


def with_a_parameter(init: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.gain = torch.nn.Parameter(torch.ones(1))

    return wrapped


def with_a_module(init: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.extra = torch.nn.Dropout()

    return wrapped


def assert_modules_decode(model: ModelAdapter, caplog: Any, reason: str) -> None:
    assert model._blocks is None
    (line,) = refusals(caplog)
    assert reason in line
    tokens = torch.arange(3)
    got = model.hidden(tokens, Mixing(), decode=True)
    assert torch.equal(got, by_modules(model, tokens, Mixing()))


STRANGERS = [
    ("LlamaMLP", "forward", scaled, "q of layer 1 is off by"),
    ("LlamaMLP", "forward", scaled_once, "the result is off by"),
    ("LlamaModel", "forward", scaled_result, "the result is off by"),
    ("LlamaAttention", "forward", attending_with_another_scale, "another scale"),
    ("LlamaRMSNorm", "forward", scaled, "not a RowNorm"),
    ("LlamaMLP", "__init__", with_a_parameter, "no product or norm owns: ['mlp.gain']"),
    ("LlamaAttention", "__init__", with_a_module, "['self_attn.extra'] too many"),
    ("LlamaDecoderLayer", "__init__", with_a_module, "['extra'] too many"),
    ("LlamaModel", "__init__", with_a_module, "['extra'] too many"),
]


@pytest.mark.parametrize(
    ("name", "method", "change", "reason"), STRANGERS, ids=[f"{s[0]}-{s[2].__name__}" for s in STRANGERS]
)  # fmt: skip
def test_a_model_with_anything_unknown_stays_with_its_modules(
    name: str,
    method: str,
    change: Any,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers.models.llama import modeling_llama

    directory = make_tiny("llama", tmp_path)
    kind = getattr(modeling_llama, name)
    monkeypatch.setattr(kind, method, change(getattr(kind, method)))
    assert_modules_decode(ModelAdapter(directory), caplog, reason)


def test_another_activation_stays_with_the_modules(tmp_path: Path, caplog: Any) -> None:
    directory = make_tiny("llama", tmp_path, hidden_act="gelu")
    assert_modules_decode(ModelAdapter(directory), caplog, "is not SiLU")


def test_without_numba_the_modules_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(decoder_blocks, "has_block_kernel", lambda: False)
    assert_modules_decode(ModelAdapter(make_tiny("llama", tmp_path)), caplog, "numba is missing")
