"""How good selection and sparse attention are on real queries and keys, by preset, option and budget.

    python -m benchmarks.quality [--quick] [--layers 0-29] [--study budget --study rope]

The embedded model reads a held-out text with dense attention (`benchmarks.captured`). For single
queries, as in decode, and for blocks of 64, as in prefill: the share of the dense softmax that stands
on attended keys (sinks and window counted), and the error of the output, attended with true positions
and with renumbered ones ("streaming"). Budgets are tokens that leave the last stage. Gold: facts hidden
in texts, and whether the block with the answer is selected where a head reads it. "16:4:1" are tokens
kept by each stage, as multiples of the budget: what long contexts do to a preset's first stages.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longreach.core.config import load_config
from longreach.core.stage import QUERY_BLOCK, LayerPolicy, parse_layers
from longreach.workers.threads import use_threads

from .captured import N_RECENT, Capture, Captures
from .harness import Say, console, record, result_path, write_result
from .quality_probe import Layer, Probe, Tally, attended_mass, n_attended, output_error
from .quality_report import draw, tables
from .quality_settings import BUDGETS, SIZES, Setting, Study, studies

TEXT_TOKENS, FACT_TOKENS = 8192, 6144
FULL = {
    "layers": "2,5,8,11,14,17,20,23,26,29",
    "tokens": TEXT_TOKENS,
    "queries": 32,
    "documents": 2,
}
QUICK = {
    "layers": "2,14,29",
    "tokens": 1024,
    "queries": 4,
    "documents": 1,
}
QUICK_BUDGETS = (64, 256)
NOT_QUICK = ("preset",)
"""Its window holds the whole of a short text."""
N_AGED = 8
N_READERS = 3
READS = 0.1
"""A head reads the answer if so much of its attention stands on the answer's first token."""

Row = dict[str, Any]


def measure(
    layer: Layer, probe: Probe, setting: Setting, budget: int, age: int, tally: Tally
) -> None:
    """Mass kept, and the error with true positions and with renumbered ones."""
    policy = setting.policy(budget, layer.layer)
    ready = layer.summaries(policy)
    selection = layer.select(probe, policy, setting, age, ready)
    tally.tokens.append(n_attended(probe, selection, policy))
    tally.add("mass", layer.layer, attended_mass(probe, selection, policy))
    for name, rope in (("true", "none"), ("streaming", "streaming")):
        own = policy.model_copy(update={"attend_rope": rope})
        tally.add(
            name, layer.layer, output_error(probe, layer.attend(probe, own, selection, ready))
        )


# --- studies --------------------------------------------------------------------------------------


