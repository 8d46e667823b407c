"""Bookmark keys in the stores: taken or made again, they have the same bits."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.core.config import Config
from longreach.core.errors import Cancelled, StoreFull
from longreach.core.page_key import PageKey
from longreach.kvstore.page import PageGeometry
from longreach.kvstore.page_client import PageClient
from longreach.workers.bookmark_groups import BookmarkGroups
from longreach.workers.bookmark_index import BookmarkIndex
from longreach.workers.bookmarks import Bookmarks, BookmarkShape
from longreach.workers.engine import Engine
from longreach.workers.model_source import recipe_for
from longreach.workers.row import Row, RowState

from .test_bookmark_engine import index_of, keys_of, step_until
from .tiny import (
    StorePool,
    answers,
    make_engine,
    make_tiny,
    page_client,
    prompts_of,
    request,
    run_all,
    store_pool,
    tiny_config,
)
from .trained import save_for

N_NEW = 12
PAGE, GROUP = 64, 18
"""Pages of a group: 4-bit pages of 64 tokens are small beside keys in float32."""
TWO_GROUPS = 2 * GROUP * PAGE + 150

POLICIES = """
retriever: {{weights: {weights}}}
cache: {{page_tokens: 64, kv_dtype: int4c}}
attention:
  policies:
    - layers: all
      sink: 64
      window: 128
      prefill_stages: []
      stages: [{{scorer: bookmark, chunk: 64, keep: 320, refresh: 8}}]
"""


def bookmarks_for_64(seed: int) -> Bookmarks:
    torch.manual_seed(seed)
    bookmarks = Bookmarks(BookmarkShape(3, 64, 4, 2, 32, PAGE, 4))
    for parameter in bookmarks.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return bookmarks


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """A configuration with groups of few pages, by the seed of its bookmarks."""
    directory = tmp_path_factory.mktemp("groups")
    model = make_tiny("llama", directory / "model", head_dim=32)
    for seed in (3, 4):
        weights = save_for(directory / f"{seed}.safetensors", bookmarks_for_64(seed), model)
        (directory / f"{seed}.yaml").write_text(POLICIES.format(weights=weights))

    def make(*sets: str, seed: int = 3) -> Config:
        return tiny_config(model, *sets, files=[str(directory / f"{seed}.yaml")])

    return make


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bookmarks of every forward over stored pages that made more than one query."""
    seen: list[int] = []
    run = BookmarkIndex.run

    def note(self: Any, at: Any) -> Any:
        if len(at) > 1:
            seen.append(len(at))
        return run(self, at)

    monkeypatch.setattr(BookmarkIndex, "run", note)
    return seen


