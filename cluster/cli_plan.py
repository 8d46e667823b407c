"""`longreach plan`: tokens, pages, bytes and time of a batch, before anything runs. No gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..core.config import Config, load_config
from ..core.errors import BatchLineError, LongreachError, UnreadableUri
from .batch import BatchRow, parse_batch
from .cli_base import ConfigFiles, Sets, err, out
from .plan import Plan, Rates, RowSize, plan_rows
from .rates import estimate_rates
from .render import human_bytes, human_count, human_seconds
from .uri import read_uri

_READ_BYTES = 1 << 20


def plan(
    batch: Annotated[Path, typer.Argument(help="JSONL file.")],
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    prefill_rate: Annotated[
        float, typer.Option(help="Prefill tokens/s of one worker; 0 estimates it here.", min=0)
    ] = 0.0,
    decode_rate: Annotated[
        float, typer.Option(help="Decode tokens/s of one worker; 0 estimates it here.", min=0)
    ] = 0.0,
    device_gib: Annotated[
        float, typer.Option(help="Memory of the GPU; 0 asks the one that is here, else 80.", min=0)
    ] = 0.0,
    host_gib: Annotated[
        float, typer.Option(help="Memory of the GPU's host; 0 takes that of this machine.", min=0)
    ] = 0.0,
) -> None:
    """Say what a batch needs: tokens, pages, bytes per tier, expected time. Runs without a gateway.

    With model.device: cuda also what the GPU and its host have to hold, of the device that is there or of
    one of the size given.
    """
    from ..workers.model_source import model_geometry

    tree = load_config(config, set_)
    problems = _show_gpu(tree, device_gib, host_gib) if tree.model.device == "cuda" else ()
    geometry = model_geometry(tree)
    sizes, refused = _sizes(batch, tree)
    rates = Rates(prefill_rate, decode_rate)
    if not (prefill_rate and decode_rate):
        longest = max((size.n_prompt_tokens for size in sizes), default=0)
        guess = estimate_rates(tree, longest)
        rates = Rates(
            prefill_rate or guess.prefill_tokens_per_s, decode_rate or guess.decode_tokens_per_s
        )
    planned = plan_rows(sizes, tree, geometry, rates)
    planned.refused[:0] = refused
    out.print(_table(planned, rates, tree))
    for name, error in planned.refused:
        err.print(f"refused: {name}: {error.reason}: {error.message}", soft_wrap=True, markup=False)
    if planned.refused or problems:
        raise typer.Exit(1)


def _show_gpu(config: Config, device_gib: float, host_gib: float) -> tuple[str, ...]:
    """The budget of a GPU as a table. Returns what does not fit."""
    from ..workers.gpu_budget import plan_gpu
    from ..workers.gpu_estimate import GpuModel
    from ..workers.gpu_machine import machine_of
    from ..workers.gpu_needs import GpuLoad
    from ..workers.model_source import load_model_config, model_dir

    model = GpuModel.of(load_model_config(model_dir(config.model)))
    budget = plan_gpu(GpuLoad.of(config, model), machine_of(device_gib, host_gib))
    table = Table("part", "bytes", "", title="GPU")
    for what, n_bytes, note in budget.describe():
        table.add_row(what, "" if n_bytes is None else human_bytes(n_bytes), note)
    out.print(table)
    for problem in budget.problems:
        err.print(f"does not fit: {problem}", soft_wrap=True, markup=False)
    return budget.problems


def _sizes(batch: Path, config: Config) -> tuple[list[RowSize], list[tuple[str, LongreachError]]]:
    """Tokenize every row; a context that several rows name is read and counted once."""
    from ..workers.prompt import PromptBuilder

    builder = PromptBuilder.from_config(config)
    contexts: dict[str, str] = {}
    sizes: list[RowSize] = []
    refused: list[tuple[str, LongreachError]] = []
    for row in parse_batch(_chunks(batch), config):
        try:
            sizes.append(_size(row, builder, contexts, config))
        except LongreachError as exc:
            refused.append((f"line {row.line} ({row.custom_id or 'no custom_id'})", exc))
    return sizes, refused


def _size(row: BatchRow, builder: Any, contexts: dict[str, str], config: Config) -> RowSize:
    if row.error is not None or row.spec is None:
        raise row.error or BatchLineError("line cannot be read", line=row.line)
    spec = row.spec
    if spec.messages:
        prompt = builder.build_messages([m.model_dump() for m in spec.messages], spec.answer_prefix)
    else:
        if spec.context_id is not None:
            raise UnreadableUri("a context_id is known to a gateway only; plan needs text or a URI")
        text = spec.context
        if text is None:
            uri = spec.context_uri or ""
            if uri not in contexts:
                contexts[uri] = _read(uri, config)
            text = contexts[uri]
        prompt = builder.build(text, spec.question, spec.answer_prefix)
    return RowSize(
        spec.custom_id,
        len(prompt.token_ids),
        prompt.n_context_tokens,
        spec.sampling.max_tokens,
        tuple(builder.page_keys(prompt)),
    )


def _read(uri: str, config: Config) -> str:
    from .row import max_context_bytes

    chunks = read_uri(
        uri,
        max_bytes=max_context_bytes(config),
        timeout_s=config.gateway.uri_timeout_s,
        protocols=config.gateway.uri_protocols,
    )
    try:
        return b"".join(chunks).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UnreadableUri(f"{uri}: is not UTF-8 text (byte {exc.start})") from exc


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except OSError as exc:
        raise UnreadableUri(f"{path}: {exc.strerror}") from exc


def _table(plan: Plan, rates: Rates, config: Config) -> Table:
    table = Table("plan", "", show_header=False, title="Plan")
    table.add_row("rows", f"{plan.n_rows} can run, {len(plan.refused)} refused")
    table.add_row(
        "prompt tokens",
        f"{human_count(plan.prompt_tokens)}, of which {human_count(plan.reused_tokens)} "
        "are shared and computed once",
    )
    table.add_row("answer tokens", f"at most {human_count(plan.max_new_tokens)}")
    table.add_row(
        "pages",
        f"{human_count(plan.n_pages)} of {config.cache.page_tokens} tokens, "
        f"{human_count(plan.largest_row_pages)} in the largest row",
    )
    table.add_row(
        "on the device",
        f"{human_bytes(plan.device_bytes)} (cache.device_pages: {plan.device_pages})",
    )
    fits = "" if plan.fits else "; old pages will be evicted and made again"
    table.add_row(
        "in the stores",
        f"{human_bytes(plan.store_bytes)} of {human_bytes(plan.store_capacity_bytes)}{fits}",
    )
    if plan.disk_capacity_bytes:
        table.add_row(
            "of it in arenas",
            f"{human_bytes(plan.arena_bytes)} of {human_bytes(plan.arena_capacity_bytes)}",
        )
        also = ", all pages once more" if config.store.disk_write == "through" else ""
        table.add_row(
            "and on disk",
            f"{human_bytes(plan.disk_bytes)} of {human_bytes(plan.disk_capacity_bytes)}{also}",
        )
    table.add_row(
        "expected time",
        f"{human_seconds(plan.total_s)} (prefill {human_seconds(plan.prefill_s)} at "
        f"{rates.prefill_tokens_per_s:.0f} tokens/s, decode at most "
        f"{human_seconds(plan.decode_s)} at {rates.decode_tokens_per_s:.1f} tokens/s)",
    )
    return table
