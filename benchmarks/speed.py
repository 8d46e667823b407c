"""Speed of one row at 12K tokens as configured (configs/dev.yaml), beside Hugging Face dense attention.

    python -m benchmarks.speed [--quick] [--skip-dense]

Three questions on one document, one after the other: the first gives the prefill and decode rates,
the others show what reuse of pages is worth. Dense attention then answers the first in the same
process, with the same threads and float32: its context in one forward, decoding with its cache.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from longreach.core.config import Config
from longreach.workers.dense import DenseModel
from longreach.workers.model import ModelAdapter
from longreach.workers.prompt import Prompt, PromptBuilder

from .harness import (
    Answer,
    Say,
    Session,
    config_of,
    console,
    load_model,
    open_session,
    parser,
    record,
    reset_peak,
    resident_bytes,
    result_path,
    warm_up,
    write_result,
)
from .texts import build_text, documents

TOKENS = 12_000
QUICK_TOKENS = 2_000
DECODE_STEPS = 64
QUICK_DECODE_STEPS = 32
ANSWER_TOKENS = 16
QUESTIONS = (0, 2, 4)
"""Facts of the document that are asked for."""
PARTS = ("linear", "select", "attend", "fetch", "store")
WANTED = {"prefill_tokens_per_s": 80.0, "decode_tokens_per_s": 8.0, "ttft_s": 3.0}

Row = dict[str, Any]


def seconds_by_part(counters: dict[str, float], total_s: float) -> dict[str, float]:
    """Where the seconds of a phase went; `other` is what no part counted."""
    parts = {part: counters[f"seconds_{part}"] for part in PARTS}
    parts["other"] = total_s - sum(parts.values())
    return {part: round(seconds, 3) for part, seconds in parts.items()}


def rates(n_prefilled: int, prefill_s: float, n_steps: int, decode_s: float) -> Row:
    """Tokens per second; a decode step is one forward of one token."""
    return {
        "tokens_prefilled": n_prefilled,
        "prefill_s": round(prefill_s, 3),
        "prefill_tokens_per_s": round(n_prefilled / prefill_s, 2),
        "decode_steps": n_steps,
        "decode_s": round(decode_s, 3),
        "decode_tokens_per_s": round(n_steps / decode_s, 2),
    }


def sparse_row(answer: Answer) -> Row:
    """Rates of a row that was prefilled here, seconds by part, bytes moved."""
    first, last = answer.prefill, answer.stats
    decode = {name: last[name] - first[name] for name in last}
    n_prefilled, n_steps = int(last["tokens_prefilled"]), int(last["tokens_decoded"])
    return {
        **rates(n_prefilled, last["prefill_s"], n_steps, last["decode_s"]),
        "prefill_seconds": seconds_by_part(first, last["prefill_s"]),
        "decode_seconds": seconds_by_part(decode, last["decode_s"]),
        "bytes_device_to_store": last["bytes_device_to_store"],
        "bytes_store_to_device": last["bytes_store_to_device"],
        "bank_hits": last["bank_hits"],
        "bank_misses": last["bank_misses"],
        "mass_kept": round(last["mass_kept_sum"] / last["mass_kept_n"], 4)
        if last["mass_kept_n"]
        else None,
    }


def question_row(at: int, prompt: Prompt, answer: Answer, page_tokens: int) -> Row:
    stats = answer.stats
    return {
        "question": at + 1,
        "pages_of_context": prompt.n_context_tokens // page_tokens,
        # a question that begins as an earlier one did may share a page beyond the context
        "pages_reused": min(
            int(stats["tokens_reused"]) // page_tokens, prompt.n_context_tokens // page_tokens
        ),
        "tokens_reused": int(stats["tokens_reused"]),
        "tokens_prefilled": int(stats["tokens_prefilled"]),
        "ttft_s": round(stats["ttft_s"], 3),
        "answer": answer.text,
    }


def measure_sparse(
    session: Session, prompts: Sequence[Prompt], n_steps: int, page_tokens: int, say: Say
) -> Row:
    """The first prompt is timed, all are asked; resident memory is noted on the way."""
    gc.collect()
    reset_peak()
    memory = {"model and device bank": resident_bytes()}
    answers = []
    for i, prompt in enumerate(prompts):
        say(f"question {i + 1} of {len(prompts)}")
        # as many forwards of one token as steps are wanted: the first token comes from prefill
        n_tokens = n_steps + 1 if i == 0 else ANSWER_TOKENS
        answers += session.ask([prompt], n_tokens, say, ignore_eos=i == 0)
        if i == 0:
            memory["after the first question"] = resident_bytes()
    memory["after all questions"] = resident_bytes()
    return {
        **sparse_row(answers[0]),
        "questions": [
            question_row(i, prompt, answer, page_tokens)
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ],
        "bytes_of_all_questions": {
            name: sum(int(answer.stats[name]) for answer in answers)
            for name in ("bytes_device_to_store", "bytes_store_to_device")
        },
        "store": session.client.stats(),
        "memory": memory,
    }


def ask_sparse(
    config: Config,
    model: ModelAdapter,
    builder: PromptBuilder,
    prompts: Sequence[Prompt],
    n_steps: int,
    say: Say,
) -> Row:
    """A session of its own: nothing of it is left when dense attention is measured."""
    with open_session(config, model, builder) as session:
        return measure_sparse(session, prompts, n_steps, config.cache.page_tokens, say)


def measure_dense(config: Config, prompts: PromptBuilder, prompt: Prompt, n_steps: int) -> Row:
    dense = DenseModel(config.model)
    short = prompts.build(build_text(prompts.count, 999, 500), "What is this text about?")
    dense.answer([short], [8], ignore_eos=True)
    # what the engine left behind is not dense attention's
    gc.collect()
    reset_peak()
    before = resident_bytes()
    answer = dense.answer([prompt], [n_steps + 1], ignore_eos=True)[0]
    n_decoded = len(answer.token_ids) - 1
    return {
        **rates(answer.n_prefilled, answer.prefill_s, n_decoded, answer.decode_s),
        "cache": "DynamicCache of transformers",
        "memory": {"before": before, "after": resident_bytes()},
    }


def compare(sparse: Row, dense: Row) -> dict[str, float]:
    """How many times as fast as dense."""
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return {name: round(sparse[name] / dense[name], 2) for name in names}


def speed_table(result: Row) -> Table:
    sparse, dense = result["sparse"], result.get("dense")
    made = Table(title=f"Speed at {result['tokens']:,} tokens, {result['threads']} threads")
    for name in ("", "longreach", "dense attention", "ratio", "wanted"):
        made.add_column(name, justify="left" if not name else "right")
    for name, label in (
        ("prefill_tokens_per_s", "prefill, tokens/s"),
        ("decode_tokens_per_s", "decode, tokens/s"),
    ):
        made.add_row(
            label,
            f"{sparse[name]:.1f}",
            f"{dense[name]:.1f}" if dense else "not asked",
            f"{result['ratio'][name]:.2f}" if dense else "",
            f"≥ {WANTED[name]:.0f}",
        )
    return made


def parts_table(sparse: Row) -> Table:
    made = Table("seconds", *PARTS, "other", "all", title="Where the time goes")
    for phase in ("prefill", "decode"):
        seconds = sparse[f"{phase}_seconds"]
        cells = [f"{seconds[part]:.2f}" for part in (*PARTS, "other")]
        made.add_row(phase, *cells, f"{sparse[f'{phase}_s']:.2f}")
    return made


def questions_table(rows: Sequence[Row]) -> Table:
    columns = ("question", "pages reused", "tokens prefilled", "first token after", "answer")
    made = Table(*columns, title="Three questions on one document")
    for row in rows:
        made.add_row(
            str(row["question"]),
            f"{row['pages_reused']} of {row['pages_of_context']}",
            f"{row['tokens_prefilled']:,}",
            f"{row['ttft_s']:.2f} s",
            " ".join(row["answer"].split())[:40],
        )
    return made


def _memory_lines(result: Row) -> list[str]:
    lines = []
    for side in ("sparse", "dense"):
        for when, held in result.get(side, {}).get("memory", {}).items():
            parts = ", ".join(f"{name} {n / 2**20:,.0f}" for name, n in held.items())
            lines.append(f"resident MiB, {side}, {when}: {parts}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__).parse_args(argv)
    out = console()
    config = config_of(arguments, small=arguments.quick)
    result = record("benchmarks.speed", config, sys.argv[1:] if argv is None else argv)
    path = result_path(arguments, "speed")
    model, builder = load_model(config)
    length = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    n_steps = QUICK_DECODE_STEPS if arguments.quick else DECODE_STEPS
    document = documents(builder.count, length)[0]
    facts = [document.facts[at][1] for at in QUESTIONS]
    prompts = [builder.build(document.text, f.question, f.prefix) for f in facts]
    if not arguments.quick:
        started_s = time.monotonic()
        warm_up(config_of(arguments, small=True), model, builder)
        out.print(f"warmed up in {time.monotonic() - started_s:.0f} s")
    sparse = ask_sparse(config, model, builder, prompts, n_steps, lambda s: out.print(f"  {s}"))
    result |= {
        "tokens": prompts[0].n_tokens,
        "threads": result["machine"]["threads"],
        "wanted": WANTED,
        "sparse": sparse,
    }
    # dense attention takes as long again: what is measured is kept before it starts
    write_result(path, result)
    if not arguments.skip_dense:
        out.print("  dense attention, first question")
        dense = measure_dense(config, builder, prompts[0], n_steps)
        result |= {"dense": dense, "ratio": compare(sparse, dense)}
    write_result(path, result)
    out.print(speed_table(result))
    out.print(parts_table(sparse))
    out.print(questions_table(sparse["questions"]))
    moved = sparse["bytes_of_all_questions"]
    out.print(
        f"moved to the stores {moved['bytes_device_to_store'] / 2**20:,.0f} MiB, "
        f"back {moved['bytes_store_to_device'] / 2**20:,.0f} MiB; "
        f"attention mass kept (sampled) {sparse['mass_kept']}"
    )
    for line in _memory_lines(result):
        out.print(line)
    out.print(f"load when it began: {result['machine']['load_1min']}; written to {path}")


if __name__ == "__main__":
    main()
