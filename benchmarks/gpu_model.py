"""A model of random weights end to end on a device: decode by context with KV on the host, prefill by
single chunks at several depths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from longreach.core.config import Config
from longreach.core.stage import LayerPolicy
from longreach.kvstore.page import PageGeometry
from longreach.workers.gpu_executor import GpuExecutor
from longreach.workers.gpu_memory import always_reachable
from longreach.workers.model import ATTENTION, ModelAdapter, register_attention

from .gpu_rows import (
    NO_RECIPE,
    add_page,
    lay_out,
    random_pool,
    random_tables,
    ready_row,
    take_numbers,
)
from .gpu_time import seconds_of

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TOY = LLAMA_8B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def random_model(fields: dict[str, Any], device: torch.device) -> ModelAdapter:
    """A Llama of these sizes whose weights are normal numbers, small enough that nothing overflows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    config = AutoConfig.for_model("llama", **fields)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return ModelAdapter(model, device, own_kernels=False)


def geometry_of(model: ModelAdapter, kv_dtype: str, page_tokens: int = 64) -> PageGeometry:
    return PageGeometry(model.n_layers, model.n_kv_heads, page_tokens, model.head_dim, kv_dtype)


def executor_of(
    model: ModelAdapter,
    policies: Sequence[LayerPolicy],
    kv_dtype: str,
    n_tokens: int,
    device_pages: int,
    device: torch.device,
    precision: str,
    *,
    graphs: bool = True,
) -> GpuExecutor:
    geometry = geometry_of(model, kv_dtype)
    base = Config()
    config = base.model_copy(
        update={
            "model": base.model.model_copy(update={"max_context_tokens": n_tokens}),
            "gateway": base.gateway.model_copy(update={"max_new_tokens": 1024}),
            "worker": base.worker.model_copy(update={"max_rows": 1}),
            "cache": base.cache.model_copy(
                update={"kv_dtype": kv_dtype, "device_pages": device_pages}
            ),
        }
    )
    return GpuExecutor(
        config,
        model,
        geometry,
        tuple(policies),
        NO_RECIPE,
        None,
        device,
        always_reachable,
        graphs=graphs,
        precision=precision,
    )


def decode_rates(
    executor: GpuExecutor,
    n_tokens: int,
    pool_bytes: int,
    device: torch.device,
    n_steps: int,
) -> dict[str, Any]:
    """Tokens per second of one row whose pages are on the host, but for copies that the device makes."""
    memory, model = executor.memory, executor.model
    page_tokens = memory.geometry.page_tokens
    row = ready_row("row", n_tokens, page_tokens, model.vocab_size)
    n_pages = len(row.page_ids)
    pool = random_pool(memory.geometry, n_pages, pool_bytes, device, host=True)
    lay_out(memory, pool, n_pages, held=False)
    random_tables(executor.layers)
    take_numbers(executor.flow, n_pages)
    laps = []
    for _ in range(n_steps):
        if row.n_done // page_tokens >= len(row.page_ids):
            row.page_ids.append(add_page(executor.flow))
        started = time.perf_counter()
        logits = executor.decode([row])
        laps.append(time.perf_counter() - started)
        row.tokens.append(int(logits[0].argmax()))
        row.n_done += 1
    # the first step selects everything, the next ones fill the bank
    steady = sorted(laps[n_steps // 4 :])
    hits, misses = memory.hits_and_misses()
    return {
        "n_tokens": n_tokens,
        "kv_dtype": memory.geometry.kv_dtype,
        "folded": pool.folded,
        "tokens_per_s": round(len(steady) / sum(steady), 2),
        "median_ms": round(1e3 * steady[len(steady) // 2], 3),
        "first_ms": round(1e3 * laps[0], 3),
        "hit_ratio": round(hits / max(1, hits + misses), 4),
    }


def prefill_chunk(
    executor: GpuExecutor, depth: int, chunk_tokens: int, pool_bytes: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of one chunk whose row has read `depth` tokens, which lie on the host."""
    memory, model = executor.memory, executor.model
    page_tokens = memory.geometry.page_tokens
    row = ready_row("row", depth + chunk_tokens, page_tokens, model.vocab_size)
    n_before = depth // page_tokens
    pool = random_pool(memory.geometry, max(1, n_before), pool_bytes, device, host=True)
    lay_out(memory, pool, n_before, held=False)
    take_numbers(executor.flow, n_before)
    random_tables(executor.layers)
    for index in range(n_before, len(row.page_ids)):
        row.page_ids.array[index] = add_page(executor.flow)
    row.n_done = depth
    seconds = seconds_of(
        lambda: executor.prefill(row, depth + chunk_tokens), device, repeats=3, graph=False
    )
    memory.forget(row.page_ids.array[n_before:])
    return {
        "depth": depth,
        "chunk_tokens": chunk_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_s": round(chunk_tokens / seconds, 1),
        "folded": pool.folded,
    }


def whole_prefill_s(chunks: Sequence[dict[str, Any]], n_tokens: int) -> float:
    """Seconds to read n_tokens by the sum of chunks, linear between the depths measured."""
    depths = [chunk["depth"] for chunk in chunks]
    per_token = [chunk["seconds"] / chunk["chunk_tokens"] for chunk in chunks]
    total, step = 0.0, chunks[0]["chunk_tokens"]
    for start in range(0, n_tokens, step):
        total += step * float(np.interp(start, depths, per_token))
    return total
