"""What a snapshot of a document is worth: read once, written, restored in a fresh cluster, asked again.

    python -m benchmarks.snapshot [--quick] [--tokens 16384]

The embedded model as configured (configs/dev.yaml) in the in-process wiring. A first cluster reads the
document with one question; its pages are written to a directory. A second cluster, with a state directory
and stores of its own, restores them and answers another question; the first cluster answers the same one.
The tokens must be equal, and the second cluster may compute nothing but what follows the last full page of
the document. Then the snapshot is damaged, and offered to other configurations: all must be refused.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.cluster.local_runtime import LocalRuntime
from longreach.core.config import Config, load_config
from longreach.core.errors import LongreachError
from longreach.kvstore.snapshot import check_fits
from longreach.kvstore.snapshot_file import SnapshotReader
from longreach.workers.model_source import recipe_for
from longreach.workers.prompt import PromptBuilder

from .harness import config_of, console, parser, record, result_path, write_result
from .texts import build_text

TOKENS = 16_384
QUICK_TOKENS = 2_000
ANSWER_TOKENS = 24
QUESTIONS = ("What is this text about?", "Which place is described at its end?")
DENSE = 'attention.policies=[{"attend_rope": "none", "sink": 0, "window": 0}]'
OTHERS = {
    "KV format": "cache.kv_dtype=float32",
    "policies": DENSE,
    "page size": "cache.page_tokens=128",
}

Row = dict[str, Any]


@contextlib.contextmanager
def cluster(config: Config, folder: Path) -> Iterator[Client]:
    """A gateway with parts of its own in this process."""
    gateway_config = config.gateway.model_copy(update={"state_dir": str(folder), "port": 0})
    own = config.model_copy(update={"gateway": gateway_config})
    gateway = Gateway(own, LocalRuntime(own))
    try:
        with Client(gateway.start()) as client:
            yield client
    finally:
        gateway.stop()
        gc.collect()


def ask(client: Client, question: str, context_id: str) -> Row:
    started_s = time.monotonic()
    first_s, answer = 0.0, None
    sampling = {"max_tokens": ANSWER_TOKENS}
    for event in client.generate(question, context_id=context_id, sampling=sampling):
        if event.HasField("token") and not first_s:
            first_s = time.monotonic() - started_s
        if event.HasField("answer"):
            answer = event.answer
    assert answer is not None
    stats = answer.stats
    return {
        "text": answer.text,
        "ttft_s": round(first_s, 3),
        "seconds": round(time.monotonic() - started_s, 3),
        "tokens_prompt": int(stats["tokens_prompt"]),
        "tokens_reused": int(stats["tokens_reused"]),
        "tokens_prefilled": int(stats["tokens_prefilled"]),
        "pages_recomputed": int(stats["pages_recomputed"]),
    }


def moved(updates: Any) -> Row:
    """The sizes and seconds that a snapshot or a restore ends with."""
    done = list(updates)[-1].done
    return {
        "n_tokens": done.n_tokens,
        "n_pages": done.n_pages,
        "n_bytes": done.n_bytes,
        "seconds": round(done.seconds, 3),
        "mb_per_s": round(done.n_bytes / done.seconds / 1e6, 1),
    }


def refused(act: Any) -> str:
    """The error that something raises, which it must."""
    try:
        act()
    except LongreachError as exc:
        return f"{exc.reason}: {exc.message}"
    raise AssertionError("a wrong snapshot was taken")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__).parse_args(argv)
    n_tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    arguments.set = ["cluster.wiring=inprocess", *arguments.set]
    config = config_of(arguments, small=arguments.quick)
    result = record("benchmarks.snapshot", config, sys.argv[1:] if argv is None else argv)
    out = console()
    document = build_text(PromptBuilder(config).count, 16, n_tokens)
    with tempfile.TemporaryDirectory(prefix="longreach-snapshot-") as name:
        folder = Path(name)
        snap = folder / "snap"
        with cluster(config, folder / "first") as first:
            context_id = first.upload_context(document.encode()).context_id
            out.print(f"reading {n_tokens} tokens")
            read = ask(first, QUESTIONS[0], context_id)
            written = moved(first.kv.snapshot(context_id, str(snap)))
            there = ask(first, QUESTIONS[1], context_id)
        with cluster(config, folder / "second") as second:
            restored = moved(second.kv.restore(str(snap)))
            here = ask(second, QUESTIONS[1], context_id)
            wrong = {"flipped byte": flipped(second, snap)}
        for what, assignment in OTHERS.items():
            wrong[what] = of_another(
                load_config([arguments.config], [*arguments.set, assignment]), snap
            )
    n_tail = here["tokens_prompt"] - written["n_tokens"]
    result |= {
        "document_tokens": n_tokens,
        "read": read,
        "snapshot": written,
        "restore": restored,
        "asked_there": there,
        "asked_here": here,
        "same_answer": there["text"] == here["text"],
        "prefilled_beyond_the_tail": here["tokens_prefilled"] - n_tail,
        "refused": wrong,
    }
    out.print(table_of(result))
    for what, error in wrong.items():
        out.print(f"{what}: {error}")
    path = result_path(arguments, "snapshot")
    write_result(path, result)
    out.print(f"written to {path}")
    if not result["same_answer"] or result["prefilled_beyond_the_tail"]:
        raise SystemExit("the restored pages did not serve as those that were read")


def flipped(client: Client, snap: Path) -> str:
    part = next(snap.glob("pages-*.bin"))
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    # where it lay says nothing to a reader
    return refused(lambda: list(client.kv.restore(str(snap)))).replace(f"{snap.parent}/", "")


def of_another(config: Config, snap: Path) -> str:
    manifest = SnapshotReader(str(snap)).manifest
    recipe = recipe_for(config)
    return refused(lambda: check_fits(manifest, recipe, config.model.name, "the snapshot"))


def table_of(result: Row) -> Table:
    table = Table("", "seconds", "tokens prefilled", "reused", "size", "MB/s")
    for name in ("read", "snapshot", "restore", "asked_there", "asked_here"):
        row = result[name]
        size = f"{row['n_bytes'] / 1e6:.0f} MB, {row['n_pages']} pages" if "n_bytes" in row else ""
        table.add_row(
            name.replace("_", " "),
            f"{row['seconds']:.1f}"
            + (f" (first token {row['ttft_s']:.1f})" if "ttft_s" in row else ""),
            str(row.get("tokens_prefilled", "")),
            str(row.get("tokens_reused", "")),
            size,
            str(row.get("mb_per_s", "")),
        )
    return table


if __name__ == "__main__":
    main()
