"""A document read in one cluster is answered on in another: from a snapshot, by real processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.cluster.client import Client
from longreach.cluster.gateway import Gateway
from longreach.core.config import load_config
from longreach.core.errors import DataLoss, FailedPrecondition

from ..cluster.fakes import FakeRuntime
from ..workers.tiny import make_tiny
from .serving import Serve, rows_of, run_cli, text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PAGE_TOKENS = 64
FIRST, SECOND = rows_of(71, 2, 24, (1700,))


@pytest.fixture(scope="module")
def context_id(inprocess: Serve) -> str:
    """Of a document on which one question was asked."""
    made = str(inprocess.client.upload_context(FIRST["context"].encode()).context_id)
    ask(inprocess, FIRST, made)
    return made


@pytest.fixture(scope="module")
def snap(inprocess: Serve, context_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshots") / "document"
    written = run_cli("kv", "snapshot", context_id, path, "--address", inprocess.address)
    assert written.returncode == 0, written.stderr
    assert written.stdout == f"{context_id}\n"
    return path


def ask(serve: Serve, row: dict[str, Any], context_id: str) -> Any:
    return serve.client.ask(
        row["question"], context_id=context_id, sampling={"max_tokens": row["max_tokens"]}
    )


def test_a_fresh_cluster_answers_from_a_snapshot_without_reading_again(
    inprocess: Serve, new_serve: Callable[..., Serve], context_id: str, snap: Path
) -> None:
    manifest = json.loads((snap / "manifest.json").read_text())
    fresh = new_serve("inprocess")
    restored = run_cli("kv", "restore", snap, "--json", "--address", fresh.address)
    assert restored.returncode == 0, restored.stderr
    assert json.loads(restored.stdout)["n_pages"] == manifest["n_pages"] > 40
    answer = ask(fresh, SECOND, context_id)
    # nothing but what follows the last full page of the context
    assert answer.stats["tokens_reused"] == manifest["n_tokens"]
    assert answer.stats["tokens_prefilled"] == answer.stats["tokens_prompt"] - manifest["n_tokens"]
    assert answer.stats["tokens_prefilled"] < 2 * PAGE_TOKENS
    assert answer.stats["pages_recomputed"] == 0
    # and the tokens are those of the cluster that read it, and of one that reads it now
    assert answer.text == ask(inprocess, SECOND, context_id).text
    run_cli("kv", "drop", "--all", "--address", fresh.address)
    again = ask(fresh, SECOND, context_id)
    assert again.stats["tokens_reused"] == 0
    assert again.text == answer.text
    assert fresh.stop() == 0


@pytest.fixture
def other_model(model_dir: Path, tmp_path: Path) -> Path:
    """Other weights with the same tokenizer."""
    directory = make_tiny("qwen3", tmp_path / "model", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_dir / name, directory / name)
    return directory


def test_another_format_model_or_policy_refuses_it_by_name(
    config_file: Path, snap: Path, other_model: Path, tmp_path: Path
) -> None:
    """Gateways of other configurations; it is refused before any store is asked."""
    others = {
        "cache.kv_dtype=float16": r"another KV format: kv_dtype is 'float32' in .* 'float16' here",
        f"model.name={other_model}": r"another model .*: model_fingerprint is",
        "attention.policies.0.window=64": r"other layer policies: attention_fingerprint is",
        "cache.page_tokens=128": r"another page size: page_tokens is 64 in the snapshot and 128 here",
    }
    for i, (assignment, named) in enumerate(others.items()):
        sets = [assignment, f"gateway.state_dir={tmp_path / str(i)}", "gateway.port=0"]
        gateway = Gateway(load_config([config_file], sets), FakeRuntime())
        try:
            with (
                Client(gateway.start()) as client,
                pytest.raises(FailedPrecondition, match=named),
            ):
                list(client.kv.restore(str(snap)))
        finally:
            gateway.stop()


def test_a_flipped_byte_is_refused_by_name(inprocess: Serve, snap: Path, tmp_path: Path) -> None:
    part = snap / "pages-00000.bin"
    good = part.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 4
    part.write_bytes(bad)
    try:
        with pytest.raises(DataLoss, match=r"pages-00000\.bin is damaged: page \d+ .* leaf \d+"):
            list(inprocess.client.kv.restore(str(snap)))
        failed = run_cli("kv", "restore", snap, "--address", inprocess.address)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: DATA_LOSS: ")
    finally:
        part.write_bytes(good)


def test_a_document_that_nobody_read_cannot_be_taken(inprocess: Serve, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(text_of(7171, 400))
    failed = run_cli(
        *("kv", "snapshot", document, tmp_path / "snap", "--text-file"),
        *("--address", inprocess.address),
    )
    assert failed.returncode == 1
    assert "read the document again first" in failed.stderr
    assert not (tmp_path / "snap").exists()


def test_operators_see_real_stores(inprocess: Serve, context_id: str) -> None:
    stat = json.loads(run_cli("kv", "stat", "--json", "--address", inprocess.address).stdout)
    assert [store["state"] for store in stat["stores"]] == ["live", "live"]
    assert stat["totals"]["hits_arena"] + stat["totals"]["misses"] > 0
    checked = run_cli("kv", "verify", "--json", "--address", inprocess.address)
    assert checked.returncode == 0, checked.stderr
    assert sum(s["checked"] for s in json.loads(checked.stdout)["stores"]) > 80
    top = run_cli("top", "--once", "--address", inprocess.address)
    assert top.returncode == 0, top.stderr
    for part in ("worker-0", "store-0", "store-1"):
        assert part in top.stdout


def test_dropped_pages_come_back_from_a_snapshot(serve: Serve, tmp_path: Path) -> None:
    """In both wirings, over the wire that each has."""
    row, later = rows_of(72 + len(serve.command), 2, 8, (900,))
    context_id = str(serve.client.upload_context(row["context"].encode()).context_id)
    ask(serve, row, context_id)
    done = list(serve.client.kv.snapshot(context_id, str(tmp_path / "snap")))[-1].done
    assert done.n_pages > 20
    dropped = serve.client.kv.drop(context_id)
    assert [(store.n_dropped, store.error) for store in dropped.stores] == [(done.n_pages, "")] * 2
    list(serve.client.kv.restore(str(tmp_path / "snap")))
    assert ask(serve, later, context_id).stats["tokens_reused"] == done.n_tokens
