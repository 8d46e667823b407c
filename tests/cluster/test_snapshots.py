"""Snapshots over real stores: written, restored into another cluster, refused by name, cut short."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.cluster.proto import kv_pb2
from longreach.cluster.snapshots import Snapshots
from longreach.core.errors import (
    AlreadyExists,
    DataLoss,
    EmptyContext,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    StoreFull,
    UnreadableUri,
)
from longreach.core.page_key import Recipe
from longreach.kvstore import snapshot_file
from longreach.kvstore.snapshot_file import SnapshotReader

from .fakes import GEOMETRY, PAGE_TOKENS
from .kv_cluster import DOCUMENT, N_PAGES, RECIPE, KvCluster, flip

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pages a file and a batch, so that a document has several."""
    n_bytes = 3 * GEOMETRY.page_nbytes
    monkeypatch.setattr(snapshot_file.SnapshotWriter.__init__, "__defaults__", (n_bytes,))
    monkeypatch.setattr("longreach.cluster.snapshots.pages_per_part", lambda geometry: 3)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KvCluster]:
    with KvCluster(tmp_path / "first") as made:
        yield made


@pytest.fixture
def snap(cluster: KvCluster, tmp_path: Path) -> Path:
    """A snapshot of the document."""
    path = tmp_path / "snap"
    list(cluster.client.kv.snapshot(cluster.read(), str(path)))
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[KvCluster]:
    with KvCluster(tmp_path / "second", 3) as made:
        yield made


def restored(cluster: KvCluster, path: Path | str) -> kv_pb2.SnapshotUpdate:
    return list(cluster.client.kv.restore(str(path)))[-1]


def assert_untouched(cluster: KvCluster) -> None:
    assert cluster.stat("pages_held") == [0] * len(cluster.names)
    assert cluster.stat("pages_stored") == [0] * len(cluster.names)


def assert_nothing_pinned(cluster: KvCluster) -> None:
    assert cluster.stat("pages_pinned") == cluster.stat("writes_open") == [0] * len(cluster.names)


def test_a_snapshot_becomes_pages_and_context_of_a_fresh_cluster(
    cluster: KvCluster, fresh: KvCluster, tmp_path: Path
) -> None:
    context_id = cluster.read()
    path = tmp_path / "snap"
    written = list(cluster.client.kv.snapshot(context_id, str(path)))
    assert written[0].phase == "tokens"
    assert [u.pages for u in written if u.phase == "pages"] == [3, 6, 9, 10]
    done = written[-1].done
    assert (done.context_id, done.n_pages) == (context_id, N_PAGES)
    assert done.n_tokens == N_PAGES * PAGE_TOKENS
    files = [entry for entry in path.iterdir() if entry.name != "manifest.json"]
    assert done.n_bytes == sum(entry.stat().st_size for entry in files)
    assert_nothing_pinned(cluster)

    with pytest.raises(NotFound):
        fresh.client.kv.drop(context_id)
    update = restored(fresh, path)
    assert update.phase == "done"
    assert update.done.context_id == context_id
    keys = fresh.keys()
    assert fresh.n_held(keys) == [2] * N_PAGES  # with their replicas
    fresh.check_pages(keys)
    assert_nothing_pinned(fresh)
    # the context is known: a row that names it can run, and it can be told again
    events = list(fresh.client.generate("who", context_id=context_id, sampling={"max_tokens": 1}))
    assert events[-1].answer.usage.prompt_tokens == len(DOCUMENT.split()) + 1
    again = tmp_path / "again"
    list(fresh.client.kv.snapshot(context_id, str(again)))
    assert SnapshotReader(str(again)).manifest.files == SnapshotReader(str(path)).manifest.files


def test_at_a_uri(cluster: KvCluster, fresh: KvCluster) -> None:
    uri = f"memory://{uuid.uuid4().hex}"
    list(cluster.client.kv.snapshot(cluster.read(), uri))
    assert restored(fresh, uri).done.n_pages == N_PAGES
    fresh.check_pages(fresh.keys())


def test_without_text_the_pages_are_found_by_who_uploads_it_again(
    cluster: KvCluster, fresh: KvCluster, tmp_path: Path
) -> None:
    context_id = cluster.read()
    list(cluster.client.kv.snapshot(context_id, str(tmp_path / "snap"), with_text=False))
    assert not (tmp_path / "snap" / "document").exists()
    assert restored(fresh, tmp_path / "snap").done.context_id == ""
    with pytest.raises(NotFound):
        fresh.client.kv.drop(context_id)
    fresh.check_pages(fresh.keys())
    fresh.client.upload_context(DOCUMENT.encode())
    assert [s.n_dropped for s in fresh.client.kv.drop(context_id).stores] != [0, 0, 0]


def test_restoring_twice_changes_nothing(snap: Path, fresh: KvCluster) -> None:
    restored(fresh, snap)
    stored = fresh.stat("pages_stored")
    assert restored(fresh, snap).done.n_pages == N_PAGES
    assert fresh.stat("pages_stored") == stored
    assert fresh.stat("mismatched_duplicates") == [0, 0, 0]
    assert_nothing_pinned(fresh)


