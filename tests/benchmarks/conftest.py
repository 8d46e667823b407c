"""What the tests of the benchmarks share: the modules' home on the path, and a model of no cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longreach.workers.embedded import ensure_embedded_model

from ..workers.trained import copy_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random layers under the embedded model's tokenizer: the whole path at no cost."""
    from transformers import AutoConfig, AutoModelForCausalLM

    embedded, directory = ensure_embedded_model(), tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(embedded)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 4, 64, 64
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    config.layer_types = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    copy_tokenizer(directory)
    return directory
