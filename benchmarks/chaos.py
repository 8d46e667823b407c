"""Ten minutes of serving while parts are killed and links fail: no answer may change, none may be lost.

    python -m benchmarks.chaos [--seconds 600] [--kill-every 20] [--seed 7]

A tiny random model behind `longreach serve --chaos` with real processes (Ray): three stores, two copies
of each page, two workers. Every 20 s a random store or worker gets SIGKILL; between kills requests and
answers are lost or late, links are cut and pages are damaged. Meanwhile batches of questions on a
dozen contexts of several thousand tokens, with pruning, are answered without a pause. Every row must end
once, with the tokens of an undisturbed run (made first, in one process without faults).

Printed: what was struck, answers that differ (must be 0), rows lost or doubled (must be 0), attempts per
row, latency, tokens read or decoded again per kill, and for each kill of a store the time until the first
page was copied and until no page had too few copies. Ends with exit code 1 if a row was lost, doubled or
answered differently.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from longreach.core.config import load_config
from tests.e2e.serving import rows_of

from .chaos_load import Load, undisturbed
from .chaos_watch import Watch, quantiles, rows_of_journal, strikes_of
from .harness import ROOT, console, record, write_result
from .tiny_serve import PAGE_TOKENS, new_serve, serving, write_config

SECONDS = 600
WORDS = tuple(range(1000, 2500, 125))  # a context each, one to two tokens a word
N_QUESTIONS = 4
N_TOKENS = 64
FAULTS = "drop=0.0005,lose_answer=0.0005,delay=0.02:20ms,cut=0.005:1s,corrupt=0.003"


def run(
    config: Path,
    directory: Path,
    plan: str,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
    mark: str = "",
    n_contexts: int = len(WORDS),
) -> dict[str, Any]:
    """One run; everything that was counted."""
    words = WORDS[:n_contexts]
    rows = rows_of(900 + seed, len(words) * N_QUESTIONS, N_TOKENS, words)
    say(f"the undisturbed run: {len(rows)} rows on {len(words)} contexts")
    started_s = time.monotonic()
    with serving(new_serve(config, "inprocess", directory, mark)) as calm:
        truth = undisturbed(calm, rows, 900.0)
    calm_s = time.monotonic() - started_s
    say(f"answered in {calm_s:.0f} s; now {seconds:.0f} s with {plan}")
    serve = new_serve(config, "ray", directory, mark)
    with serving(serve, "--chaos", plan):
        load = Load(serve, rows, truth, random.Random(seed))
        watch = Watch(serve)
        watch.start()
        try:
            load.run(seconds, say)
        finally:
            watch.stop()
    return summary(load, watch, strikes_of(serve.state_dir), rows_of_journal(serve.state_dir))


def summary(
    load: Load,
    watch: Watch,
    strikes: Sequence[dict[str, Any]],
    journal: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    done = [s for s in strikes if s["done"]]
    kills = [s for s in done if s["kind"] == "kill"]
    store_kills = [s for s in kills if s["part"].startswith("store")]
    end_s = watch.samples[-1].time_s if watch.samples else 0.0
    until_s = [s["time_s"] for s in store_kills[1:]] + [end_s]
    repairs = [
        {"at_s": s["at_s"], "part": s["part"], **watch.repair_after(s["time_s"], next_s)}
        for s, next_s in zip(store_kills, until_s, strict=bool(store_kills))
    ]
    again = {
        "prefilled": int(load.totals["pages_recomputed"]) * PAGE_TOKENS,
        "replayed": int(load.totals["tokens_replayed"]),
    }
    n_kills = max(len(kills), 1)
    return {
        "rows": {
            "submitted": load.n_submitted,
            "answered": load.n_done,
            "different": load.different,
            "failed": load.failed,
            "lost": load.lost,
            "doubled": load.doubled,
        },
        "strikes": dict(Counter(f"{s['kind']} {s['part']}" for s in done)),
        "kills": len(kills),
        "faults": {n: int(watch.total(n)) for n in sorted(watch.names("faults_"))},
        "found": {
            "corrupt_by_workers": int(watch.total("store_corrupt_detected")),
            "replica_reads": int(watch.total("store_replica_reads")),
        },
        "tokens": {
            "prompt": int(load.totals["tokens_prompt"]),
            "prefilled": int(load.totals["tokens_prefilled"]),
            "decoded": int(load.totals["tokens_decoded"]),
            **again,
        },
        "tokens_lost_per_kill": {k: round(v / n_kills, 1) for k, v in again.items()},
        "attempts": dict(sorted(Counter(a for a, _ in journal).items())),
        "latency_s": quantiles([s for _, s in journal]),
        "repairs": repairs,
    }


def report(found: dict[str, Any]) -> None:
    out = console()
    rows = found["rows"]
    table = Table("what", "number", title="Serving under faults")
    cells: list[tuple[str, Any]] = [
        ("rows answered", f"{rows['answered']} of {rows['submitted']}"),
        ("answers that differ", len(rows["different"])),
        ("rows failed / lost / doubled", "{} / {} / {}".format(
            *(len(rows[k]) for k in ("failed", "lost", "doubled")))),
        ("strikes", ", ".join(f"{k}: {n}" for k, n in sorted(found["strikes"].items()))),
        ("faults", ", ".join(f"{k[7:]} {n}" for k, n in found["faults"].items())),
        ("attempts: rows", ", ".join(f"{a}: {n}" for a, n in found["attempts"].items())),
        ("seconds from submission", found["latency_s"]),
        ("tokens again per kill", found["tokens_lost_per_kill"]),
    ]  # fmt: skip
    for name, value in cells:
        table.add_row(name, str(value))
    out.print(table)
    repairs = Table("killed", "at s", "first copy after s", "whole after s", title="Repair")
    for r in found["repairs"]:
        repairs.add_row(r["part"], f"{r['at_s']:.0f}", *(
            "-" if r[k] is None else f"{r[k]:.1f}" for k in ("first_repair_s", "whole_s")))  # fmt: skip
    out.print(repairs)
    for entry in [*rows["different"], *rows["failed"], *rows["lost"], *rows["doubled"]]:
        out.print(f"BAD: {entry}")


def is_good(found: dict[str, Any]) -> bool:
    rows = found["rows"]
    bad = any(rows[k] for k in ("different", "failed", "lost", "doubled"))
    return not bad and rows["answered"] == rows["submitted"] > 0


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    say = console().print
    kills = f"kill=store+worker:{arguments.kill_every}s,strikes_for={arguments.seconds:g}s"
    plan = f"seed={arguments.seed},{kills},{arguments.faults}"
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longreach-")))
        arenas = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="longreach-chaos-", dir="/dev/shm")
        )
        config = write_config(directory, Path(arenas))
        loaded = load_config([config])
        result = record("benchmarks.chaos", loaded, sys.argv[1:] if argv is None else argv)
        settings = (arguments.seconds, arguments.seed, say)
        found = run(config, directory, plan, *settings, n_contexts=arguments.contexts)
        if arguments.keep_logs is not None:
            arguments.keep_logs.mkdir(parents=True, exist_ok=True)
            for log in directory.glob("*.log"):
                shutil.copy(log, arguments.keep_logs)
    report(found)
    write_result(arguments.out, result | {"plan": plan, "seconds": arguments.seconds, **found})
    say(f"written to {arguments.out}")
    if not is_good(found):
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of load")
    parser.add_argument("--kill-every", type=int, default=20, help="seconds between two kills")
    parser.add_argument("--faults", default=FAULTS, help="what goes wrong besides, as --chaos")
    parser.add_argument("--contexts", type=int, default=len(WORDS), help="documents asked about")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--keep-logs", type=Path, help="directory for the serve processes' logs")
    path = ROOT / "benchmarks" / "results" / "chaos.json"
    parser.add_argument("--out", type=Path, default=path)
    return parser


if __name__ == "__main__":
    main()
