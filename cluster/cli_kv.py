"""`longreach kv`: the stores' state, checks, snapshots of documents, drops and drains."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from ..core.errors import DataLoss, InvalidInput, Unavailable
from . import render_kv
from .cli_base import DEFAULT_STATE_DIR, Address, StateDir, connect, err, out
from .client import Client
from .proto import kv_pb2 as pb
from .render import PLAIN_EVERY_S, human_bytes, human_count, human_seconds

kv_app = typer.Typer(no_args_is_help=True, help="Look after the KV stores and the pages they hold.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Document = Annotated[
    str, typer.Argument(metavar="DOCUMENT", help="Context id (ctx-...); with --text-file a path.")
]
TextFile = Annotated[
    bool, typer.Option("--text-file", help="DOCUMENT is a text file; the gateway gets it first.")
]
Uri = Annotated[
    str,
    typer.Argument(metavar="URI", help="Directory on the gateway's machine, or a URI (with ://)."),
]


@kv_app.command()
def stat(
    as_json: Json = False, address: Address = "", state_dir: StateDir = DEFAULT_STATE_DIR
) -> None:
    """State, tiers, pins, hits and repair of every store."""
    with connect(address, state_dir) as client:
        response = client.kv.stat()
    if as_json:
        _print_json(render_kv.stat_dict(response))
    else:
        out.print(render_kv.stat_table(response))
    _tell_errors(response.stores)


@kv_app.command()
def verify(
    store: Annotated[str, typer.Option(help="Only this store.")] = "",
    as_json: Json = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Check every held page now. Bad ones are dropped, replicas repair them. Exit code 1 if any was."""
    bad: list[pb.BadPage] = []
    last = pb.VerifyUpdate()
    with connect(address, state_dir) as client:
        for last in _followed(client.kv.verify(store), _verify_line):
            bad += last.bad
    if as_json:
        _print_json(render_kv.verify_dict(last, bad))
    else:
        out.print(render_kv.verify_table(last))
        for page in bad:
            text = f"bad page {page.key[:16]} in {page.tier} of {page.store_id}: {page.reason}"
            out.print(text, soft_wrap=True, markup=False)
    n_bad = sum(state.bad for state in last.stores)
    if n_bad:
        raise DataLoss(
            f"{n_bad} pages failed their check and were dropped; the repair takes them from replicas"
        )
    _fail_on_errors(last.stores)


