"""KV in int4c: what a query reads is a function of its position, not of chunks, pages, rows and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.config import Config
from longreach.kernels import attend, by_channel
from longreach.workers import cpu_memory, decoder_blocks
from longreach.workers.model import ModelAdapter

from .test_sparse import PRESET
from .tiny import (
    engine_logits,
    make_engine,
    make_tiny,
    page_client,
    prompts_of,
    request,
    run_all,
    store_pool,
    tiny_config,
)

N_NEW = 70
"""More than a block: one seals while decoding, and is read afterwards."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("channel-llama"), head_dim=32)


@pytest.fixture(params=["dense", "sparse"])
def config(llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    files = [tmp_path / "preset.yaml"] if request.param == "sparse" else []
    for file in files:
        file.write_text(PRESET)

    def make(*sets: str) -> Config:
        return tiny_config(llama, "cache.kv_dtype=int4c", *sets, files=[str(f) for f in files])

    return make


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[int, int], bytes]]:
    """The bytes of every block that is sealed, by first token and layer; the same each time."""
    seen: dict[tuple[int, int], bytes] = {}
    seal = cpu_memory.CpuMemory._seal

    def spy(self: Any, layer: int, row: Any, start: int, k: Any, v: Any, skip: int) -> None:
        seal(self, layer, row, start, k, v, skip)
        page_tokens = self.geometry.page_tokens
        for first in range((start + skip) // 64 * 64, (start + k.shape[1]) // 64 * 64, 64):
            leaves = self._leaves(
                row.page_ids.array[first // page_tokens : first // page_tokens + 1]
            )
            leaf = self.bank.layers[layer].view(torch.uint8)[self.residency[layer].slots_of(leaves)]
            part = leaf[:, :, first % page_tokens : first % page_tokens + 64]
            assert seen.setdefault((first, layer), part.numpy().tobytes()) == part.numpy().tobytes()

    monkeypatch.setattr(cpu_memory.CpuMemory, "_seal", spy)
    return seen


def run(config: Config, prompts: list[np.ndarray], tmp_path: Path, n_new: int = N_NEW) -> list[Any]:
    with store_pool(config, tmp_path) as pool, page_client(config, pool) as client:
        engine = make_engine(config, client)
        for i, prompt in enumerate(prompts):
            engine.submit(request(f"row-{i}", prompt, n_new))
        done = run_all(engine)
        return [done[f"row-{i}"]["token_ids"] for i in range(len(prompts))]


def test_chunks_pages_and_the_bank_change_nothing(
    config: Any, stored: dict[Any, bytes], tmp_path: Path
) -> None:
    """Tokens, and the bytes of every block, in all layers."""
    (prompt,) = prompts_of(837)
    want = run(config(), [prompt], tmp_path)
    assert {first for first, _ in stored} == set(range(0, 837 + N_NEW - 64, 64))
    for chunk in (64, 128, 512):
        assert run(config(f"worker.prefill_chunk_tokens={chunk}"), [prompt], tmp_path) == want
    small = config("cache.device_pages=12", "cache.page_tokens=128")
    assert run(small, [prompt], tmp_path) == want


def test_neighbours_change_nothing(config: Any, tmp_path: Path) -> None:
    """Rows that share pages, one at a block's edge, one within its first block; and other kernels' calls."""
    prompts = [*prompts_of(700, 640, shared=600), *prompts_of(40, seed=3)]
    want = [run(config(), [prompt], tmp_path, 30)[0] for prompt in prompts]
    assert run(config(), prompts, tmp_path, 30) == want


@pytest.mark.parametrize("n_prompt", [768, 831, 837])
def test_a_restart_and_a_replay_change_nothing(config: Any, tmp_path: Path, n_prompt: int) -> None:
    """Another worker has only full pages of the prompt: its open block is made again."""
    (prompt,) = prompts_of(n_prompt)
    settings = config("cache.device_pages=24", "cache.page_tokens=128")
    with store_pool(settings, tmp_path) as pool, page_client(settings, pool) as client:
        engine = make_engine(settings, client)
        engine.submit(request("first", prompt, N_NEW))
        whole = run_all(engine)["first"]["token_ids"]
        assert engine.flow.flush(10)
        for n_forced in (5, 66):
            with page_client(settings, pool) as other:
                again = make_engine(settings, other)
                again.submit(request("second", prompt, N_NEW, forced=whole[:n_forced]))
                done = run_all(again)["second"]
            assert done["token_ids"] == whole
            assert done["stats"]["tokens_reused"] >= 640


def test_layers_one_by_one_are_layers_together(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts_of(500)
    want = run(config(), [prompt], tmp_path)
    monkeypatch.setattr(decoder_blocks, "has_block_kernel", lambda: False)
    assert run(config(), [prompt], tmp_path) == want


class Definition:
    """Dense attention in float64: full blocks before a query's own are rounded, its own is not."""

    def __init__(self, model: ModelAdapter) -> None:
        self._rope = model.rope

    def attend(self, layer: int, q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        n_tokens = q.shape[1]
        out = torch.zeros(n_tokens, q.shape[0], q.shape[2])
        rounded = by_channel.rounded(k, keys=True), by_channel.rounded(v, keys=False)
        for first in range(0, n_tokens, 64):
            last = min(first + 64, n_tokens)
            seen_k, seen_v = (
                torch.cat((r[:, :first], x[:, first:last]), 1).repeat_interleave(2, 0)
                for r, x in zip(rounded, (k, v), strict=True)
            )
            at = torch.arange(last)
            keys = self._rope.rotate(seen_k, at).double()
            queries = self._rope.rotate(q[:, first:last], at[first:]).double()
            logits = queries @ keys.mT * scale
            logits = logits.masked_fill(at > at[first:, None], -torch.inf)
            out[first:last] = (logits.softmax(-1) @ seen_v.double()).float().transpose(0, 1)
        return out


@pytest.mark.parametrize("without_numba", [False, True])
def test_the_engine_reads_what_the_format_says(
    llama: Path, monkeypatch: pytest.MonkeyPatch, without_numba: bool
) -> None:
    """Logits of prefill and of every decoded token, within what other orders of sums change. A query that
    saw its own block rounded, or others not, would be off by far more."""
    if without_numba:
        monkeypatch.setattr(attend, "cpu_attend", None)
    settings = tiny_config(llama, "cache.kv_dtype=int4c")
    (prompt,) = prompts_of(201)
    tokens, logits = engine_logits(make_engine(settings), prompt, N_NEW)
    model = ModelAdapter(llama)
    sequence = torch.tensor([*prompt.tolist(), *tokens[:-1]])
    with torch.inference_mode():
        hidden = model.hidden(sequence, Definition(model), decode=False)
        want = model.logits(hidden[len(prompt) - 1 :])
    off = float((logits - want).abs().max() / want.std())
    assert off < 1e-3
    _, exact = engine_logits(make_engine(tiny_config(llama)), prompt, N_NEW)
    assert float((exact[0] - want[0]).abs().max() / want.std()) > 20 * off
