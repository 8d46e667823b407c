"""The arithmetic behind `plan`'s expected time."""

from __future__ import annotations

from types import SimpleNamespace

from longreach.cluster.rates import attention_flops, linear_weights
from longreach.core.stage import LayerPolicy, Stage

# SmolLM2-135M
MODEL = SimpleNamespace(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
)


def test_linear_weights_are_the_models() -> None:
    # 134.5 M parameters, all of them matrices but for the norms; embedding and head are one
    assert abs(linear_weights(MODEL) - 134_480_000) < 100_000


def test_attention_stops_growing_with_the_context_where_layers_select() -> None:
    stage = Stage(chunk=64, keep=2048)
    sparse = (LayerPolicy(stages=(stage,), sink=256, window=1024),) * 30
    dense = (LayerPolicy(sink=0, window=0, attend_rope="none"),) * 30
    assert attention_flops(MODEL, sparse, 100_000) == attention_flops(MODEL, sparse, 1_000_000)
    assert attention_flops(MODEL, sparse, 100_000) == 4 * 30 * (256 + 1024 + 2048) * 576
    assert attention_flops(MODEL, dense, 100_000) == 4 * 30 * 50_000 * 576
    assert attention_flops(MODEL, sparse, 1000) == attention_flops(MODEL, dense, 1000)
