"""What `benchmarks.quality` compares: selections and options, grouped into studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longreach.core.config import load_config
from longreach.core.stage import LayerPolicy, Stage, policies_fingerprint, resolve_policies

from .harness import ROOT

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
FEW = (256, 1024)
SIZES = (1, 16, 64)
AGES = (0, 1, 2, 4, 8, 16, 32, 64, 96)
TOP_P = (None, 0.8, 0.9, 0.95, 0.99)
ROPES = ("none", "clamped", "streaming", "relative", "chunk-indexed")
N_LAYERS = 30

Chain = tuple[tuple[str, int, int], ...]
"""Stages: scorer, tokens per chunk, tokens kept as a multiple of the budget."""
Policy = Callable[[int, int], LayerPolicy]
"""(budget, layer) -> policy"""

SEARCH: Chain = (("search", 8, 1),)
HIP: Chain = (("search", 256, 16), ("search", 32, 4), ("search", 8, 1))
HIP_5K: Chain = (("search", 64, 8), ("search", 32, 4), ("search", 16, 1))
BOUNDS: Chain = (("bounds", 8, 1),)
MEANS: Chain = (("mean", 8, 1),)
COARSE: Chain = (("mean", 256, 16), ("bounds", 8, 1))
FINE: Chain = (("mean", 64, 4), ("bounds", 8, 1))
FINE_SEARCH: Chain = (("mean", 64, 4), ("search", 8, 1))
OPTIONS: dict[str, Chain] = {
    "hip 256/32/8": HIP,
    "bounds 8": BOUNDS,
    "mean 8": MEANS,
    "mean 64, bounds 8": FINE,
}
"""Chains whose options are studied."""


@dataclass(frozen=True)
class Setting:
    """One line of a table."""

    label: str
    policy: Policy
    oracle: bool = False
    """The best runs by dense attention's own weights, instead of what the policy selects."""
    level: int | None = None
    """First stage that is recomputed when the mask is old; None: none."""


