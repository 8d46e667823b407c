"""Which model, before any weight is loaded: directory, refusals, page geometry, recipe."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import xxhash

from ..core.config import Config, ModelConfig
from ..core.errors import ConfigError, UnsupportedModel
from ..core.page_key import Recipe
from ..core.stage import LayerPolicy, policies_fingerprint, resolve_policies
from ..kvstore.page import PageGeometry
from .bookmark_source import retriever_fingerprint
from .embedded import cache_dir, convert_gguf, ensure_embedded_model, sha256_of

_log = logging.getLogger(__name__)
FAST_HEAD_DIM = 16
"""Our CPU kernels take heads of a multiple of this; torch computes others."""
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def model_dir(model: ModelConfig) -> Path:
    """A local directory with config.json and safetensors for `model.name`.

    Raises UnsupportedModel when it names nothing that can be found or read.
    """
    if model.name == "embedded":
        return ensure_embedded_model()
    path = Path(model.name).expanduser()
    if path.suffix == ".gguf":
        return _converted_gguf(path)
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModel(f"model directory {path} has no config.json")
        if not list(path.glob("*.safetensors")):
            raise UnsupportedModel(
                f"model directory {path} has no *.safetensors; pickle checkpoints are not loaded"
            )
        return path
    return _hub_snapshot(model)


def _converted_gguf(path: Path) -> Path:
    if not path.is_file():
        raise UnsupportedModel(f"model file {path} does not exist")
    target = cache_dir() / f"{path.stem}-{sha256_of(path)[:12]}"
    if not (target / "config.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        convert_gguf(path, target)
    return target


def _hub_snapshot(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except HFValidationError as exc:
        raise UnsupportedModel(
            f"unknown model {model.name!r}: not 'embedded', not an existing path, not a hub id"
        ) from exc
    except Exception as exc:
        raise UnsupportedModel(
            f"model {model.name!r} is neither a local path nor reachable on the hub "
            f"({type(exc).__name__}); give a local directory"
        ) from exc


def load_model_config(directory: Path) -> Any:
    """The transformers configuration, checked. Raises UnsupportedModel naming the feature."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as exc:
        raise UnsupportedModel(f"{directory}: config.json cannot be read: {exc}") from exc
    refuse_unsupported(config)
    return config


def refuse_unsupported(config: Any) -> None:
    """Silent wrong answers are worse than no answer: refuse every feature we do not compute."""

    def refuse(feature: str) -> None:
        raise UnsupportedModel(
            f"model type {config.model_type!r}: {feature} is not supported by longreach"
        )

    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModel(
            f"model type {config.model_type!r} is not supported; supported: "
            + ", ".join(SUPPORTED_MODEL_TYPES)
        )
    window = getattr(config, "sliding_window", None)
    uses_window = getattr(config, "use_sliding_window", window is not None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if (window is not None and uses_window) or layer_types - {"full_attention"}:
        refuse(f"sliding-window attention (sliding_window={window})")
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, field, None):
            refuse(f"logit soft-capping ({field})")
    for field in ("kv_lora_rank", "q_lora_rank"):
        if getattr(config, field, None):
            refuse(f"multi-head latent attention ({field})")
    rope = rope_parameters(config)
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        refuse(f"partial rotary embedding ({rope['partial_rotary_factor']})")
    if rope["rope_type"] not in SUPPORTED_ROPE_TYPES:
        refuse(
            f"RoPE type {rope['rope_type']!r} (supported: {', '.join(SUPPORTED_ROPE_TYPES)}; the "
            "others make frequencies depend on the sequence)"
        )
    n_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    if n_heads % n_kv_heads:
        refuse(f"a head group of {n_heads} query heads over {n_kv_heads} KV heads")
    head_dim = head_dim_of(config)
    if head_dim % FAST_HEAD_DIM:
        _log.warning(
            "heads of %d dimensions are computed without our kernels, which is slower: they take "
            "multiples of %d",
            head_dim,
            FAST_HEAD_DIM,
        )
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        refuse("mixture of experts")


def rope_parameters(config: Any) -> dict[str, Any]:
    """RoPE kind and numbers as a plain dict with `rope_type` always present."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    factor = getattr(config, "partial_rotary_factor", None)
    if factor is not None:
        rope.setdefault("partial_rotary_factor", factor)
    return rope


def head_dim_of(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def policies_of(config: Config, n_layers: int) -> tuple[LayerPolicy, ...]:
    """One policy per layer; raises ConfigError with the path."""
    try:
        return resolve_policies(config.attention.policies, n_layers)
    except ValueError as exc:
        raise ConfigError(f"attention.policies: {exc}") from exc


def model_geometry(config: Config) -> PageGeometry:
    """Page geometry of the configured model; reads config.json only."""
    hf = load_model_config(model_dir(config.model))
    return PageGeometry(
        n_layers=hf.num_hidden_layers,
        n_kv_heads=hf.num_key_value_heads,
        page_tokens=config.cache.page_tokens,
        head_dim=head_dim_of(hf),
        kv_dtype=config.cache.kv_dtype,
    )


@functools.lru_cache(maxsize=8)
def _hash_files(paths: tuple[tuple[str, int, int], ...]) -> str:
    digest = xxhash.xxh3_128()
    for path, _, _ in paths:
        digest.update(Path(path).name.encode())
        with open(path, "rb") as file:
            while block := file.read(16 << 20):
                digest.update(block)
    return digest.hexdigest()


def _stamped(paths: list[Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths))


def _retriever_fingerprint(config: Config) -> str:
    """Of the bookmarks by which prefill selects; empty where it does not, so that decode's choice of
    bookmarks leaves pages their names."""
    if not any(policy.in_prefill.by_bookmark for policy in config.attention.policies):
        return ""
    return retriever_fingerprint(config)


def recipe_for(config: Config, tenant: str = "") -> Recipe:
    """Everything that shapes KV bytes; reads the weight files once per process to name them."""
    directory = model_dir(config.model)
    hf = load_model_config(directory)
    geometry = model_geometry(config)
    weights = _hash_files(_stamped([*directory.glob("*.safetensors"), directory / "config.json"]))
    tokenizer = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    rope = json.dumps(rope_parameters(hf), sort_keys=True, default=str)
    return Recipe(
        model_fingerprint=weights,
        tokenizer_fingerprint=_hash_files(_stamped(tokenizer)),
        kv_dtype=geometry.kv_dtype,
        n_layers=geometry.n_layers,
        n_kv_heads=geometry.n_kv_heads,
        head_dim=geometry.head_dim,
        page_tokens=geometry.page_tokens,
        attention_fingerprint=policies_fingerprint(policies_of(config, geometry.n_layers)),
        retriever_fingerprint=_retriever_fingerprint(config),
        rope_fingerprint=hashlib.sha256(rope.encode()).hexdigest(),
        device_class=config.model.device,
        tenant=tenant,
    )
