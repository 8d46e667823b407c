"""The same seed gives the same faults in the same order; shares are kept; schedules only grow."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from longreach.core.fault_config import FaultsConfig, Sometimes
from longreach.kvstore.fault_plan import FaultPlan, Faults, chance, schedule

N = 20_000
SHARES = {
    "drop": 0.01,
    "lose_answer": 0.03,
    "corrupt": 0.1,
    "disk_full": 0.001,
    "disk_error": 0.5,
}
TIMES = {"delay": 0.05, "cut": 0.02, "slow_disk": 0.2}
PARTS = ["store-0", "store-1", "store-2", "worker-0", "retriever-0"]


def everything(seed: int) -> FaultPlan:
    times = {name: Sometimes(share=share, seconds=2.0) for name, share in TIMES.items()}
    return FaultPlan(FaultsConfig.model_validate({"seed": seed, **SHARES, **times}))


def decided(seed: int, where: str = "store-0", method: str = "read", n: int = 500) -> list[Faults]:
    return [everything(seed).decide(where, method, i) for i in range(n)]


def test_the_same_seed_gives_the_same_faults_and_another_seed_place_or_method_others() -> None:
    assert decided(1) == decided(1)
    others = [decided(2), decided(1, where="store-1"), decided(1, method="write")]
    for i, other in enumerate(others):
        assert other != decided(1)
        assert all(other != another for another in others[:i])


def test_shares_are_kept_and_kinds_are_independent() -> None:
    found = decided(5, n=N)
    hits = {name: [bool(getattr(f, name)) for f in found] for name in SHARES}
    hits["delay"] = [f.delay_s == 2.0 for f in found]
    hits["cut"] = [f.cut_s == 2.0 for f in found]
    hits["slow_disk"] = [f.disk_delay_s == 2.0 for f in found]
    shares = {**SHARES, **TIMES}
    for name, share in shares.items():
        # five standard deviations: a plan that is right fails once in two million seeds
        bound = 5 * math.sqrt(N * share * (1 - share))
        assert abs(sum(hits[name]) - N * share) < bound, name
    both = sum(a and b for a, b in zip(hits["disk_error"], hits["corrupt"], strict=True))
    assert abs(both - N * 0.05) < 5 * math.sqrt(N * 0.05)
    at_rest = sum(f.at_rest for f in found)
    assert abs(at_rest - N * 0.05) < 5 * math.sqrt(N * 0.05)
    assert not any(f.at_rest and not f.corrupt for f in found)


def test_no_plan_no_faults() -> None:
    plan = FaultPlan(FaultsConfig(seed=9))
    assert {plan.decide("store-0", "read", n) for n in range(200)} == {Faults()}


@given(st.integers(), st.text(), st.integers(min_value=0))
def test_a_chance_is_a_share_whatever_it_is_made_of(seed: int, where: str, n: int) -> None:
    assert 0 <= chance(seed, where, n) < 1


plans = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "kill": st.lists(st.sampled_from(["store:20s", "worker:7s", "store-1+worker:11s"])),
        "pause": st.lists(st.sampled_from(["store:9s/1s", "retriever:30s/2s"])),
    }
)


@given(plans, st.floats(0, 100), st.floats(0, 100))
def test_a_schedule_is_the_same_in_one_piece_and_in_two(
    values: dict[str, object], a: float, b: float
) -> None:
    config = FaultsConfig.model_validate(values)
    middle_s, until_s = sorted((a, b))
    whole = schedule(config, PARTS, until_s)
    parts = schedule(config, PARTS, middle_s) + schedule(config, PARTS, until_s, middle_s)
    assert parts == whole
    assert [s.at_s for s in whole] == sorted(s.at_s for s in whole)
    n = sum(math.floor(until_s / p.every_s) for p in (*config.kill, *config.pause))
    assert len(whole) == n


def test_strikes_fall_on_parts_that_the_plan_names_and_on_all_of_them() -> None:
    config = FaultsConfig.model_validate(
        {"seed": 4, "kill": "store+worker:20s", "pause": "retriever:50s/2s"}
    )
    strikes = schedule(config, PARTS, 6000)
    killed = [s for s in strikes if s.kind == "kill"]
    assert [s.at_s for s in killed] == [20.0 * n for n in range(1, 301)]
    counts = {part: sum(s.part == part for s in killed) for part in PARTS}
    assert counts.pop("retriever-0") == 0
    assert all(40 < n < 115 for n in counts.values())
    paused = {(s.part, s.for_s) for s in strikes if s.kind == "pause"}
    assert paused == {("retriever-0", 2.0)}
    assert schedule(config.model_copy(update={"seed": 5}), PARTS, 6000) != strikes
    ended = config.model_copy(update={"strikes_for": 100.0})
    assert schedule(ended, PARTS, 6000) == [s for s in strikes if s.at_s <= 100]