@dataclass(frozen=True)
class Study:
    """Settings compared with each other."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    budgets: tuple[int, ...] = BUDGETS
    sizes: tuple[int, ...] = (1,)
    """Queries that share a mask: 1 as in decode, 64 as in prefill, fewer as in a question."""
    ages: tuple[int, ...] = (0,)
    gold: bool = False
    """Whether facts are looked for with these settings too."""


def small(
    chain: Chain, variant: str = "authors", top_p: float | None = None, **options: Any
) -> Policy:
    """Sinks and window as small as chunks of 256 allow, one mask per KV head, true positions unless
    an option says otherwise."""
    fields = {"sink": 16, "window": 256, "head_reduce": "kv-group", "select_rope": "none"}

    def policy(budget: int, layer: int) -> LayerPolicy:
        stages = []
        for i, (scorer, chunk, factor) in enumerate(chain):
            last = i + 1 == len(chain)
            own = {"variant": variant, "query_stride": 4 if scorer == "search" and not last else 1}
            if last and top_p is not None:
                own["top_p"] = top_p
            keep = max(chunk, budget * factor)
            stages.append(Stage(scorer=scorer, chunk=chunk, keep=keep, **own))
        return LayerPolicy(stages=tuple(stages), **(fields | options))

    return policy


def presets() -> dict[str, Policy]:
    """As configured, but for the tokens that leave the last stage: the budget, in every layer. Presets
    that differ in refresh alone are one."""

    def policy_of(by_layer: Sequence[LayerPolicy]) -> Policy:
        def policy(budget: int, layer: int) -> LayerPolicy:
            stages = by_layer[layer].stages
            last = stages[-1].model_copy(update={"keep": budget})
            return by_layer[layer].model_copy(update={"stages": (*stages[:-1], last)})

        return policy

    found: dict[str, tuple[str, Policy]] = {}
    for path in sorted(
        (ROOT / "configs").glob("*.yaml"), key=lambda p: (p.stem == "dev", len(p.stem))
    ):
        policies = load_config([str(path)], []).attention.policies
        if all(policy.dense for policy in policies):
            continue  # a file that says nothing of selection
        if any(policy.by_bookmark for policy in policies):
            continue  # whole pages, by queries of their own: `benchmarks.recall` measures those
        by_layer = resolve_policies(policies, N_LAYERS)
        found.setdefault(policies_fingerprint(by_layer), (path.stem, policy_of(by_layer)))
    return dict(found.values())


def oracles(**options: Any) -> tuple[Setting, ...]:
    """What no selection of single tokens, or of blocks of 8, can do better."""
    return (
        Setting("exact tokens", small((("mean", 1, 1),), **options), oracle=True),
        Setting("exact blocks of 8", small(BOUNDS, **options), oracle=True),
    )


def studies() -> dict[str, Study]:
    relative = {"select_rope": "relative"}
    preset_sizes = {"sink": 256, "window": 1024}
    found = [
        Study(
            "budget",
            "Selections by budget: sink 16, window 256, one mask per KV head, true positions if not named",
            (
                *oracles(),
                Setting("search 8", small(SEARCH)),
                Setting("search 8, relative", small(SEARCH, **relative)),
                Setting("search 8, relative, paper", small(SEARCH, variant="paper", **relative)),
                Setting("hip 256/32/8, 16:4:1", small(HIP)),
                Setting("hip 256/32/8, 16:4:1, relative", small(HIP, **relative)),
                Setting("hip 64/32/16, 8:4:1", small(HIP_5K)),
                Setting("hip 64/32/16, 8:4:1, relative", small(HIP_5K, **relative)),
                Setting("bounds 8", small(BOUNDS)),
                Setting("bounds 16", small((("bounds", 16, 1),))),
                Setting("mean 8", small(MEANS)),
                Setting("mean 16", small((("mean", 16, 1),))),
                Setting("mean 256, bounds 8, 16:1", small(COARSE)),
                Setting("mean 64, bounds 8, 4:1", small(FINE)),
                Setting("mean 64, search 8, 4:1", small(FINE_SEARCH)),
            ),
            sizes=SIZES,
            gold=True,
        ),
        Study(
            "preset",
            "Presets by budget: sink 256, window 1024",
            (
                *oracles(**preset_sizes),
                *(Setting(name, policy) for name, policy in presets().items()),
                Setting("mean 256, bounds 8", small(COARSE, head_reduce="all", **preset_sizes)),
                Setting("bounds 8 per KV head", small(BOUNDS, **preset_sizes)),
            ),
            sizes=SIZES,
            gold=True,
        ),
        Study(
            "rope",
            "Positions while selecting",
            tuple(
                Setting(f"{name}: {rope}", small(chain, select_rope=rope))
                for name, chain in OPTIONS.items()
                for rope in ROPES
            ),
            budgets=FEW,
            gold=True,
        ),
        Study(
            "heads",
            "Which heads share a mask, and how their scores become one",
            tuple(
                Setting(f"{name}: {heads}, {how}", small(chain, head_reduce=heads, reduce=how))
                for name, chain in OPTIONS.items()
                for heads in ("all", "kv-group")
                for how in ("max", "softmax")
            ),
            budgets=FEW,
            sizes=SIZES,
            gold=True,
        ),
        Study(
            "tail",
            "Estimate of what was not kept, by tokens per mean: sink 64",
            tuple(
                Setting(
                    f"{name}: {f'tail {tail}' if tail else 'none'}",
                    small(chain, sink=64, tail=tail),
                )
                for name, chain in OPTIONS.items()
                if chain != HIP
                for tail in (0, 8, 16, 64)
            ),
            budgets=FEW,
        ),
        Study(
            "top_p",
            "Adaptive budget: at most 1,024 tokens, fewer where they hold enough",
            tuple(
                Setting(f"{name}: {top_p or 'none'}", small(chain, top_p=top_p))
                for name, chain in OPTIONS.items()
                for top_p in TOP_P
            ),
            budgets=(1024,),
        ),
        Study(
            "age",
            "Masks by their age in decode steps, 256 tokens",
            (
                Setting("hip 256/32/8, all stages old", small(HIP)),
                Setting("hip 256/32/8, stages 1, 2 old", small(HIP), level=2),
                Setting("hip 256/32/8, stage 1 old", small(HIP), level=1),
                Setting("bounds 8, old", small(BOUNDS)),
                Setting("mean 64, bounds 8, both old", small(FINE)),
                Setting("mean 64, bounds 8, stage 1 old", small(FINE), level=1),
            ),
            budgets=(256,),
            ages=AGES,
        ),
    ]
    return {study.name: study for study in found}
