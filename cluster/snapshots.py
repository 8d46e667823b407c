"""A context's pages into files and back, through the stores' own client: checked, replicated, bounded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing
from dataclasses import dataclass

from .. import __version__
from ..core.config import Config
from ..core.errors import DataLoss, DeadlineExceeded, LongreachError, StoreFull
from ..core.page_key import ROOT_KEY, PageKey, Recipe
from ..kvstore.page import PageGeometry
from ..kvstore.page_client import PageClient, PageHandle
from ..kvstore.snapshot import (
    FORMAT,
    FORMAT_VERSION,
    Manifest,
    check_fits,
    check_geometry,
    keys_of,
    pages_per_part,
)
from ..kvstore.snapshot_file import SnapshotReader, SnapshotWriter
from .contexts import ContextStore
from .preparer import Preparer
from .runtime import Runtime
from .store_calls import STAT_TIMEOUT_S, ask_all
from .uri import check_protocols

LEASE_S = 60.0
"""Renewed while the gateway lives: its death does not pin pages for long."""
_ATTEMPTS = 4
"""Stores that one page may be offered to, each with its deadline."""


@dataclass(frozen=True)
class Done:
    """What was written or stored."""

    manifest: Manifest
    seconds: float


@dataclass(frozen=True)
class Step:
    """How far it is. phase: tokens, pages; check, store; done."""

    phase: str
    pages: int
    total_pages: int
    n_bytes: int = 0
    done: Done | None = None


class Snapshots:
    """Thread-safe; every call has a client of the stores of its own, with few pages pinned at a time."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        contexts: ContextStore,
        preparer: Preparer,
        geometry: PageGeometry,
        recipe: Callable[[], Recipe],
    ) -> None:
        """recipe: of the configured model; may take seconds the first time."""
        self._config = config
        self._runtime = runtime
        self._contexts = contexts
        self._preparer = preparer
        self._geometry = geometry
        self._recipe = recipe

    def save(self, context_id: str, uri: str, with_text: bool) -> Generator[Step, None, None]:
        """Writes the leading full pages of a context. Nothing is left of one that does not end.

        Raises NotFound (context), DataLoss (a page is in no store), AlreadyExists (at the URI).
        """
        started_s = time.monotonic()
        check_protocols(uri, self._config.gateway.uri_protocols)
        text = self._contexts.text(context_id)
        yield Step("tokens", 0, 0)
        pages = self._preparer.context_pages(text)
        recipe = self._recipe()
        n_pages, page_bytes = len(pages.keys), self._geometry.page_nbytes
        with closing(self._client(recipe)) as client:
            self._check_held(client, pages.keys, context_id)
            with SnapshotWriter(uri, self._geometry) as writer:
                for first, keys in self._batches(pages.keys):
                    row = f"snapshot/{first}"
                    try:
                        for i, handle in enumerate(client.acquire(keys, row), first):
                            if handle is None:
                                raise _missing(i, n_pages, context_id)
                            writer.add(client.page_bytes(handle), handle.checksums)
                    finally:
                        client.release(row)
                    n_done = first + len(keys)
                    yield Step("pages", n_done, n_pages, n_done * page_bytes)
                manifest = writer.commit(
                    pages.token_ids,
                    text.encode() if with_text else None,
                    format=FORMAT,
                    format_version=FORMAT_VERSION,
                    longreach=__version__,
                    created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    model=self._config.model.name,
                    recipe=recipe.model_dump(),
                    fingerprint=recipe.fingerprint().hex(),
                    last_key=pages.keys[-1].hex(),
                    context_id=context_id,
                )
        yield self._done(manifest, started_s)

    def load(self, uri: str) -> Generator[Step, None, None]:
        """Checks every byte, then stores the pages with their replicas and makes the context known.

        Nothing is stored unless all of it is good and of this cluster's recipe. Once storing has begun,
        only checked pages are written, so one that was cut short can be done again.
        """
        started_s = time.monotonic()
        check_protocols(uri, self._config.gateway.uri_protocols)
        reader = SnapshotReader(uri)
        manifest, recipe = reader.manifest, self._recipe()
        n_pages, page_bytes = manifest.n_pages, self._geometry.page_nbytes
        check_fits(manifest, recipe, self._config.model.name, uri)
        check_geometry(manifest, self._geometry, uri)
        reader.check_sizes()
        self._check_room(n_pages)
        yield Step("check", 0, n_pages)
        keys = keys_of(manifest, reader.token_ids(), recipe.fingerprint(), uri)
        document = reader.document()
        if document is not None:
            self._check_document(document, keys, uri)
        every = pages_per_part(self._geometry)
        for i, _, _ in reader.pages():
            if (i + 1) % every == 0 or i + 1 == n_pages:
                yield Step("check", i + 1, n_pages, (i + 1) * page_bytes)
        with closing(self._client(recipe)) as client:
            batch: list[Future[PageHandle]] = []
            parents = [ROOT_KEY, *keys]
            for i, page, _ in reader.pages():
                row = f"restore/{i // every}"
                batch.append(client.store(keys[i], parents[i], page, row))
                if len(batch) == every or i + 1 == n_pages:
                    self._settle(client, batch, row)
                    batch = []
                    yield Step("store", i + 1, n_pages, (i + 1) * page_bytes)
            n_lost = client.lookup(keys).count(False)
            if n_lost:
                raise StoreFull(
                    f"{n_lost} of {n_pages} pages of {uri} were evicted again while the others came: "
                    "rows use the stores' room; restore again when they have ended"
                )
            client.touch(keys)
        if document is not None:
            self._contexts.add([document], uri)
        yield self._done(manifest, started_s)

    def _client(self, recipe: Recipe) -> PageClient:
        store = self._config.store
        return PageClient(
            self._runtime.membership(),
            self._geometry,
            recipe.fingerprint(),
            replicas=store.replicas,
            lease_s=min(LEASE_S, store.lease_s),
            timeout_s=store.timeout_s,
            node_id="",
            owner=f"gateway/{uuid.uuid4().hex[:12]}",
            # pages pass through once: mapping every store's arena would cost more than the copies
            force_wire=True,
        )

    def _batches(self, keys: Sequence[PageKey]) -> Generator[tuple[int, list[PageKey]], None, None]:
        size = pages_per_part(self._geometry)
        for first in range(0, len(keys), size):
            yield first, list(keys[first : first + size])

    def _settle(self, client: PageClient, batch: list[Future[PageHandle]], row: str) -> None:
        """The pages of a batch are held with their replicas; then they are unpinned again."""
        try:
            for future in batch:
                future.result(_ATTEMPTS * self._config.store.timeout_s)
        except FutureTimeout:
            raise DeadlineExceeded(
                "the stores did not take a page in time; restore again"
            ) from None
        finally:
            client.release(row)

    def _check_held(self, client: PageClient, keys: Sequence[PageKey], context_id: str) -> None:
        held = client.lookup(keys)
        if not all(held):
            raise _missing(held.index(False), len(keys), context_id)

    def _check_room(self, n_pages: int) -> None:
        """All pages must fit at once, or the last would push out the first."""
        answers = ask_all(self._runtime.stores(), "stats", {}, STAT_TIMEOUT_S)
        slots = [
            int(stats["n_slots"])
            for stats in answers.values()
            if not isinstance(stats, LongreachError)
        ]
        n_wanted = n_pages * min(self._config.store.replicas, len(slots))
        if len(slots) == len(answers) and n_wanted > sum(slots):
            raise StoreFull(
                f"the snapshot needs {n_wanted} page slots (replicas included), the stores have "
                f"{sum(slots)}; raise store.capacity_bytes or store.disk_bytes"
            )

    def _check_document(self, document: bytes, keys: Sequence[PageKey], uri: str) -> None:
        try:
            text = document.decode()
        except UnicodeDecodeError as exc:
            raise DataLoss(f"{uri}: the document is not UTF-8 at byte {exc.start}") from exc
        if list(self._preparer.context_pages(text).keys) != list(keys):
            raise DataLoss(f"{uri}: the document does not give the snapshot's tokens")

    def _done(self, manifest: Manifest, started_s: float) -> Step:
        seconds = time.monotonic() - started_s
        n_pages = manifest.n_pages
        return Step("done", n_pages, n_pages, manifest.n_bytes, Done(manifest, seconds))


def _missing(page_index: int, n_pages: int, context_id: str) -> DataLoss:
    return DataLoss(
        f"page {page_index} of {n_pages} of {context_id} is in no store (evicted, or never computed); "
        "read the document again first: ask any question on it, then take the snapshot",
        page_index=page_index,
    )
