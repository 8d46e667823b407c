"""From text to tokens, laid out so that a context's pages never depend on the question."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.config import Config
from ..core.errors import EmptyContext, InvalidInput
from ..core.page_key import PageKey, prompt_keys
from .model_source import model_dir, recipe_for


@dataclass(frozen=True)
class Prompt:
    """token_ids: uint32 [n_tokens]; the first n_context_tokens do not depend on the question."""

    token_ids: np.ndarray
    n_context_tokens: int

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


class PromptBuilder:
    """Tokenizer and chat template of the configured model; loads no weights."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoTokenizer

        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir(config.model))
        self._special = tuple(self._tokenizer.get_added_vocab())
        self._recipes: dict[str, bytes] = {}

    @classmethod
    def from_config(cls, config: Config) -> PromptBuilder:
        return cls(config)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokens of a text of our own making: template markers become special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of a user's text: whatever it spells, it never becomes a special token."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(ids["input_ids"])

    def count(self, text: str) -> int:
        """Tokens of a text, without any template."""
        return len(self.encode_plain(text))

    def _join(self, *parts: tuple[str, bool]) -> list[int]:
        """Tokens of alternating (text, is the user's) parts.

        Tokenized as one string, as the model was trained, unless a user's part spells a special
        token: then the parts are tokenized apart, so that no document can end the user's turn.
        """
        if any(user and self._spells_special(text) for text, user in parts):
            ids: list[int] = []
            for text, user in parts:
                ids += self.encode_plain(text) if user else self.encode(text)
            return ids
        return self.encode("".join(text for text, _ in parts))

    def _spells_special(self, text: str) -> bool:
        return any(token in text for token in self._special)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The model's chat template, or blank lines where it has none. Raises InvalidInput where the template
        refuses the messages."""
        if self._tokenizer.chat_template is None:
            return "\n\n".join(m["content"] for m in messages) + "\n\n"
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as exc:
            raise InvalidInput(f"the model's chat template refuses these messages: {exc}") from exc

    def build(self, context: str, question: str, answer_prefix: str = "") -> Prompt:
        """Template, context, question, then the answer's opening words.

        The context and what follows are tokenized apart, so that the split never moves.
        Raises EmptyContext for a context without any token.
        """
        if not context.strip():
            raise EmptyContext("the context has no tokens; give a non-empty context")
        marker = uuid.uuid4().hex
        rendered = self.render([{"role": "user", "content": marker}])
        before, found, after = rendered.partition(marker)
        if not found:
            raise InvalidInput("the model's chat template drops the user's message")
        head = self._join((before, False), (context, True))
        tail = self._join((f"\n\n{question}", True), (after, False), (answer_prefix, True))
        return Prompt(np.asarray(head + tail, dtype=np.uint32), len(head))

    def build_messages(self, messages: list[dict[str, Any]], answer_prefix: str = "") -> Prompt:
        """Chat messages as they are; every message but the last counts as context.

        With a single message the context is that message up to its last blank line.
        """
        plain = [{"role": str(m["role"]), "content": _text_of(m["content"])} for m in messages]
        if not plain or not any(m["content"].strip() for m in plain):
            raise EmptyContext("the messages have no text; give at least one non-empty message")
        context, split, question = plain[-1]["content"].rpartition("\n\n")
        marker = uuid.uuid4().hex
        shown = [*plain[:-1], {"role": plain[-1]["role"], "content": marker}]
        before, found, after = self.render(shown).partition(marker)
        if not found:
            raise InvalidInput("the model's chat template drops the last message")
        head = self._join((before, False), (context, True))
        tail = self._join((split + question, True), (after, False), (answer_prefix, True))
        return Prompt(np.asarray(head + tail, dtype=np.uint32), len(head))

    def page_keys(self, prompt: Prompt, tenant: str = "") -> list[PageKey]:
        """Content names of the prompt's full pages."""
        if tenant not in self._recipes:
            self._recipes[tenant] = recipe_for(self._config, tenant).fingerprint()
        recipe = self._recipes[tenant]
        attention = self._config.attention
        return prompt_keys(
            prompt.token_ids,
            attention.question_start(prompt.n_tokens, prompt.n_context_tokens),
            attention.question_block,
            recipe,  # type: ignore[arg-type]
            self._config.cache.page_tokens,
        )

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _text_of(content: Any) -> str:
    """Message content: a string, or a list of text parts (OpenAI shape)."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.get("type") != "text":
            raise InvalidInput(f"message part of type {part.get('type')!r} is not supported")
        parts.append(str(part["text"]))
    return "".join(parts)