def probes(layer: Layer, size: int, n_queries: int, ages: Sequence[int]) -> list[Probe]:
    """Single queries spread over the last quarter, or two blocks at the end; where masks grow old,
    single queries whose predecessors were kept."""
    n_tokens = len(layer.capture.token_ids)
    recent = n_tokens - N_RECENT
    if size > 1:
        starts = torch.arange(recent, n_tokens, QUERY_BLOCK)
    elif max(ages):
        starts = torch.linspace(recent + max(ages), n_tokens - 1, N_AGED).long()
    else:
        spread = layer.capture.positions[layer.capture.positions < recent]
        starts = spread[:: max(1, len(spread) // n_queries)]
    return [layer.probe(start, size) for start in starts.tolist()]


def run(
    wanted: Sequence[Study], capture: Capture, layers: Sequence[int], n_queries: int, say: Say
) -> list[Row]:
    """Rows of every study. Layer after layer, so that dense attention is computed once for each."""
    tallies: dict[tuple[int, str, int, int, int], Tally] = {}
    for at in layers:
        started_s = time.monotonic()
        layer = Layer(capture, at)
        cache: dict[tuple[int, bool], list[Probe]] = {}
        for i, study in enumerate(wanted):
            for size in study.sizes:
                key = (size, max(study.ages) > 0)
                if key not in cache:
                    cache[key] = probes(layer, size, n_queries, study.ages)
                for setting in study.settings:
                    for budget in study.budgets:
                        for age in study.ages:
                            case = (i, setting.label, size, budget, age)
                            tally = tallies.setdefault(case, Tally())
                            for probe in cache[key]:
                                measure(layer, probe, setting, budget, age, tally)
        say(f"layer {at}: {time.monotonic() - started_s:.0f} s")
    made: list[Row] = [
        {"name": study.name, "title": study.title, "rows": [], "gold": []} for study in wanted
    ]
    for (i, label, size, budget, age), tally in tallies.items():
        row = {"setting": label, "queries": size, "budget": budget, "age": age}
        row["tokens"] = round(sum(tally.tokens) / len(tally.tokens), 1)
        row["mass"] = tally.summary("mass")
        row["error"] = {name: tally.summary(name) for name in ("true", "streaming")}
        made[i]["rows"].append(row)
    return made


@dataclass(frozen=True)
class Reader:
    """A layer whose KV head `head` serves a query head that reads a fact's answer."""

    layer: Layer
    head: int
    probes: dict[int, Probe]
    """By queries that share a mask: the block, or part of one, at the prompt's end."""

    def between(self, policy: LayerPolicy) -> bool:
        """Whether the answer is neither in the sinks nor in a window, so that it must be selected."""
        last = min(probe.start for probe in self.probes.values()) - policy.window
        return policy.sink <= self.layer.capture.gold <= last

    def keeps(self, size: int, policy: LayerPolicy, setting: Setting, ready: Row) -> bool:
        """Whether the mask of that head holds the answer's block."""
        probe = self.probes[size]
        gold = self.layer.capture.gold
        blocks = self.layer.select(probe, policy, setting, 0, ready).blocks
        starts = blocks[self.head if len(blocks) > 1 else 0]
        return bool(((starts > gold - policy.block_tokens) & (starts <= gold)).any())

    def rank(self, setting: Setting) -> int:
        """Place of the answer's block among all, for the last query: the fewest blocks that hold it."""
        policy = setting.policy(BUDGETS[-1], self.layer.layer)
        ready, last = self.layer.summaries(policy), policy.stages[-1]

        def holds(n_blocks: int) -> bool:
            stage = last.model_copy(update={"keep": n_blocks * last.chunk})
            narrow = policy.model_copy(update={"stages": (*policy.stages[:-1], stage)})
            return self.keeps(1, narrow, setting, ready)

        return 1 + bisect.bisect_left(range(1, self.probes[1].start // last.chunk), True, key=holds)


def readers(capture: Capture) -> list[Reader]:
    """The N_READERS layers with a head that reads the answer most: at least READS of its attention
    stands on the answer's first token."""
    n_tokens = len(capture.token_ids)
    found: list[tuple[float, Reader]] = []
    for at in range(len(capture.q)):
        layer = Layer(capture, at)
        read = layer.probe(n_tokens - 1).weights[:, 0, capture.gold]
        if read.max() < READS:
            continue
        edges = {size: (n_tokens - 1) // size * size for size in SIZES}
        at_end = {size: layer.probe(edge, n_tokens - edge) for size, edge in edges.items()}
        head = int(read.argmax()) // (len(read) // layer.view.n_kv_heads)
        found.append((float(read.max()), Reader(layer, head, at_end)))
    found.sort(key=lambda pair: -pair[0])
    return [reader for _, reader in found[:N_READERS]]


def gold(study: Study, found: Sequence[Reader]) -> list[Row]:
    """How often the answer's block is selected where it is read, and at which place it stands."""
    policies = [setting.policy(study.budgets[0], 0) for setting in study.settings]
    inside = [reader for reader in found if all(map(reader.between, policies))]
    rows: list[Row] = []
    for setting in study.settings if inside else ():
        ranks = [reader.rank(setting) for reader in inside]
        for size in study.sizes:
            kept = {}
            for budget in study.budgets:
                hits = 0
                for reader in inside:
                    policy = setting.policy(budget, reader.layer.layer)
                    hits += reader.keeps(size, policy, setting, reader.layer.summaries(policy))
                kept[str(budget)] = round(hits / len(inside), 4)
            row: Row = {"setting": setting.label, "queries": size, "of": len(inside), "kept": kept}
            row["median_rank"] = statistics.median(ranks) if size == 1 else None
            rows.append(row)
    return rows


# --- the command line -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="a trial: a short text, few layers")
    made.add_argument("--study", action="append", help="default: all", choices=list(studies()))
    made.add_argument("--layers", help=f"like 0-29; default {FULL['layers']}")
    made.add_argument("--queries", type=int, help="single queries per layer, at most 32")
    made.add_argument("--tokens", type=int, help=f"of the text; default {TEXT_TOKENS}")
    made.add_argument("--documents", type=int, help="with five hidden facts each, at most 4")
    made.add_argument("--threads", type=int, help="default: all cores")
    made.add_argument("--out", type=Path, help="default: benchmarks/results; quick runs: out/")
    arguments = made.parse_args(argv)
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments, out = parse(argv), console()
    n_threads = arguments.threads or len(os.sched_getaffinity(0))
    config = load_config([], [f"model.n_threads={n_threads}"])
    result = record("benchmarks.quality", config, sys.argv[1:] if argv is None else argv)
    del result["config"]  # an engine's; here the settings are all there is
    use_threads(n_threads)
    path, started_s = result_path(arguments, "quality"), time.monotonic()
    captures = Captures(config, out.print)
    capture = captures.text(arguments.tokens)
    facts = captures.facts(min(arguments.tokens, FACT_TOKENS), arguments.documents)
    found = [reader for fact in facts for reader in readers(fact)]
    wanted = [s for s in studies().values() if s.name in (arguments.study or studies())]
    if arguments.quick:
        wanted = [s for s in wanted if s.name not in NOT_QUICK]
        wanted = [dataclasses.replace(study, budgets=QUICK_BUDGETS) for study in wanted]
    layers = parse_layers(arguments.layers, len(capture.q), set())
    captured_s = time.monotonic() - started_s
    measured = run(wanted, capture, layers, arguments.queries, lambda s: out.print(f"  {s}"))
    for study, row in zip(wanted, measured, strict=True):
        if study.gold:
            row["gold"] = gold(study, found)
    result |= {
        "model": config.model.name,
        "tokens": len(capture.token_ids),
        "text": hashlib.sha256(capture.token_ids.numpy().tobytes()).hexdigest()[:16],
        "layers": layers,
        "facts": {"asked": len(facts), "found_by_dense": sum(fact.found for fact in facts)},
        "seconds": {
            "capture": round(captured_s),
            "studies": round(time.monotonic() - started_s - captured_s),
        },
        "studies": measured,
    }
    write_result(path, result)
    for table in tables(result):
        out.print(table)
    png = draw(result, path.with_suffix(".png"))
    out.print(f"written to {path}" + (f" and {png.name}" if png else "; no plot"))


if __name__ == "__main__":
    main()
