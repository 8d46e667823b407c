"""Examples as the model reads them: one stream of tokens, the questions asked one after the other."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .prompt import PromptBuilder
from .train_data import Example, Question


@dataclass(frozen=True)
class Ask:
    """position: of the last token before an answer; gold: [start, end) tokens that hold it."""

    position: int
    gold: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stream:
    """token_ids: int64 [n_tokens]"""

    name: str
    token_ids: np.ndarray
    asks: tuple[Ask, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


class StreamBuilder:
    """Conversations about one context, in a model's tokens and chat template."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self._encode, self.tokens = prompts.encode, prompts.encode_plain
        marks = [uuid.uuid4().hex for _ in range(3)]
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        rest = prompts.render(messages)
        parts = []
        for mark in marks:
            part, _, rest = rest.partition(mark)
            parts.append(part)
        self._before, self._answer, self._next = parts

    def cut(self, text: str, n_tokens: int) -> str:
        """The longest beginning of a text with at most n_tokens."""
        offsets = self._offsets(text)
        return text if len(offsets) <= n_tokens else text[: offsets[n_tokens][0]]

    def n_question_tokens(self, questions: Sequence[Question]) -> int:
        return sum(len(ids) for q in questions for ids in self._turn(q))

    def build(self, example: Example) -> Stream:
        """The context, then each question with its answer."""
        head = self._encode(self._before)
        context, offsets = self.tokens(example.context), self._offsets(example.context)
        starts = np.array([start for start, _ in offsets])
        ids, asks = head + context, []
        for i, question in enumerate(example.questions):
            if i:
                ids += self._encode(self._next)
            asked, answer = self._turn(question)
            ids += asked
            gold = []
            for start, end in question.gold:
                first = int(np.searchsorted(starts, start, side="right")) - 1
                last = int(np.searchsorted(starts, end, side="left"))
                gold.append((len(head) + max(0, first), len(head) + last))
            asks.append(Ask(len(ids) - 1, tuple(gold)))
            ids += answer
        return Stream(example.source, np.array(ids, dtype=np.int64), tuple(asks))

    def _turn(self, question: Question) -> tuple[list[int], list[int]]:
        asked = self.tokens(f"\n\n{question.text}") + self._encode(self._answer)
        return asked, self.tokens(question.answer)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoded = self._prompts.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        return list(encoded["offset_mapping"])
