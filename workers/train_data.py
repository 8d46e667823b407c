"""Text to train a bookmark retriever on: documentation inside installed packages, files, JSON lines.

Documents of packages are the docstrings of one source file each, in a fixed order, so that the same
versions give the same text anywhere. A document is held out by a hash of its name, never by chance.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..core.errors import BatchLineError, InvalidInput, NotFound

STDLIB = "python"
"""Stands for Python's own library in a list of packages."""
PACKAGES = (STDLIB, "numpy", "networkx", "matplotlib")
"""All under BSD, Apache-2.0 or PSF licences."""
HELD_OUT_SHARE = 0.1
MIN_CHARACTERS = 600
"""Shorter documents are left out: they fill no page."""
MIN_PARAGRAPH = 40
"""Paragraphs from this many characters on are kept once over all documents."""
_SKIPPED = {
    "tests",
    "test",
    "testing",
    "site-packages",
    "_vendor",
    "__pycache__",
    "lib2to3",
    "idlelib",
}
_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Document:
    """source: the name by which it is held out or not."""

    source: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question on a context; gold: [start, end) characters of the context that answer it."""

    text: str
    answer: str
    gold: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Example:
    """A context and the questions asked about it one after the other; none means plain text."""

    source: str
    context: str
    questions: tuple[Question, ...] = ()


def is_held_out(source: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a document of this name is kept from training; a function of its name alone."""
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# --- documents ------------------------------------------------------------------------------------


def package_documents(packages: Sequence[str] = PACKAGES) -> list[Document]:
    """Docstrings of packages, one document per source file, and Python's language reference.

    Raises NotFound for a package that is not installed.
    """
    found: list[Document] = []
    for package in packages:
        root = _root_of(package)
        if package == STDLIB:
            found += _language_reference()
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if _SKIPPED.isdisjoint(inside.parts):
                name = ".".join((package, *inside.with_suffix("").parts))
                found.append(Document(name, "\n\n".join(_docstrings(path))))
    return without_repeats(found)


def _root_of(package: str) -> Path:
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(f"package {package!r} is not installed; its documentation cannot be read")
    return Path(next(iter(spec.submodule_search_locations)))


def _language_reference() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(f"python.topics.{name}", text) for name, text in sorted(topics.items())]


def _docstrings(path: Path) -> Iterator[str]:
    """The module's, then of every class and function under its name, as they stand in the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # templates and files in other encodings
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_PARAGRAPH:
                name = getattr(node, "name", None)
                yield f"{name}\n{text}" if name else text


def file_documents(paths: Sequence[Path]) -> list[Document]:
    """Text files, and those with the endings .txt, .md, .rst below folders.

    Raises NotFound for a missing path, InvalidInput for one that is not UTF-8.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise NotFound(f"{path} does not exist; give a text file or a folder of them")
        inside = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        for each in inside if path.is_dir() else [path]:
            try:
                text = each.read_text(encoding="utf-8")
            except UnicodeDecodeError as exc:
                raise InvalidInput(f"{each}: is not UTF-8 text (byte {exc.start})") from exc
            found.append(Document(f"{path.name}/{each.relative_to(path)}", text))
    return without_repeats(found)


def without_repeats(documents: Iterable[Document]) -> list[Document]:
    """Each long paragraph where it stands first, and no document that is short without the others."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            plain = " ".join(paragraph.split())
            if len(plain) >= MIN_PARAGRAPH:
                digest = hashlib.sha256(plain.encode()).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            paragraphs.append(paragraph.rstrip())
        text = "\n\n".join(p for p in paragraphs if p).strip()
        if len(text) >= MIN_CHARACTERS:
            kept.append(Document(document.source, text))
    return kept


def licences(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Version and licence of each package, for the card of what was trained on it."""
    found = {}
    for package in packages:
        if package == STDLIB:
            found[package] = f"{sysconfig.get_python_version()}, PSF-2.0"
            continue
        about = metadata.metadata(package)
        stated = about.get_all("License-Expression") or about.get_all("License")
        licence = stated[0] if stated else "see its classifiers"
        found[package] = f"{about['Version']}, {licence.splitlines()[0]}"
    return found


# --- questions ------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[Example]:
    """Lines {"context", "question", and "answer" or "gold"}; gold: a span [start, end) of characters of
    the context, or a list of them. Without gold it is where the answer stands.

    Raises NotFound, or BatchLineError with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as exc:
        raise NotFound(f"{path} does not exist; give a JSONL file") from exc
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_example(json.loads(line), f"{path.name}:{number}"))
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                reason = f"has no {exc}" if isinstance(exc, KeyError) else str(exc)
                raise BatchLineError(f"{path}, line {number}: {reason}", line=number) from exc
    if not found:
        raise InvalidInput(f"{path} has no lines")
    return found


def _example(row: dict[str, Any], name: str) -> Example:
    context, question = str(row["context"]), str(row["question"])
    answer, gold = str(row.get("answer") or ""), row.get("gold")
    if gold is None:
        if not answer:
            raise ValueError("needs 'answer' or 'gold'")
        at = context.find(answer)
        if at < 0:
            raise ValueError(
                "the answer does not stand in the context; give 'gold' as [start, end]"
            )
        gold = [at, at + len(answer)]
    spans = gold if isinstance(gold[0], list) else [gold]
    for start, end in spans:
        if not 0 <= start < end <= len(context):
            raise ValueError(f"gold [{start}, {end}) lies outside a context of {len(context)}")
    return Example(
        name, context, (Question(question, answer, tuple((int(a), int(b)) for a, b in spans)),)
    )


def text_contexts(documents: Sequence[Document], n_characters: int, seed: int) -> Iterator[Example]:
    """Without end: contexts of several documents one after the other. Each document comes once in a
    round; one longer than half a context gives a run of it."""
    rng = random.Random(seed)
    waiting: list[Document] = []
    for i in itertools.count():
        parts: list[str] = []
        filled = 0
        while filled < n_characters:
            if not waiting:
                waiting = rng.sample(documents, len(documents))
            text = waiting.pop().text
            longest = n_characters // 2
            if len(text) > longest:
                start = rng.randrange(len(text) - longest)
                text = text[text.find(" ", start) + 1 :][:longest]
            parts.append(text)
            filled += len(text) + 2
        yield Example(f"text-{seed}-{i}", "\n\n".join(parts))