@kv_app.command()
def scrub(
    start: Annotated[bool, typer.Option("--start", help="Begin a round now.")] = False,
    as_json: Json = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """State of the check that runs in the background."""
    with connect(address, state_dir) as client:
        response = client.kv.scrub(start=start)
    if as_json:
        _print_json(render_kv.scrub_dict(response))
    else:
        out.print(render_kv.scrub_table(response))
    _fail_on_errors(response.stores)


@kv_app.command()
def snapshot(
    document: Document,
    uri: Uri,
    text_file: TextFile = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Without the text; only the pages can be restored.")
    ] = False,
    as_json: Json = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Write the pages of a document that was read to a directory or URI."""
    with connect(address, state_dir) as client:
        context_id = _context_id(client, document, text_file)
        steps = client.kv.snapshot(context_id, _absolute(uri), with_text=not no_text)
        _print_done(_followed(steps, _step_line), "written to", as_json)


@kv_app.command()
def restore(
    uri: Uri,
    as_json: Json = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Check a snapshot, store its pages, make its context known; prints the context id."""
    with connect(address, state_dir) as client:
        steps = _followed(client.kv.restore(_absolute(uri)), _step_line)
        _print_done(steps, "restored from", as_json)


@kv_app.command()
def drop(
    document: Annotated[str, typer.Argument(metavar="DOCUMENT", help="Context id (ctx-...).")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every page of every store.")] = False,
    text_file: TextFile = False,
    as_json: Json = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Forget pages; those that rows hold keep their bytes until they are released."""
    if bool(document) == everything:
        raise InvalidInput("give a DOCUMENT or --all, one of the two")
    with connect(address, state_dir) as client:
        if everything:
            response = client.kv.drop(everything=True)
        else:
            response = client.kv.drop(_context_id(client, document, text_file))
    dropped = {s.store_id: s.n_dropped for s in response.stores if not s.error}
    if as_json:
        errors = {s.store_id: s.error for s in response.stores if s.error}
        _print_json({"n_pages": response.n_pages, "n_dropped": dropped, "errors": errors})
    else:
        for store_id, n_dropped in dropped.items():
            out.print(f"{store_id} dropped {human_count(n_dropped)} pages", soft_wrap=True)
    _fail_on_errors(response.stores)


@kv_app.command()
def drain(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Store id, as `kv stat` shows it.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Until its pages are held elsewhere.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Longest wait, in seconds.", min=1)] = 3600.0,
    as_json: Json = False,
    address: Address = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Take a store out: no new pages, and those it has move to the others."""
    with connect(address, state_dir) as client:
        updates = client.kv.drain(store, wait=wait, timeout_s=timeout_s)
        last: pb.DrainUpdate = _last(_followed(updates, _drain_line))
    if as_json:
        _print_json(
            {
                "store_id": last.store_id,
                "drained": last.drained,
                "to_move": last.to_move,
                "pages_pushed": last.pages_pushed,
                "bytes_pushed": last.bytes_pushed,
                "error": last.error,
            }
        )
    else:
        out.print(_drain_line(last)[0], soft_wrap=True, markup=False)
    if wait and not last.drained:
        raise Unavailable(f"{store} is not drained: {last.error or 'the stream ended'}")


def _absolute(uri: str) -> str:
    """A plain path is the caller's, whose directory may be another than the gateway's."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def _context_id(client: Client, document: str, text_file: bool) -> str:
    return str(client.upload_context(Path(document)).context_id) if text_file else document


def _print_json(value: dict[str, Any]) -> None:
    out.print(json.dumps(value), soft_wrap=True, markup=False)


def _followed(updates: Iterable[Any], line: Any) -> Iterator[Any]:
    """The updates, shown on stderr: a bar on a terminal, else a line every few seconds.
    line(update) -> (text, done, total); total 0 while unknown."""
    columns = TextColumn("{task.description}"), BarColumn()
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    shown_s = time.monotonic()
    with bar:
        task = bar.add_task("", total=None)
        for update in updates:
            text, done, total = line(update)
            bar.update(task, description=text, completed=done, total=total or None)
            if not err.is_terminal and time.monotonic() - shown_s >= PLAIN_EVERY_S:
                shown_s = time.monotonic()
                err.print(text, soft_wrap=True, markup=False)
            yield update


def _last(updates: Iterable[Any]) -> Any:
    found = deque(updates, maxlen=1)
    if not found:
        raise Unavailable("the gateway ended the call without an answer")
    return found[0]


def _verify_line(update: pb.VerifyUpdate) -> tuple[str, int, int]:
    checked, bad = (sum(getattr(s, name) for s in update.stores) for name in ("checked", "bad"))
    return f"{human_count(checked)} pages checked, {human_count(bad)} bad", checked, 0


def _step_line(update: pb.SnapshotUpdate) -> tuple[str, int, int]:
    text = f"{update.phase}: {human_count(update.pages)} of {human_count(update.total_pages)} pages"
    return f"{text}, {human_bytes(update.bytes)}", update.pages, update.total_pages


def _drain_line(update: pb.DrainUpdate) -> tuple[str, int, int]:
    state = "is drained" if update.drained else f"has {human_count(update.to_move)} pages to move"
    text = f"{update.store_id} {state}, {human_count(update.pages_pushed)} pushed"
    error = f" ({update.error})" if update.error else ""
    return text + error, update.pages_pushed, update.pages_pushed + update.to_move


def _print_done(steps: Iterable[pb.SnapshotUpdate], what: str, as_json: bool) -> None:
    done: pb.SnapshotDone = _last(steps).done
    if as_json:
        _print_json({field.name: getattr(done, field.name) for field in done.DESCRIPTOR.fields})
        return
    err.print(
        f"{human_count(done.n_tokens)} tokens, {human_count(done.n_pages)} pages, "
        f"{human_bytes(done.n_bytes)} {what} {done.uri} in {human_seconds(done.seconds)}",
        soft_wrap=True,
        markup=False,
    )
    if done.context_id:
        out.print(done.context_id, soft_wrap=True)


def _tell_errors(stores: Iterable[Any]) -> list[str]:
    failed = [store for store in stores if store.error]
    for store in failed:
        err.print(f"{store.store_id}: {store.error}", soft_wrap=True, markup=False)
    return [store.store_id for store in failed]


def _fail_on_errors(stores: Iterable[Any]) -> None:
    """Exit code 1 if some store did not answer, after those that did were shown."""
    if failed := _tell_errors(stores):
        raise Unavailable(f"no answer from {', '.join(failed)}")
