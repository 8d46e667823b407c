"""Stores whose pages change under them: found, replaced or computed again, counted, never used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.cluster.local_runtime import LocalRuntime
from longreach.core.config import Config, load_config
from longreach.core.page_key import PageKey
from longreach.workers.model_source import model_geometry
from longreach.workers.prompt import PromptBuilder

from .serving import Serve, flip, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

N_TOKENS = 48
LARGEST_BYTE = 3
"""Of the first key's first float32: its sign and exponent."""
FIRST_VALUE_BYTE = 64 * 16 * 4 + 3
"""The same of the first value: attention alone reads it."""


class Rig:
    """A gateway and its parts in this process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.runtime = LocalRuntime(config)
        self.gateway = Gateway(config, self.runtime)
        self.client = Client(self.gateway.start())
        self.prompts = PromptBuilder.from_config(config)

    def close(self) -> None:
        self.client.close()
        self.gateway.stop()

    def ask(self, row: dict[str, Any], at: Callable[[int], None] = lambda index: None) -> Any:
        """The answer; `at` is called with each token's index while the row goes on."""
        events = self.client.generate(
            row["question"], context=row["context"], sampling={"max_tokens": row["max_tokens"]}
        )
        for event in events:
            if event.WhichOneof("event") == "token":
                at(event.token.index)
        return event.answer

    def keys(self, row: dict[str, Any]) -> list[PageKey]:
        return self.prompts.page_keys(self.prompts.build(row["context"], row["question"]))

    def flip(self, keys: Sequence[PageKey], *store_ids: str, byte: int = LARGEST_BYTE) -> int:
        n_leaves = model_geometry(self.config).n_leaves
        addresses = [self.runtime.stats()[store_id]["address"] for store_id in store_ids]
        return sum(flip(address, keys, n_leaves, byte) for address in addresses)

    def counted_from_now(self) -> Callable[[str], int]:
        """What the worker's page client counts from now on, by name."""

        def count(name: str) -> int:
            return int(self.runtime.stats()["worker-0"][f"store_{name}"])

        before = {name: count(name) for name in ("corrupt_detected", "replica_reads")}
        return lambda name: count(name) - before[name]


@pytest.fixture(scope="module")
def rig(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The smallest bank: one row at a time, and pages come from the stores all the time."""
    state = tmp_path_factory.mktemp("flipped") / "state"
    sets = ["gateway.port=0", f"gateway.state_dir={state}", "cache.device_pages=11"]
    made = Rig(load_config([config_file], sets))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("seed", "byte", "stores"),
    [
        (41, LARGEST_BYTE, ("store-0",)),
        (42, LARGEST_BYTE, ("store-1",)),
        (43, FIRST_VALUE_BYTE, ("store-0",)),
        (44, LARGEST_BYTE, ("store-0", "store-1")),
        (45, FIRST_VALUE_BYTE, ("store-0", "store-1")),
    ],
)
def test_flipped_while_a_row_decodes(
    rig: Rig, inprocess: Serve, seed: int, byte: int, stores: tuple[str, ...]
) -> None:
    (row,) = rows_of(seed, 1, N_TOKENS, (1700,))
    keys = rig.keys(row)
    flipped = []

    def strike(index: int) -> None:
        if index == 16:
            flipped.append(rig.flip(keys, *stores, byte=byte))

    counted = rig.counted_from_now()
    answer = rig.ask(row, strike)
    # pages found out while others were still being flipped are gone from their store
    assert flipped[0] > len(keys) * len(stores) // 2
    assert answer.text == inprocess.run([row]).answers[row["custom_id"]]
    assert counted("corrupt_detected") > 0
    if len(stores) == 1:
        assert counted("replica_reads") > 0
        assert answer.stats["pages_recomputed"] == answer.stats["restarts"] == 0
    else:
        assert answer.stats["restarts"] == 1
        assert answer.stats["pages_recomputed"] > 0
        assert answer.stats["tokens_replayed"] > 16


@pytest.mark.parametrize(("seed", "stores"), [(51, ("store-0",)), (52, ("store-0", "store-1"))])
def test_flipped_before_a_later_question(
    rig: Rig, inprocess: Serve, seed: int, stores: tuple[str, ...]
) -> None:
    first, second = rows_of(seed, 2, N_TOKENS, (1700,))
    rig.ask(first)
    keys = [key for key in rig.keys(second) if key in set(rig.keys(first))]
    assert len(keys) > 40
    # every page but the first few, so that some of the context is still good
    assert rig.flip(keys[8:], *stores) == len(keys[8:]) * len(stores)
    counted = rig.counted_from_now()
    answer = rig.ask(second)
    assert answer.text == inprocess.run([second]).answers[second["custom_id"]]
    if len(stores) == 1:
        # placement spreads pages over the stores: those read from store-0 first were found out
        assert counted("corrupt_detected") == counted("replica_reads") > 0
        assert answer.stats["tokens_reused"] >= 64 * len(keys) - 64
        assert answer.stats["pages_recomputed"] == 0
    else:
        assert counted("corrupt_detected") >= 2 * len(keys[8:])
        assert answer.stats["tokens_reused"] == 64 * 8
        assert answer.stats["pages_recomputed"] == len(keys[8:])
    # what was computed again is stored again, and good
    (third,) = rows_of(seed, 1, N_TOKENS, (1700,))
    assert rig.ask(third).stats["tokens_reused"] >= 64 * len(keys) - 64
