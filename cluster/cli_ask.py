"""`longreach generate`: one question on one document, answered while you read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import UnreadableUri
from . import render
from .cli_base import DEFAULT_STATE_DIR, Address, StateDir, connect, err
from .client import Client
from .proto import inference_pb2
from .summary import Summary

INLINE_BYTES = 1 << 20
"""Larger documents are uploaded first, in chunks."""


def generate(
    context: Annotated[
        str, typer.Option(help="Text file, or a URI (with ://) that the gateway reads.")
    ],
    question: Annotated[str, typer.Option(help="What to ask.")],
    answer_prefix: Annotated[str, typer.Option(help="Words the answer starts with.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    stop: Annotated[list[str], typer.Option(help="Text that ends the answer; repeatable.")] = [],  # noqa: B006
    stats: Annotated[bool, typer.Option("--stats", help="Print the row's summary after.")] = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Ask one question; the answer streams to stdout, progress to stderr."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
    }
    with connect(address, state_dir) as client:
        events = client.generate(
            question,
            answer_prefix=answer_prefix,
            sampling=sampling,
            **_document(client, context),
        )
        answer = _stream(events)
    if stats and answer is not None:
        summary = Summary()
        summary.rows["answered"] = 1
        summary.add_stats(answer.stats)
        err.print(render.summary_table(summary))


def _document(client: Client, context: str) -> dict[str, Any]:
    if "://" in context:
        return {"context_uri": context}
    path = Path(context)
    try:
        if path.stat().st_size > INLINE_BYTES:
            return {"context_id": client.upload_context(path).context_id}
        return {"context": path.read_text(encoding="utf-8")}
    except OSError as exc:
        raise UnreadableUri(f"{context}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise UnreadableUri(f"{context}: is not UTF-8 text (byte {exc.start})") from exc


def _stream(events: Iterator[inference_pb2.GenerateResponse]) -> inference_pb2.Answer | None:
    answer = None
    with err.status("queued") as status:
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "progress":
                phase = inference_pb2.Phase.Name(event.progress.phase).removeprefix("PHASE_")
                status.update(
                    f"{phase.lower()}: {render.human_count(event.progress.prefilled)} of "
                    f"{render.human_count(event.progress.total)} prompt tokens, "
                    f"{render.human_count(event.progress.reused)} reused"
                )
            elif kind == "token":
                status.stop()
                sys.stdout.write(event.token.text)
                sys.stdout.flush()
            elif kind == "answer":
                answer = event.answer
    sys.stdout.write("\n")
    return answer
