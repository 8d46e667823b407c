from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.core.config import load_config
from longreach.core.errors import UnsupportedModel
from longreach.workers.model import ModelAdapter, RowLinear, RowNorm, replace_norms
from longreach.workers.model_source import model_dir, model_geometry, recipe_for

from .tiny import make_tiny, tiny_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source-llama"))


def changed(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of a model directory with other configuration fields."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"model_type": "mistral", "sliding_window": 128}, "sliding-window"),
        ({"model_type": "gemma2"}, "'gemma2' is not supported"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "8 query heads over 3 KV heads"),
        ({"head_dim": 15}, "even rotary dimension"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "longrope",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial rotary",
        ),
    ],
)
def test_a_feature_we_do_not_compute_is_refused_by_name(
    llama: Path, tmp_path: Path, fields: dict[str, Any], feature: str
) -> None:
    directory = changed(llama, tmp_path / "changed", **fields)
    with pytest.raises(UnsupportedModel, match=feature):
        model_geometry(tiny_config(directory))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/place", "not an existing path"),
        ("no-such/model", "neither a local path nor"),
        ("/no/such/model.gguf", "does not exist"),
        ("not a hub id!!", "unknown model"),
    ],
)
def test_an_unknown_model_is_refused(name: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedModel, match=message):
        model_dir(load_config([], [f"model.name={json.dumps(name)}"]).model)


def test_pickle_checkpoints_are_not_loaded(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="pickle"):
        model_dir(tiny_config(tmp_path).model)


def test_geometry_is_read_from_the_configuration(llama: Path) -> None:
    geometry = model_geometry(tiny_config(llama, "cache.page_tokens=32", "cache.kv_dtype=float16"))
    assert (geometry.n_layers, geometry.n_kv_heads, geometry.head_dim) == (3, 2, 16)
    assert geometry.leaf_nbytes == 2 * 32 * 16 * 2
    assert geometry.page_nbytes == 6 * geometry.leaf_nbytes


def test_the_recipe_changes_with_everything_that_shapes_kv(llama: Path, tmp_path: Path) -> None:
    base = recipe_for(tiny_config(llama)).fingerprint()
    assert recipe_for(tiny_config(llama)).fingerprint() == base
    other_weights = tmp_path / "weights"
    changed(llama, other_weights)
    data = bytearray((other_weights / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other_weights / "model.safetensors").write_bytes(data)
    different = [
        recipe_for(tiny_config(other_weights)),
        recipe_for(tiny_config(llama, "cache.page_tokens=32")),
        recipe_for(tiny_config(llama, "cache.kv_dtype=float16")),
        recipe_for(tiny_config(llama), tenant="someone"),
        recipe_for(
            tiny_config(
                changed(
                    llama,
                    tmp_path / "rope",
                    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
                )
            )
        ),
        recipe_for(tiny_config(llama, "attention.policies.0.sink=64")),
    ]
    assert len({base, *(r.fingerprint() for r in different)}) == 7


def test_refresh_intervals_do_not_rename_pages(llama: Path) -> None:
    """Prefill never caches masks, so presets that differ in refresh alone share their pages."""
    names = ("infinitehip-3k", "infinitehip-3k-fast", "infinitehip-3k-flash")
    root = Path(__file__).resolve().parents[2] / "configs"
    prints = {
        recipe_for(tiny_config(llama, files=[str(root / f"{name}.yaml")])).fingerprint()
        for name in names
    }
    assert len(prints) == 1


def test_linear_layers_give_a_row_the_same_bits_in_any_company(llama: Path) -> None:
    mode = {"decode": True}
    layer = RowLinear([torch.nn.Linear(96, 160), torch.nn.Linear(96, 32, bias=False)], mode)
    x = torch.randn(64, 96)
    for decode in (True, False):
        mode["decode"] = decode
        whole = layer(x)
        for n_rows in range(1, 20):
            assert torch.equal(layer(x[:n_rows]), whole[:n_rows]), (decode, n_rows)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_norm_is_one_operation_with_the_models_own_bits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_tiny(family, tmp_path)
    theirs = dict(AutoModelForCausalLM.from_pretrained(directory).named_modules())
    norms = {n: m for n, m in theirs.items() if type(m).__name__.endswith("RMSNorm")}
    ours = dict(ModelAdapter(directory)._model.named_modules())
    assert norms
    for name, norm in norms.items():
        assert type(ours[name]) is RowNorm, name
        x = torch.randn(5, norm.weight.numel())
        assert torch.equal(ours[name](x), norm(x))


def test_a_norm_that_computes_something_else_stays() -> None:
    class OffByOne(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(8))
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)

    model = torch.nn.Sequential(OffByOne())
    replace_norms(model)
    assert type(model[0]) is OffByOne


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_every_supported_rope_kind_equals_dense(tmp_path: Path, rope: dict[str, Any]) -> None:
    from .tiny import answers, hf_greedy, make_engine, prompts_of

    directory = make_tiny("llama", tmp_path, rope_parameters=rope)
    prompts = prompts_of(300, 130)
    engine = make_engine(tiny_config(directory))
    assert answers(engine, prompts, 12) == hf_greedy(directory, prompts, 12)


def test_the_rope_scaling_factor_reaches_the_kernels(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    adapter = ModelAdapter(make_tiny("llama", tmp_path, rope_parameters=rope))
    cos, _ = adapter.rope.cos_sin(torch.zeros(1, dtype=torch.int64))
    assert float(cos[0, 0]) > 1.1
