from __future__ import annotations

import json
from pathlib import Path

import pytest

from longreach.cluster.local_documents import LocalDocuments


@pytest.fixture
def uploads() -> list[Path]:
    return []


@pytest.fixture
def documents(tmp_path: Path, uploads: list[Path]) -> LocalDocuments:
    def upload(path: Path) -> str:
        uploads.append(path)
        return f"ctx-{len(uploads)}"

    return LocalDocuments(tmp_path, upload)


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def test_a_file_beside_the_batch_is_uploaded_once_and_named_by_id(
    documents: LocalDocuments, uploads: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "doc.txt").write_text("text")
    batch = tmp_path / "batch.jsonl"
    rows = [{"custom_id": str(i), "context_uri": "doc.txt", "question": "é?"} for i in range(3)]
    batch.write_bytes(b"".join(line(**row) for row in rows))
    sent = [json.loads(x) for x in documents.lines(batch)]
    assert uploads == [tmp_path / "doc.txt"]
    assert sent == [
        {"custom_id": str(i), "context_id": "ctx-1", "question": "é?"} for i in range(3)
    ]
    assert documents.found


def test_the_current_directory_comes_first(
    documents: LocalDocuments,
    uploads: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for folder in (here, tmp_path):
        (folder / "doc.txt").write_text("text")
    monkeypatch.chdir(here)
    documents.rewrite(line(context_uri="doc.txt"))
    assert uploads == [here / "doc.txt"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"custom_id": "a", "context": "inline"}\n',
        b'{"context_uri": "missing.txt"}\n',
        b'{"context_uri": "s3://bucket/doc.txt"}\n',
        b'{"context_uri": 7}\n',
        b'{"context_uri": ""}\n',
        b'not json "context_uri"\n',
        b'["context_uri"]\n',
        b'{"context_uri": "' + b"x" * 5000 + b'"}\n',
        b'{"context_uri": "a\\u0000b"}\n',
    ],
)
def test_other_lines_stay_as_they_are(
    documents: LocalDocuments, uploads: list[Path], text: bytes
) -> None:
    assert documents.rewrite(text) == text
    assert not uploads
    assert not documents.found
