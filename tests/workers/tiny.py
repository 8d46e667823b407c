"""Tiny random models with enough attention to notice mistakes, and engines over real store services."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longreach.core.config import Config, load_config
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import serve
from longreach.workers.engine import Engine
from longreach.workers.executors import make_executor
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_geometry, policies_of, recipe_for
from longreach.workers.row import RowRequest
from longreach.workers.sampling import Sampling

KINDS = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 512
_names = itertools.count()


def make_tiny(kind: str, directory: Path, **changes: Any) -> Path:
    """A random 3-layer model saved to `directory`. Default weights hardly attend (with RoPE removed
    altogether their argmax agrees at 99 % of positions), so q and k projections are scaled by 10."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "mistral":
        fields["sliding_window"] = None
    config = AutoConfig.for_model(kind, **(fields | changes))
    torch.manual_seed(sum(map(ord, kind)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data.mul_(10)
        if "q_norm.weight" in name or "k_norm.weight" in name:
            parameter.data.mul_(3)
    model.save_pretrained(directory)
    return directory


def hf_greedy(directory: Path, prompts: Sequence[np.ndarray], n_new: int) -> list[list[int]]:
    """What transformers' own dense `generate` answers, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    out = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        full = model.generate(ids, max_new_tokens=n_new, do_sample=False)[0]
        out.append(full[len(prompt) :].tolist())
    return out


def hf_logits(directory: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Dense logits [n, vocab] at every position."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor(tokens)[None]).logits[0]


def prompts_of(*lengths: int, seed: int = 0, shared: int = 0) -> list[np.ndarray]:
    """Random prompts; the first `shared` tokens are common to all."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, VOCAB, shared)
    return [
        np.concatenate([head, rng.integers(0, VOCAB, n - shared)]).astype(np.uint32)
        for n in lengths
    ]


@dataclass
class StorePool:
    """Store services of this process behind mem:// addresses."""

    services: dict[str, StoreService] = field(default_factory=dict)
    servers: dict[str, Any] = field(default_factory=dict)

    @property
    def addresses(self) -> dict[str, str]:
        return {name: server.address for name, server in self.servers.items()}


@contextlib.contextmanager
def store_pool(
    config: Config, arena_dir: Path, count: int = 2, **options: Any
) -> Iterator[StorePool]:
    pool = StorePool()
    geometry = model_geometry(config)
    for i in range(count):
        name = f"store-{i}"
        capacity = config.store.capacity_bytes
        options.setdefault("config", config.store)
        service = StoreService(name, "node-0", str(arena_dir), geometry, capacity, **options)
        pool.services[name] = service
        pool.servers[name] = serve(service, f"mem://tiny-{next(_names)}-{name}")
    try:
        yield pool
    finally:
        for name, server in pool.servers.items():
            server.stop()
            pool.services[name].close()


@contextlib.contextmanager
def page_client(
    config: Config, pool: StorePool, owner: str = "worker-0", **options: Any
) -> Iterator[PageClient]:
    client = PageClient(
        pool.addresses,
        model_geometry(config),
        recipe_for(config).fingerprint(),
        replicas=config.store.replicas,
        lease_s=config.store.lease_s,
        timeout_s=config.store.timeout_s,
        node_id="node-0",
        owner=owner,
        **options,
    )
    try:
        yield client
    finally:
        client.close()


def tiny_config(directory: Path, *sets: str, files: Sequence[str] = ()) -> Config:
    return load_config(files, [f"model.name={directory}", "store.capacity_bytes=67108864", *sets])


def make_engine(
    config: Config, client: PageClient | None = None, retrievers: dict[str, str] | None = None
) -> Engine:
    torch.set_num_threads(2)
    model = ModelAdapter(Path(config.model.name))
    geometry = model_geometry(config)
    policies = policies_of(config, geometry.n_layers)
    recipe = recipe_for(config).fingerprint()
    executor = make_executor(config, model, geometry, policies, recipe, client, retrievers or {})
    return Engine(config, model, executor, recipe)


def request(
    name: str,
    prompt: np.ndarray,
    n_new: int,
    forced: Sequence[int] = (),
    n_context: int | None = None,
    **sampling: Any,
) -> RowRequest:
    fields = Sampling(max_tokens=n_new, **sampling)
    n_context = len(prompt) if n_context is None else n_context
    return RowRequest(name, prompt, n_context, fields, tuple(forced))


def run_all(engine: Engine, limit: int = 20_000) -> dict[str, dict[str, Any]]:
    """Step until every row has ended; payload of `done` per row. Errors are raised."""
    done: dict[str, dict[str, Any]] = {}
    for _ in range(limit):
        if not engine.n_rows:
            return done
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.kind == "done":
                done[event.row_id] = event.payload
    raise AssertionError(f"{engine.n_rows} rows did not end in {limit} steps")


def answers(engine: Engine, prompts: Sequence[np.ndarray], n_new: int) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        engine.submit(request(f"row-{i}", prompt, n_new))
    done = run_all(engine)
    return [done[f"row-{i}"]["token_ids"] for i in range(len(prompts))]


def engine_logits(engine: Engine, prompt: np.ndarray, n_new: int) -> tuple[list[int], torch.Tensor]:
    """The row's tokens and the logits each was chosen from, [n_new, vocab]."""
    seen: list[torch.Tensor] = []
    compute = engine._model.logits

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        out = compute(hidden)
        seen.append(out[0].clone())
        return out

    engine._model.logits = spy  # type: ignore[method-assign]
    (tokens,) = answers(engine, [prompt], n_new)
    return tokens, torch.stack(seen)
