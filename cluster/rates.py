"""How fast this machine would run a model: an estimate for `plan`, from arithmetic and one probe."""

from __future__ import annotations

import time
from typing import Any

from ..core.config import Config
from ..core.stage import LayerPolicy
from .plan import Rates

PREFILL_EFFICIENCY = 0.35
"""Share of a large matrix product's speed that prefill reaches, selection and attention included."""
DECODE_BYTES_SHARE = 0.35
"""Share of memory bandwidth that a decode step reaches, selection and attention included."""
_PROBE_S = 0.3
_PROBE_SIZE = 1024


def estimate_rates(config: Config, n_context_tokens: int) -> Rates:
    """Tokens per second of one worker on this machine for contexts of this length.

    Within a factor of about two: it measures the machine for a fraction of a second and assumes
    that the worker would have it to itself.
    """
    from ..workers.model_source import load_model_config, model_dir, policies_of

    model = load_model_config(model_dir(config.model))
    policies = policies_of(config, model.num_hidden_layers)
    n_weights = linear_weights(model)
    flops = 2 * n_weights + attention_flops(model, policies, n_context_tokens)
    flops_per_s, bytes_per_s = _probe()
    return Rates(
        prefill_tokens_per_s=PREFILL_EFFICIENCY * flops_per_s / flops,
        decode_tokens_per_s=DECODE_BYTES_SHARE * bytes_per_s / (4 * n_weights),
    )


def linear_weights(model: Any) -> int:
    """Weights that every token passes: projections and feed-forward of all layers, and the head."""
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    attention = 2 * model.hidden_size * head_dim
    attention *= model.num_attention_heads + model.num_key_value_heads
    feed_forward = 3 * model.hidden_size * model.intermediate_size
    head = model.hidden_size * model.vocab_size
    return int(model.num_hidden_layers * (attention + feed_forward) + head)


def attention_flops(model: Any, policies: tuple[LayerPolicy, ...], n_context_tokens: int) -> int:
    """Floating-point operations of attention per prefilled token: scores and values."""
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    n_keys = 0
    for policy in policies:
        seen = n_context_tokens // 2  # on average half of the context lies before a token
        if not policy.dense:
            seen = min(seen, policy.sink + policy.window + policy.stages[-1].keep)
        n_keys += seen
    return int(4 * n_keys * model.num_attention_heads * head_dim)


def _probe() -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s read from memory) of this machine, all cores."""
    import torch

    a = torch.rand(_PROBE_SIZE, _PROBE_SIZE)
    n, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _PROBE_S:
        torch.mm(a, a)
        n += 1
    flops_per_s = n * 2 * _PROBE_SIZE**3 / elapsed
    block = torch.rand(1 << 24)  # 64 MiB: larger than caches
    n, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _PROBE_S:
        block.sum()
        n += 1
    return flops_per_s, n * block.nbytes / elapsed