def first_decode(engine: Engine, prompt: np.ndarray) -> tuple[torch.Tensor, Row]:
    """The keys of the prompt's pages once the row decodes; it goes on."""
    engine.submit(request("row", prompt, N_NEW))
    row = step_until(engine, "row", RowState.DECODE)
    return keys_of(index_of(engine), row, len(prompt) // PAGE).clone(), row


def fill(config: Config, pool: StorePool, prompt: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """A first worker reads the prompt: its keys and tokens."""
    with page_client(config, pool, owner="first") as client:
        engine = make_engine(config, client)
        keys, _ = first_decode(engine, prompt)
        tokens = run_all(engine)["row"]["token_ids"]
        assert engine.flow.flush(10.0)
    return keys, tokens


def group_names(engine: Engine, prompt: np.ndarray) -> list[PageKey]:
    engine.submit(request("names", prompt, 1))
    (row,) = (row for row in engine.rows if row.row_id == "names")
    store = index_of(engine).store
    assert store is not None
    names = [
        store.groups.name(row.keys[store.groups.pages_of(g).stop - 1])
        for g in range(len(row.keys) // store.groups.n_pages)
    ]
    engine.cancel("names")
    engine.step()
    return names


def test_names_follow_from_prompt_weights_and_layers() -> None:
    geometry = PageGeometry(3, 2, PAGE, 32, "int4c")
    one = BookmarkGroups(geometry, (0, 1, 2), b"weights")
    assert one.n_pages == GROUP
    key = PageKey(hashlib.sha256(b"page").digest())
    others = (
        one.name(PageKey(hashlib.sha256(b"other").digest())),
        BookmarkGroups(geometry, (0, 1, 2), b"others").name(key),
        BookmarkGroups(geometry, (1, 2), b"weights").name(key),
    )
    assert len({one.name(key), key, *others}) == 5
    assert one.name(key) == BookmarkGroups(geometry, (0, 1, 2), b"weights").name(key)


def test_groups_end_with_their_last_page() -> None:
    groups = BookmarkGroups(PageGeometry(3, 2, PAGE, 32, "int4c"), (0, 1, 2), b"")
    assert list(groups.ended_by(range(17))) == []
    assert list(groups.ended_by(range(17, 18))) == [0]
    assert list(groups.ended_by(range(18, 35))) == []
    assert list(groups.ended_by(range(3, 54))) == [0, 1, 2]


def test_a_page_of_keys_gives_them_back() -> None:
    groups = BookmarkGroups(PageGeometry(3, 2, PAGE, 32, "int4c"), (1, 2), b"")
    keys = np.random.default_rng(0).standard_normal((2, groups.n_pages, 2, 32), dtype=np.float32)
    page = groups.pack(keys)
    assert page.nbytes == groups.geometry.page_nbytes
    assert groups.unpack(page).tobytes() == keys.tobytes()


def test_a_worker_that_starts_anew_takes_full_groups_and_makes_the_rest(
    small: Any, tmp_path: Path, forwards: list[int]
) -> None:
    config = small()
    (prompt,) = prompts_of(TWO_GROUPS)
    with store_pool(config, tmp_path) as pool:
        keys, tokens = fill(config, pool, prompt)
        assert forwards == []
        with page_client(config, pool, owner="second") as client:
            engine = make_engine(config, client)
            found, row = first_decode(engine, prompt)
            assert torch.equal(found, keys)
            assert row.stats.bookmarks_taken == 2 * GROUP
            n_rest = row.stats.tokens_reused // PAGE - 2 * GROUP
            assert sum(forwards) == n_rest < 3
            assert run_all(engine)["row"]["token_ids"] == tokens
            assert client.stats()["rows"] == 0  # nothing stays pinned


def test_groups_made_from_stored_pages_are_stored_too(
    small: Any, tmp_path: Path, forwards: list[int]
) -> None:
    """Other weights do not see those of the first; their own are found by the next worker."""
    first, other = small(), small(seed=4)
    assert recipe_for(first).fingerprint() == recipe_for(other).fingerprint()
    (prompt,) = prompts_of(TWO_GROUPS)
    with store_pool(first, tmp_path) as pool:
        keys, _ = fill(first, pool, prompt)
        remade, tokens = fill(other, pool, prompt)
        assert not torch.equal(remade, keys)
        assert sum(forwards) == TWO_GROUPS // PAGE
        forwards.clear()
        again, same = fill(other, pool, prompt)
        assert torch.equal(again, remade)
        assert same == tokens
        assert sum(forwards) < 3
        assert torch.equal(fill(first, pool, prompt)[0], keys)


def lose(pool: StorePool, name: PageKey) -> None:
    for service in pool.services.values():
        service.handle("drop", {"keys": [name]}, ())


def flip(pool: StorePool, name: PageKey) -> None:
    for service in pool.services.values():
        service.handle("corrupt", {"key": name, "leaf": 1}, ())


@pytest.mark.parametrize("harm", [lose, flip])
@pytest.mark.parametrize("group", [0, 1])
def test_a_group_that_is_lost_or_damaged_is_made_again(
    small: Any, tmp_path: Path, forwards: list[int], harm: Any, group: int
) -> None:
    config = small()
    (prompt,) = prompts_of(TWO_GROUPS)
    with store_pool(config, tmp_path, faults=True) as pool:
        keys, tokens = fill(config, pool, prompt)
        with page_client(config, pool, owner="second") as client:
            engine = make_engine(config, client)
            harm(pool, group_names(engine, prompt)[group])
            found, row = first_decode(engine, prompt)
            assert torch.equal(found, keys)
            assert row.stats.bookmarks_taken == GROUP
            assert GROUP in forwards
            assert (client.stats()["corrupt_detected"] > 0) == (harm is flip)
            assert run_all(engine)["row"]["token_ids"] == tokens
            assert engine.flow.flush(10.0)
        forwards.clear()
        assert torch.equal(fill(config, pool, prompt)[0], keys)
        assert sum(forwards) < 3  # stored again


def test_a_bit_that_flips_after_the_store_was_asked_is_found(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    (prompt,) = prompts_of(TWO_GROUPS)
    page_bytes = PageClient.page_bytes
    with store_pool(config, tmp_path) as pool:
        keys, _ = fill(config, pool, prompt)
        with page_client(config, pool, owner="second") as client:
            engine = make_engine(config, client)
            harmed = group_names(engine, prompt)[0]

            def flipped(self: Any, handle: Any) -> Any:
                page = page_bytes(self, handle).copy()
                page[5] ^= handle.key == harmed
                return page

            monkeypatch.setattr(PageClient, "page_bytes", flipped)
            found, row = first_decode(engine, prompt)
            assert torch.equal(found, keys)
            assert row.stats.bookmarks_taken == GROUP
            assert client.stats()["corrupt_detected"] == 1
            run_all(engine)


def test_groups_that_no_store_takes_change_nothing(
    small: Any, tmp_path: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    (prompt,) = prompts_of(TWO_GROUPS)
    store, refused = PageClient.store, []
    with store_pool(config, tmp_path) as pool:
        with page_client(config, pool, owner="first") as client:
            engine = make_engine(config, client)
            names = group_names(engine, prompt)

            def full(self: Any, key: PageKey, *rest: Any) -> Future[Any]:
                if key not in names:
                    return store(self, key, *rest)
                refused.append(key)
                future: Future[Any] = Future()
                future.set_exception(StoreFull("no room"))
                return future

            monkeypatch.setattr(PageClient, "store", full)
            keys, _ = first_decode(engine, prompt)
            tokens = run_all(engine)["row"]["token_ids"]
            assert engine.flow.flush(10.0)
            assert refused == names  # once each
        assert fill(config, pool, prompt)[1] == tokens
        assert sum(forwards) == TWO_GROUPS // PAGE
    assert keys.abs().max() > 0.1


def watched_steps(engine: Engine, until: Callable[[], bool]) -> list[tuple[str, int]]:
    """What steps did, in order: the row and the bookmarks made for it, or 0 for a token."""
    index, seen = index_of(engine), list[tuple[str, int]]()
    bring_up = index.bring_up

    def note(row: Row, n_pages: int) -> bool:
        before = row.stats.bookmarks_made
        done = bring_up(row, n_pages)
        seen.append((row.row_id, row.stats.bookmarks_made - before))
        return done

    index.bring_up = note  # type: ignore[method-assign]
    while not until():
        seen += [(event.row_id, 0) for event in engine.step() if event.kind == "token"]
    index.bring_up = bring_up  # type: ignore[method-assign]
    return seen


def test_other_rows_decode_while_a_context_is_indexed_again(small: Any, tmp_path: Path) -> None:
    (short,), (stored,) = prompts_of(700, seed=1), prompts_of(TWO_GROUPS)
    config = small(seed=4)
    alone = [answers(make_engine(config), [prompt], 40)[0] for prompt in (short, stored)]
    with store_pool(config, tmp_path) as pool:
        fill(small(), pool, stored)
        with page_client(config, pool, owner="second") as client:
            engine = make_engine(config, client)
            engine.submit(request("decoding", short, 40))
            decoding = step_until(engine, "decoding", RowState.DECODE)
            engine.submit(request("waiting", stored, 40))
            waiting = engine.rows[-1]
            seen = watched_steps(engine, lambda: waiting.state is RowState.DECODE)
            made = [i for i, (name, n) in enumerate(seen) if name == "waiting" and n > 0]
            assert [seen[i][1] for i in made] == [GROUP, GROUP, TWO_GROUPS // PAGE - 2 * GROUP]
            assert all(("decoding", 0) in seen[a:b] for a, b in itertools.pairwise(made))
            assert run_all(engine)["waiting"]["token_ids"] == alone[1]
            assert decoding.tokens == alone[0]


def test_a_row_that_is_being_indexed_again_can_be_cancelled(small: Any, tmp_path: Path) -> None:
    (prompt,) = prompts_of(TWO_GROUPS)
    config = small(seed=4)
    with store_pool(config, tmp_path) as pool:
        fill(small(), pool, prompt)
        with page_client(config, pool, owner="second") as client:
            engine = make_engine(config, client)
            engine.submit(request("row", prompt, N_NEW))
            (row,) = engine.rows
            watched_steps(engine, lambda: row.stats.bookmarks_made > 0)
            assert row.stats.bookmarks_made == GROUP
            engine.cancel("row")
            (event,) = engine.step()
            assert isinstance(event.error, Cancelled)
            assert engine.n_rows == 0