OTHERS = {
    "model_fingerprint": ("another one", "another model"),
    "tokenizer_fingerprint": ("letters", "another tokenizer"),
    "kv_dtype": ("float16", "another KV format"),
    "page_tokens": (32, "another page size"),
    "attention_fingerprint": ("pruned", "other layer policies"),
    "kernel_revision": (99, "another revision of the kernels"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_pages_of_another_recipe_are_refused_by_name(
    snap: Path, tmp_path: Path, field: str
) -> None:
    value, meaning = OTHERS[field]
    recipe = Recipe.model_validate({**RECIPE.model_dump(), field: value})
    with KvCluster(tmp_path / "other", 2, 64, recipe) as other:
        with pytest.raises(FailedPrecondition, match=meaning) as caught:
            restored(other, snap)
        assert caught.value.details["field"] == field
        assert caught.value.details["snapshot"] == str(RECIPE.model_dump()[field])
        assert caught.value.details["here"] == str(value)
        assert_untouched(other)


FILES = ("manifest.json", "tokens.bin", "checksums.bin", "document", "pages-00003.bin")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_refused_before_anything_is_stored(
    snap: Path, fresh: KvCluster, name: str
) -> None:
    path = snap / name
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(good), 3).tolist():
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises((DataLoss, FailedPrecondition), match=name.replace(".", r"\.")):
            restored(fresh, snap)
        assert_untouched(fresh)
    path.write_bytes(good)
    restored(fresh, snap)


def test_missing_and_short_parts_are_refused_before_anything_is_stored(
    snap: Path, fresh: KvCluster
) -> None:
    last = snap / "pages-00003.bin"
    good = last.read_bytes()
    last.write_bytes(good[:-1])
    with pytest.raises(DataLoss, match=r"pages-00003\.bin has"):
        restored(fresh, snap)
    last.unlink()
    with pytest.raises(DataLoss, match=r"pages-00003\.bin is missing"):
        restored(fresh, snap)
    (snap / "manifest.json").unlink()
    with pytest.raises(FailedPrecondition, match="no snapshot"):
        restored(fresh, snap)
    with pytest.raises(NotFound):
        restored(fresh, snap / "absent")
    assert_untouched(fresh)


def test_a_text_that_is_not_the_tokens_is_refused(
    cluster: KvCluster, fresh: KvCluster, tmp_path: Path
) -> None:
    """Whole and with good checksums, but of two documents: nothing but the tokens can tell."""
    path, other = tmp_path / "snap", tmp_path / "other"
    list(cluster.client.kv.snapshot(cluster.read(), str(path)))
    list(cluster.client.kv.snapshot(cluster.read(DOCUMENT.replace("word", "term")), str(other)))
    reader = SnapshotReader(str(path))
    swapped = reader.manifest.model_copy(
        update={"document": SnapshotReader(str(other)).manifest.document}
    )
    (path / "manifest.json").write_bytes(snapshot_file.encode(swapped))
    os.replace(other / "document", path / "document")
    with pytest.raises(DataLoss, match="the document does not give the snapshot's tokens"):
        restored(fresh, path)
    mixed = reader.manifest.model_copy(
        update={"tokens": SnapshotReader(str(other)).manifest.tokens}
    )
    (path / "manifest.json").write_bytes(snapshot_file.encode(mixed))
    os.replace(other / "tokens.bin", path / "tokens.bin")
    with pytest.raises(DataLoss, match=r"tokens\.bin do not give the key"):
        restored(fresh, path)
    assert_untouched(fresh)


def test_a_missing_page_is_named_and_nothing_is_left(cluster: KvCluster, tmp_path: Path) -> None:
    context_id = cluster.read()
    for store in cluster.live():
        store.real.handle("drop", {"keys": [cluster.keys()[7]]}, [])
    with pytest.raises(DataLoss, match=r"page 7 of 10 .* read the document again first"):
        list(cluster.client.kv.snapshot(context_id, str(tmp_path / "snap")))
    assert not list(tmp_path.glob("snap*"))
    assert_nothing_pinned(cluster)


def test_a_page_evicted_in_the_middle_is_named_and_nothing_is_left(
    cluster: KvCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context_id, keys = cluster.read(), cluster.keys()
    add = snapshot_file.SnapshotWriter.add
    n_added = 0

    def add_and_evict(self: snapshot_file.SnapshotWriter, *args: object) -> None:
        nonlocal n_added
        add(self, *args)  # type: ignore[arg-type]
        n_added += 1
        if n_added == 2:
            # the batch that is being written is pinned and keeps its bytes, the last pages go
            for store in cluster.live():
                store.real.handle("drop", {"keys": [keys[2], *keys[8:]]}, [])

    monkeypatch.setattr(snapshot_file.SnapshotWriter, "add", add_and_evict)
    with pytest.raises(DataLoss, match=r"page 8 of 10 .* read the document again first"):
        list(cluster.client.kv.snapshot(context_id, str(tmp_path / "snap")))
    assert n_added == 8
    assert not list(tmp_path.glob("snap*"))
    assert_nothing_pinned(cluster)


def test_a_corrupt_copy_never_reaches_a_snapshot(
    cluster: KvCluster, fresh: KvCluster, tmp_path: Path
) -> None:
    context_id = cluster.read()
    for i, key in enumerate(cluster.keys()):
        flip(cluster.stores[f"store-{i % 2}"], key)  # one of two copies
    list(cluster.client.kv.snapshot(context_id, str(tmp_path / "snap")))
    restored(fresh, tmp_path / "snap")
    fresh.check_pages(fresh.keys())
    for store in cluster.live():  # and both of one page
        if store.real.handle("lookup", {"keys": [cluster.keys()[3]]}, []).header["held"][0]:  # type: ignore[union-attr]
            flip(store, cluster.keys()[3])
    with pytest.raises(DataLoss, match="page 3 of 10"):
        list(cluster.client.kv.snapshot(context_id, str(tmp_path / "bad")))


def test_a_restore_cut_short_can_be_done_again(snap: Path, fresh: KvCluster) -> None:
    for update in fresh.client.kv.restore(str(snap)):
        if update.phase == "store":
            break  # the client is gone
    restored(fresh, snap)
    fresh.check_pages(fresh.keys())
    assert_nothing_pinned(fresh)


def test_a_snapshot_cut_short_leaves_nothing(
    cluster: KvCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context_id, reached, go_on = cluster.read(), threading.Event(), threading.Event()
    add = snapshot_file.SnapshotWriter.add

    def slow(self: snapshot_file.SnapshotWriter, *args: object) -> None:
        add(self, *args)  # type: ignore[arg-type]
        if len(list(tmp_path.glob("snap*/pages-00001.bin"))):
            reached.set()
            go_on.wait(10)

    monkeypatch.setattr(snapshot_file.SnapshotWriter, "add", slow)
    updates = cluster.client.kv.snapshot(context_id, str(tmp_path / "snap"))
    assert next(updates).phase == "tokens"
    assert reached.wait(10)
    updates.close()  # type: ignore[attr-defined]
    go_on.set()
    for _ in range(100):
        if not list(tmp_path.glob("snap*")) and not any(cluster.stat("pages_pinned")):
            break
        threading.Event().wait(0.05)
    assert not list(tmp_path.glob("snap*"))
    assert_nothing_pinned(cluster)


def test_a_store_dies_while_pages_are_restored(snap: Path, fresh: KvCluster) -> None:
    for update in fresh.client.kv.restore(str(snap)):
        if update.phase == "store" and update.pages == 3:
            fresh.runtime.lose_store("store-1")
    assert update.phase == "done"
    fresh.check_pages(fresh.keys())


def test_too_large_for_the_stores_is_told_before_anything_is_stored(
    snap: Path, tmp_path: Path
) -> None:
    with KvCluster(tmp_path / "small", 2, 9) as small:
        with pytest.raises(StoreFull, match=r"needs 20 page slots .* have 18"):
            restored(small, snap)
        assert_untouched(small)


def test_pages_that_rows_push_out_meanwhile_are_missed(
    snap: Path, fresh: KvCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = Snapshots._settle

    def settle_and_evict(self: Snapshots, client: Any, batch: Any, row: str) -> None:
        settle(self, client, batch, row)
        if row == "restore/3":
            for store in fresh.live():
                store.real.handle("drop", {"keys": fresh.keys()[:2]}, [])

    monkeypatch.setattr(Snapshots, "_settle", settle_and_evict)
    with pytest.raises(StoreFull, match=r"2 of 10 pages .* were evicted again"):
        restored(fresh, snap)
    with pytest.raises(NotFound):  # not known, as its pages are not
        fresh.client.kv.drop(SnapshotReader(str(snap)).manifest.context_id)


def test_what_is_asked_wrongly(cluster: KvCluster, tmp_path: Path) -> None:
    kv = cluster.client.kv
    with pytest.raises(NotFound, match="no context"):
        list(kv.snapshot("ctx-" + "0" * 64, str(tmp_path / "snap")))
    with pytest.raises(InvalidInput, match="context_id is missing"):
        list(kv.snapshot("", str(tmp_path / "snap")))
    with pytest.raises(UnreadableUri, match="protocol 'ftp' is not allowed"):
        list(kv.snapshot(cluster.read(), "ftp://host/snap"))
    with pytest.raises(UnreadableUri, match="not allowed"):
        list(kv.restore("ftp://host/snap"))
    short = cluster.client.upload_context(b"three short words").context_id
    with pytest.raises(InvalidInput, match="3 tokens, a page has 16"):
        list(kv.snapshot(short, str(tmp_path / "snap")))
    with pytest.raises(EmptyContext):
        cluster.client.upload_context(b" ")
    list(kv.snapshot(cluster.read(), str(tmp_path / "snap")))
    with pytest.raises(AlreadyExists, match="is a snapshot already"):
        list(kv.snapshot(cluster.read(), str(tmp_path / "snap")))
    assert len(os.listdir(tmp_path / "snap")) == 4 + 4
