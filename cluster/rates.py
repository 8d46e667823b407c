"""How fast this machine would run a model: an estimate for `plan`, from arithmetic and one probe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from ..core.config import Config
from ..core.stage import LayerPolicy
from .plan import Rates

PREFILL_EFFICIENCY = 0.35
"""Share of a large matrix product's speed that prefill reaches, selection and attention included."""
DECODE_BYTES_SHARE = 0.25
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
    flops_per_s, bytes_per_s = _probe(config.model.n_threads or os.cpu_count() or 1)
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
    for policy in (p.in_prefill for p in policies):
        seen = n_context_tokens // 2  # on average half of the context lies before a token
        if not policy.dense:
            seen = min(seen, policy.sink + policy.window + policy.stages[-1].keep)
        n_keys += seen
    return int(4 * n_keys * model.num_attention_heads * head_dim)


def _probe(n_cores: int) -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s read from memory) of this many cores."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.rand(_PROBE_SIZE, _PROBE_SIZE)
        block = torch.rand(1 << 24)  # 64 MiB: larger than caches
        flops_per_s = 2 * _PROBE_SIZE**3 / _fastest_s(lambda: torch.mm(a, a))
        bytes_per_s = block.nbytes / _fastest_s(lambda: block.sum())
    finally:
        torch.set_num_threads(n_threads)
    return n_cores * flops_per_s, n_cores * bytes_per_s


def _fastest_s(action: Callable[[], object]) -> float:
    """CPU seconds of the fastest of many runs of one thread: other work on the machine makes runs
    slower only, and does not count while it has the core."""
    fastest, end = float("inf"), time.perf_counter() + _PROBE_S
    while time.perf_counter() < end or fastest == float("inf"):
        started = time.thread_time()
        action()
        fastest = min(fastest, time.thread_time() - started)
    return fastest
