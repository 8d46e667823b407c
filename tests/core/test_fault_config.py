"""Fault plans as text: every value is read, what contradicts itself or is unknown is refused by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from longreach.core import fault_config as module
from longreach.core.config import Config, config_dict, load_config
from longreach.core.errors import ConfigError
from longreach.core.fault_config import FaultsConfig, Kill, Pause, Sometimes, chaos_options

EXAMPLE = (
    "seed=7,kill=store:20s,pause=worker:30s/2s,drop=0.01,delay=0.05:50ms,corrupt=0.01,cut=0.001:2s,"
    "lose_answer=0.02"
)


def plan_of(text: str) -> FaultsConfig:
    return load_config(*chaos_options(text)).faults


def test_the_example_is_read() -> None:
    assert plan_of(EXAMPLE) == FaultsConfig(
        seed=7,
        kill=(Kill(parts=("store",), every_s=20.0),),
        pause=(Pause(parts=("worker",), every_s=30.0, for_s=2.0),),
        drop=0.01,
        lose_answer=0.02,
        delay=Sometimes(share=0.05, seconds=0.05),
        cut=Sometimes(share=0.001, seconds=2.0),
        corrupt=0.01,
    )


def test_a_key_given_twice_is_a_list_and_parts_may_be_joined() -> None:
    first, second = plan_of("kill=store+worker-0:1m,kill=retriever:1.5h").kill
    assert (first.parts, first.every_s) == (("store", "worker-0"), 60.0)
    assert (second.parts, second.every_s) == (("retriever",), 5400.0)


def test_the_same_from_a_file_with_all_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "chaos.yaml"
    path.write_text("store: {count: 3}\nfaults: {seed: 3, kill: 'store-2:5s', delay: '0.5:1s'}\n")
    config = load_config(*chaos_options(str(path)))
    assert config.faults == FaultsConfig(
        seed=3, kill=(Kill(parts=("store-2",), every_s=5.0),), delay=Sometimes(share=0.5, seconds=1)
    )
    # the printed form is again a configuration, and the same one
    assert Config.model_validate(config_dict(config)) == config


def test_nothing_is_injected_by_default() -> None:
    faults = load_config().faults
    assert not faults.in_parts
    assert not faults.strikes
    assert chaos_options(None) == ([], [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("explode=3", "faults.explode: unknown key"),
        ("drop=1", "faults.drop: Input should be less than 1"),
        ("drop=-0.1", "faults.drop"),
        ("drop=0.1,drop=0.2", "faults.drop"),
        ("drop=0.6,lose_answer=0.5", "leave no call answered"),
        ("delay=0.1", "faults.delay"),
        ("delay=0.1:3", "a time is a number with ms, s, m or h"),
        ("delay=often:3s", "faults.delay.share"),
        ("kill=store", "expected parts and a time"),
        ("kill=store:0s", "greater than 0"),
        ("kill=store:20s/2s", "faults.kill.0.for_s: unknown key"),
        ("kill=gateway:20s", "the gateway is what strikes"),
        ("kill=disk:20s", "no part 'disk'; kinds are store, worker, retriever"),
        ("kill=store-7:20s", "there is no part 'store-7', only store-0, store-1, worker-0"),
        ("pause=worker:2s/2s", "it would never run"),
        ("pause=worker:2s", "faults.pause.0.for_s: Field required"),
        ("store:20s", "is not kind=value"),
        ("seed=1,", "is not kind=value"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_of(text)
    assert said in raised.value.message


def test_a_pause_needs_processes_of_this_machine() -> None:
    files, sets = chaos_options("pause=worker:30s/2s")
    with pytest.raises(ConfigError, match=r"cluster\.ray_address"):
        load_config(files, [*sets, "cluster.ray_address=10.0.0.1:6379"])


def test_every_field_is_documented() -> None:
    missing = []
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and str(after.value.value).rstrip().endswith(".")
            ):
                missing.append(ast.unparse(field.target))
    assert not missing
