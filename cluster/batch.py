"""Batch lines to rows: the OpenAI batch shape and ours, strict. A bad line fails only its row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from ..core.config import Config
from ..core.errors import AlreadyExists, BatchLineError, LongreachError
from .line_shapes import MAX_CUSTOM_ID_CHARS, parse_openai_line, parse_our_line
from .row import RowSpec


@dataclass(frozen=True)
class BatchRow:
    """One line's outcome: `spec`, or `error` (then `custom_id` is what could be read, or empty)."""

    line: int
    custom_id: str
    spec: RowSpec | None = None
    error: LongreachError | None = None


@dataclass(frozen=True)
class _Oversized:
    n_bytes: int


class LineSplitter:
    """Cuts a stream of byte chunks into lines, never holding more than one line's bound."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._n_bytes = 0
        self._line = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | _Oversized]]:
        """(1-based line number, line without its newline) for each line that the chunk ends."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk[start:end])
            yield self._take()
            start = end + 1
        self._add(chunk[start:])

    def finish(self) -> Iterator[tuple[int, bytes | _Oversized]]:
        """The last line, if the stream did not end with a newline."""
        if self._n_bytes:
            yield self._take()

    def _add(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._n_bytes <= self._max:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _take(self) -> tuple[int, bytes | _Oversized]:
        self._line += 1
        line: bytes | _Oversized = (
            b"".join(self._parts) if self._n_bytes <= self._max else _Oversized(self._n_bytes)
        )
        self._parts = []
        self._n_bytes = 0
        return self._line, line


def parse_batch(chunks: Iterable[bytes], config: Config) -> Iterator[BatchRow]:
    """Rows of a JSONL stream in file order; empty lines are skipped but counted."""
    splitter = LineSplitter(config.gateway.max_line_bytes)
    first_line: dict[str, int] = {}

    def rows(lines: Iterable[tuple[int, bytes | _Oversized]]) -> Iterator[BatchRow]:
        for number, line in lines:
            if isinstance(line, bytes) and not line.strip():
                continue
            row = parse_line(number, line, config)
            known = first_line.setdefault(row.custom_id, number) if row.custom_id else number
            if known != number:
                error = AlreadyExists(
                    f"line {number}: custom_id '{row.custom_id}' was used in line {known}; "
                    "give each row its own",
                    line=number,
                    field="custom_id",
                )
                row = BatchRow(number, row.custom_id, error=error)
            yield row

    for chunk in chunks:
        yield from rows(splitter.feed(chunk))
    yield from rows(splitter.finish())


def parse_line(number: int, line: bytes | _Oversized, config: Config) -> BatchRow:
    """One line to a row. Never raises; what is wrong is in `error`, with line number and field."""
    custom_id = ""
    try:
        values = _read_json(number, line, config)
        given = values.get("custom_id")
        if isinstance(given, str) and len(given) <= MAX_CUSTOM_ID_CHARS:
            custom_id = given
        spec = (
            parse_openai_line(values, config)
            if "body" in values
            else parse_our_line(values, config)
        )
        return BatchRow(number, custom_id, spec=spec)
    except ValidationError as exc:
        return BatchRow(number, custom_id, error=_line_error(number, exc))
    except LongreachError as exc:
        exc.details.setdefault("line", number)
        if not exc.message.startswith(f"line {number}:"):
            exc = type(exc)(f"line {number}: {exc.message}", **exc.details)
        return BatchRow(number, custom_id, error=exc)


def _read_json(number: int, line: bytes | _Oversized, config: Config) -> dict[str, Any]:
    if isinstance(line, _Oversized):
        raise BatchLineError(
            f"line {number}: {line.n_bytes} bytes exceed gateway.max_line_bytes "
            f"({config.gateway.max_line_bytes}); upload the context and give its context_id",
            line=number,
        )
    if line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]  # editors on Windows put a byte order mark before the first line
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BatchLineError(
            f"line {number}: not valid UTF-8 at byte {exc.start}", line=number
        ) from exc
    try:
        values = from_json(line, allow_inf_nan=False, cache_strings="keys")
    except ValueError as exc:
        raise BatchLineError(f"line {number}: not valid JSON: {exc}", line=number) from exc
    if not isinstance(values, dict):
        raise BatchLineError(
            f"line {number}: expected a JSON object, got {type(values).__name__}", line=number
        )
    return values


def _line_error(number: int, exc: ValidationError) -> BatchLineError:
    first = exc.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return BatchLineError(f"line {number}: {field}: {message}", line=number, field=field)
