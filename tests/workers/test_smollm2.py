"""Dense when asked, for the embedded model: real weights, real text, tokens and logits of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longreach.core.config import Config, load_config
from longreach.workers.embedded import ensure_embedded_model
from longreach.workers.prompt import PromptBuilder

from .tiny import answers, engine_logits, hf_greedy, hf_logits, make_engine, page_client, store_pool

N_NEW = 16
DOCUMENT = Path(__file__).resolve().parents[2] / "examples/demo/orchard.txt"


@pytest.fixture(scope="module")
def directory() -> Path:
    return ensure_embedded_model()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Three questions on one document, and a short one of its own."""
    builder = PromptBuilder.from_config(load_config())
    text = DOCUMENT.read_text(encoding="utf-8")
    asked = [
        (text[:3000], "What is the oldest tree called?", "It is called"),
        (text[:3000], "Who owns the orchard?", ""),
        (text[:3000], "Where is the key?", "The key"),
        ("The sky is blue.", "Which colour has the sky?", ""),
    ]
    return [builder.build(*each).token_ids for each in asked]


@pytest.fixture(scope="module")
def dense(directory: Path, prompts: list[np.ndarray]) -> list[list[int]]:
    return hf_greedy(directory, prompts, N_NEW)


def config_of(directory: Path, *sets: str) -> Config:
    return load_config([], [f"model.name={directory}", "store.capacity_bytes=268435456", *sets])


@pytest.mark.parametrize(
    ("page_tokens", "chunk_tokens", "device_pages"), [(64, 512, 64), (32, 64, 64), (16, 192, 16)]
)
def test_greedy_tokens_equal_dense_generate(
    directory: Path,
    prompts: list[np.ndarray],
    dense: list[list[int]],
    tmp_path: Path,
    page_tokens: int,
    chunk_tokens: int,
    device_pages: int,
) -> None:
    config = config_of(
        directory,
        f"cache.page_tokens={page_tokens}",
        f"cache.device_pages={device_pages}",
        f"worker.prefill_chunk_tokens={chunk_tokens}",
    )
    with store_pool(config, tmp_path) as pool, page_client(config, pool) as client:
        engine = make_engine(config, client)
        got = answers(engine, prompts, N_NEW)
        assert engine.flow.flush(20.0)
        # the same again, out of the store
        again = answers(engine, prompts, N_NEW)
    eos = 2
    for mine, replayed, reference in zip(got, again, dense, strict=True):
        # generate pads nothing here: it ends with the end-of-turn token, as a row does
        assert mine == reference
        assert replayed == reference
        assert eos not in mine[:-1]


def test_logits_agree_within_a_ten_thousandth_of_their_deviation(
    directory: Path, prompts: list[np.ndarray]
) -> None:
    tokens, logits = engine_logits(make_engine(config_of(directory)), prompts[0], N_NEW)
    reference = hf_logits(directory, [*prompts[0].tolist(), *tokens])[len(prompts[0]) - 1 : -1]
    error = (logits - reference).abs().max() / reference.std()
    assert float(error) < 1e-4
