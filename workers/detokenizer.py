"""Text of a growing answer, and the stop strings that end it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns token ids into text deltas; holds back bytes of an unfinished character."""

    def __init__(self, tokenizer: Any | None, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._pending: list[int] = []
        self._n_context = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token. After a stop string `stopped` is set, and the
        text ends before it."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._pending.append(token_id)
        piece = self._decode(self._pending)
        if piece.endswith(_REPLACEMENT) and len(self._pending) < 8:
            return ""
        # the last token stays as left context: some tokenizers drop a leading space without it
        delta = piece[len(self._decode(self._pending[: self._n_context])) :]
        self._pending = self._pending[-1:]
        self._n_context = 1
        return self._append(delta)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))  # type: ignore[union-attr]

    def _append(self, delta: str) -> str:
        before = len(self.text)
        self.text += delta
        for stop in self._stop:
            at = self.text.find(stop, max(0, before - len(stop)))
            if at >= 0:
                self.stopped = True
                self.text = self.text[:at]
        return self.text[before:] if len(self.text) > before else ""
