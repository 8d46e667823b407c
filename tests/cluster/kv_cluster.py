"""A gateway over real stores without a model: a document's pages are made by hand, so that they can be
told from any others."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.core.page_key import ROOT_KEY, PageKey, Recipe, page_keys
from longreach.kvstore.page import Bytes
from longreach.kvstore.page_client import PageClient
from longreach.kvstore.store_service import StoreService
from longreach.kvstore.transport import Reply

from .fakes import GEOMETRY, PAGE_TOKENS, FakePrompt, FakePrompts, FakeRuntime, make_config

RECIPE = Recipe(
    model_fingerprint="a model",
    tokenizer_fingerprint="words",
    kv_dtype="float32",
    n_layers=2,
    n_kv_heads=1,
    head_dim=8,
    page_tokens=PAGE_TOKENS,
    attention_fingerprint="dense",
    rope_fingerprint="none",
)
N_PAGES = 10
DOCUMENT = " ".join(f"word{i}" for i in range(N_PAGES * PAGE_TOKENS + 5))


class RecipePrompts(FakePrompts):
    """Names pages by a recipe, as the model's prompts do."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe.fingerprint()

    def page_keys(self, prompt: FakePrompt) -> list[PageKey]:
        return page_keys(prompt.token_ids, self.recipe, PAGE_TOKENS)


class Store:
    """A real store whose answers can be held back or put in place of its own."""

    def __init__(self, store_id: str, arena_dir: Path, n_slots: int) -> None:
        n_bytes = n_slots * GEOMETRY.page_nbytes
        self.real = StoreService(store_id, "local", str(arena_dir), GEOMETRY, n_bytes, faults=True)
        self.answers: dict[str, dict[str, Any]] = {}
        """By method: what is answered instead."""
        self.streams: dict[str, Iterable[dict[str, Any]]] = {}
        """By method: what is streamed instead."""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.awake = threading.Event()
        self.awake.set()

    def handle(
        self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]
    ) -> Reply | Iterator[Reply]:
        self.awake.wait(30)
        self.asked.append((method, header))
        if method in self.streams:
            return self._stream(method)
        if method in self.answers:
            return Reply(self.answers[method])
        return self.real.handle(method, header, buffers)

    def _stream(self, method: str) -> Iterator[Reply]:
        headers = iter(self.streams[method])
        try:
            for header in headers:
                yield Reply(header)
        finally:
            if isinstance(headers, Generator):
                headers.close()

    def close(self) -> None:
        self.awake.set()
        self.real.close()


class KvCluster:
    """One gateway with its state directory and its stores."""

    def __init__(
        self,
        folder: Path,
        n_stores: int = 2,
        n_slots: int = 64,
        recipe: Recipe = RECIPE,
        *sets: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        self.names = [f"store-{i}" for i in range(n_stores)]
        self.stores = {name: Store(name, folder, n_slots) for name in self.names}
        self.runtime = FakeRuntime(stores=self.stores)
        self.config = make_config(
            folder / "state",
            f"store.count={n_stores}",
            "store.timeout_s=3",
            "gateway.uri_timeout_s=10",
            'gateway.uri_protocols=["file","memory"]',
            *sets,
        )
        self.prompts = RecipePrompts(recipe)
        self.gateway = Gateway(
            self.config, self.runtime, prompts=self.prompts, geometry=GEOMETRY, recipe=recipe
        )
        self.client = Client(self.gateway.start(), timeout_s=15.0)

    def close(self) -> None:
        self.client.close()
        self.gateway.stop()
        for store in self.stores.values():
            store.close()

    def __enter__(self) -> KvCluster:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def state_dir(self) -> str:
        return self.config.gateway.state_dir

    def keys(self, document: str = DOCUMENT) -> list[PageKey]:
        tokens = self.prompts.build(document, "?").token_ids
        n_pages = len(document.split()) // PAGE_TOKENS
        return page_keys(tokens[: n_pages * PAGE_TOKENS], self.recipe.fingerprint(), PAGE_TOKENS)

    def page_client(self) -> PageClient:
        return PageClient(
            self.runtime.membership(),
            GEOMETRY,
            self.recipe.fingerprint(),
            replicas=2,
            lease_s=30.0,
            timeout_s=5.0,
            node_id="local",
            owner="test",
        )

    def read(self, document: str = DOCUMENT) -> str:
        """As if a row had been asked on it: uploaded, its pages in the stores. Its context id."""
        client, parent = self.page_client(), ROOT_KEY
        try:
            futures = []
            for key in self.keys(document):
                futures.append(client.store(key, parent, page_of(key), "row"))
                parent = key
            for future in futures:
                future.result(10)
        finally:
            client.close()
        return str(self.client.upload_context(document.encode()).context_id)

    def n_held(self, keys: Sequence[PageKey]) -> list[int]:
        """Copies of each page, counted at the stores."""
        held = [store.real.handle("lookup", {"keys": list(keys)}, []) for store in self.live()]
        return np.sum([reply.header["held"] for reply in held], axis=0).tolist()  # type: ignore[union-attr]

    def check_pages(self, keys: Sequence[PageKey]) -> None:
        """Every page can be had, with the bytes it was made of."""
        client = self.page_client()
        try:
            for key, handle in zip(keys, client.acquire(keys, "check"), strict=True):
                assert handle is not None
                first = handle.first_leaf_row * GEOMETRY.leaf_nbytes
                memory = client.memories[handle.memory]
                assert (memory[first : first + GEOMETRY.page_nbytes] == page_of(key)).all()
        finally:
            client.close()

    def live(self) -> list[Store]:
        return [self.stores[name] for name in self.runtime.stores()]

    def stat(self, field: str) -> list[float]:
        return [store.real.stats()[field] for store in self.live()]


def page_of(key: PageKey) -> Bytes:
    """The bytes of a page, which belong to its name alone."""
    rng = np.random.default_rng(zlib.crc32(key))
    return rng.integers(0, 256, GEOMETRY.page_nbytes, np.uint8)


def flip(store: Store, key: PageKey, leaf: int = 0) -> None:
    """One byte of a held page, behind the store's back."""
    store.real.handle("corrupt", {"key": key, "leaf": leaf}, [])
