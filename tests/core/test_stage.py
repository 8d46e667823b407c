"""Stages and layer policies: what contradicts itself is refused with the numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from longreach.core.stage import (
    DENSE,
    LayerPolicy,
    Stage,
    parse_layers,
    policies_fingerprint,
    question_start,
    resolve_policies,
)

STAGES = (
    Stage(chunk=256, keep=32768, refresh=16, query_stride=4),
    Stage(chunk=32, keep=8192, refresh=8, query_stride=4),
    Stage(chunk=8, keep=2048, refresh=4),
)


def _changed(index: int, **values: Any) -> tuple[Stage, ...]:
    stages = list(STAGES)
    stages[index] = Stage.model_validate(stages[index].model_dump() | values)
    return tuple(stages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk": 8, "keep": 100}, r"keep \(100\) must be a multiple of chunk \(8\)"),
        ({"chunk": 8, "keep": 64, "query_stride": 5}, r"query_stride \(5\) must divide 64"),
        ({"chunk": 0, "keep": 64}, "greater than 0"),
        ({"chunk": 8, "keep": -64}, "greater than 0"),
        ({"chunk": 8, "keep": 64, "refresh": 0}, "greater than 0"),
        ({"chunk": 8, "keep": 64, "scorer": "serach"}, "'search', 'bounds', 'mean' or 'bookmark'"),
        ({"chunk": 8, "keep": 64, "budget": 1}, "Extra inputs"),
    ],
)
def test_a_stage_refuses_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Stage.model_validate(values)


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (1, {"chunk": 48, "keep": 7680}, r"stages.1.chunk \(48\) must divide.*\(256\)"),
        (1, {"chunk": 512}, r"stages.1.chunk \(512\) must divide"),
        (2, {"keep": 8200}, r"stages.2.keep \(8200\) exceeds what enters it \(8192\)"),
        (2, {"refresh": 3}, r"stages.2.refresh \(3\) must divide.*\(8\)"),
        (1, {"refresh": 32}, r"stages.1.refresh \(32\) must divide.*\(16\)"),
    ],
)
def test_a_policy_refuses_stages_that_do_not_fit(
    index: int, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerPolicy(stages=_changed(index, **values))


def test_the_window_must_cover_the_first_chunk() -> None:
    LayerPolicy(stages=STAGES, window=256)
    with pytest.raises(ValidationError, match=r"window \(255\).*first chunk \(256\)"):
        LayerPolicy(stages=STAGES, window=255)


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        STAGES[0].chunk = 8  # type: ignore[misc]


def test_no_stages_means_dense() -> None:
    assert LayerPolicy().dense
    policy = LayerPolicy(stages=STAGES)
    assert not policy.dense
    assert policy.block_tokens == 8


PAGES = Stage(scorer="bookmark", chunk=128, keep=1920)


def test_bookmarks_choose_first() -> None:
    assert LayerPolicy(stages=(PAGES, Stage(chunk=8, keep=512))).by_bookmark
    late = Stage(scorer="bookmark", chunk=8, keep=64)
    for name in ("stages", "prefill_stages"):
        with pytest.raises(
            ValidationError, match=rf"{name}\.1\.scorer: bookmark can only be the first"
        ):
            LayerPolicy.model_validate({name: (STAGES[1], late)})


def test_prefill_may_follow_other_stages() -> None:
    assert LayerPolicy(stages=STAGES).in_prefill == LayerPolicy(stages=STAGES)
    assert LayerPolicy(stages=STAGES, tail=8, prefill_stages=()).in_prefill == DENSE
    both = LayerPolicy(stages=(PAGES,), prefill_stages=STAGES, sink=512, window=256)
    assert both.in_prefill == LayerPolicy(stages=STAGES, sink=512, window=256)
    with pytest.raises(ValidationError, match=r"prefill_stages\.1\.keep .* exceeds"):
        LayerPolicy(prefill_stages=_changed(1, keep=65536))
    with pytest.raises(ValidationError, match=r"tail \(12\) must be a multiple of the last chunk"):
        LayerPolicy(prefill_stages=STAGES, tail=12)
    with pytest.raises(ValidationError, match=r"window \(64\).*first chunk \(256\)"):
        LayerPolicy(prefill_stages=STAGES, window=64)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("rest", [0, 2, 3, 5]),
        ("0-2", [0, 1, 2]),
        ("0,3 , 5", [0, 3, 5]),
        ("4-9,1", [4, 5, 1]),
        ("31", []),
    ],
)
def test_layer_specs(spec: str, expected: list[int]) -> None:
    assert parse_layers(spec, n_layers=6, taken={1, 4}) == expected
    assert LayerPolicy(layers=spec).layers == spec


@pytest.mark.parametrize("spec", ["", "some", "0-", "-1", "1-2-3", "0_2", "1,,2", "²", "5-2"])
def test_a_malformed_layer_spec_is_refused_when_loaded(spec: str) -> None:
    with pytest.raises(ValidationError, match="layers"):
        LayerPolicy(layers=spec)


def test_each_layer_gets_its_policy_in_any_order_of_writing() -> None:
    first = LayerPolicy(layers="0-2", stages=STAGES, sink=1)
    last = LayerPolicy(layers="5", sink=2)
    rest = LayerPolicy(layers="rest", sink=3)
    for order in [(first, last, rest), (rest, last, first), (last, rest, first)]:
        assert [p.sink for p in resolve_policies(order, 6)] == [1, 1, 1, 3, 3, 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["0-2", "2"], "layer 2 has two policies"),
        (["all", "0"], "layer 0 has two policies"),
        (["0-2"], r"layers \[3, 4, 5\] have no policy"),
        (["rest", "rest"], "two policies have layers: rest"),
        ([], "have no policy"),
    ],
)
def test_a_layer_has_exactly_one_policy(layers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_policies(tuple(LayerPolicy(layers=spec) for spec in layers), 6)


@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=10))
def test_named_layers_and_rest_cover_every_layer_once(n_layers: int, named: set[int]) -> None:
    policies = [LayerPolicy(layers="rest", sink=0)]
    if named:
        policies.append(LayerPolicy(layers=",".join(map(str, sorted(named))), sink=64))
    resolved = resolve_policies(tuple(policies), n_layers)
    assert [p.sink == 64 for p in resolved] == [layer in named for layer in range(n_layers)]


def test_the_fingerprint_follows_what_shapes_prefilled_kv() -> None:
    base = LayerPolicy(stages=STAGES)
    same = policies_fingerprint((base,) * 3)
    # refresh belongs to decoding, and `layers` is already resolved: equal KV, equal name
    assert same == policies_fingerprint((LayerPolicy(stages=_changed(0, refresh=96)),) * 3)
    assert same == policies_fingerprint((LayerPolicy(stages=STAGES, layers="rest"),) * 3)
    changed: list[dict[str, Any]] = [
        {"stages": _changed(2, keep=4096)},
        {"stages": _changed(0, variant="paper")},
        {"stages": _changed(0, scorer="bounds")},
        {"stages": _changed(0, query_stride=1)},
        {"sink": 128},
        {"window": 2048},
        {"select_rope": "chunk-indexed"},
        {"attend_rope": "none"},
        {"head_reduce": "kv-group"},
    ]
    prints = {
        policies_fingerprint((LayerPolicy.model_validate({"stages": STAGES} | values),) * 3)
        for values in changed
    }
    assert len(prints | {same}) == len(changed) + 1
    # what decode alone does shapes no page: neither other stages nor what dense prefill never reads
    apart = LayerPolicy(stages=(PAGES,), prefill_stages=STAGES)
    assert same == policies_fingerprint((apart,) * 3)
    dense = policies_fingerprint((LayerPolicy(stages=(PAGES,), prefill_stages=()),) * 3)
    assert dense == policies_fingerprint((DENSE,) * 3)
    assert dense not in prints | {same}
    # in which layer a policy stands matters
    other = LayerPolicy(stages=STAGES, sink=0)
    assert policies_fingerprint((base, other)) != policies_fingerprint((other, base))


@pytest.mark.parametrize(
    ("n_prompt", "n_context", "want"),
    [(1000, 1000, 1000), (1000, 900, 896), (1000, 896, 896), (1000, 100, 704), (50, 10, 0)],
)
def test_the_question_begins_at_the_edge_of_a_block(
    n_prompt: int, n_context: int, want: int
) -> None:
    assert question_start(n_prompt, n_context) == want
