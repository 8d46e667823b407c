"""Content names of pages (DESIGN 1.1): PageKey = sha256(parent key, the page's tokens, recipe)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NewType

import msgpack
import numpy as np
from pydantic import BaseModel, ConfigDict

from .errors import InvalidInput

PageKey = NewType("PageKey", bytes)
RecipeFingerprint = NewType("RecipeFingerprint", bytes)

ROOT_KEY = PageKey(bytes(32))
KERNEL_REVISION = 4
"""Raised whenever a kernel change may alter the bits of computed KV."""

QUESTION_REVISION = 2
"""The same for what only a question's pages follow: a context's keep their names."""


class Recipe(BaseModel):
    """Everything that shapes the KV bytes of a page; only pages of equal recipes share bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_fingerprint: str
    """Hash of the weights and of the model configuration."""
    tokenizer_fingerprint: str
    """Hash of the tokenizer files and of the chat template."""
    kv_dtype: str
    """Storage format of K and V, a name of `cache.kv_dtype`."""
    n_layers: int
    """Decoder layers."""
    n_kv_heads: int
    """Key-value heads per layer."""
    head_dim: int
    """Elements per head."""
    page_tokens: int
    """Tokens per page."""
    attention_fingerprint: str
    """Hash of the layer policies that prefill ran with (selection shapes later layers' KV)."""
    rope_fingerprint: str
    """Hash of RoPE kind, frequencies and scaling."""
    device_class: str = "cpu"
    """Kind of device whose kernels computed the KV."""
    kernel_revision: int = KERNEL_REVISION
    """Revision of our kernels."""
    retriever_fingerprint: str = ""
    """Hash of the trained bookmarks, where prefill selects by them."""
    tenant: str = ""
    """Owner: pages are never shared between tenants."""

    def fingerprint(self) -> RecipeFingerprint:
        fields = self.model_dump()
        if not self.retriever_fingerprint:
            del fields["retriever_fingerprint"]  # the names that such pages have always had
        packed = msgpack.packb(sorted(fields.items()))
        return RecipeFingerprint(hashlib.sha256(packed).digest())


def page_keys(
    token_ids: Sequence[int] | np.ndarray,
    recipe: RecipeFingerprint,
    page_tokens: int,
    parent: PageKey = ROOT_KEY,
) -> list[PageKey]:
    """Keys of the full pages of a token sequence; the last, partial page has no name.

    token_ids: [n_tokens], non-negative, below 2**32. Returns n_tokens // page_tokens keys.
    Raises InvalidInput on any other value: wrapped around it would bear another text's name.
    """
    given = np.asarray(token_ids)
    if given.size and (
        given.dtype.kind not in "iu" or int(given.min()) < 0 or int(given.max()) >= 1 << 32
    ):
        raise InvalidInput(
            f"token ids must be integers in [0, 2**32), got {given.dtype} "
            f"from {given.min()} to {given.max()}"
        )
    tokens = given.astype("<u4", copy=False)
    keys: list[PageKey] = []
    for page_index in range(len(tokens) // page_tokens):
        page = tokens[page_index * page_tokens : (page_index + 1) * page_tokens]
        digest = hashlib.sha256(parent)
        digest.update(page.tobytes())
        digest.update(recipe)
        parent = PageKey(digest.digest())
        keys.append(parent)
    return keys


def prompt_keys(
    token_ids: Sequence[int] | np.ndarray,
    question_start: int,
    question_block: int,
    recipe: RecipeFingerprint,
    page_tokens: int,
) -> list[PageKey]:
    """Keys of a prompt's full pages. Those from question_start on were selected for in blocks of
    question_block queries, so their KV has other bits than a context's: they bear other names."""
    tokens = np.asarray(token_ids)
    n_context = min(question_start // page_tokens, len(tokens) // page_tokens)
    keys = page_keys(tokens[: n_context * page_tokens], recipe, page_tokens)
    shape = msgpack.packb([QUESTION_REVISION, question_start, question_block])
    own = hashlib.sha256(recipe + b"question:" + shape)
    parent = keys[-1] if keys else ROOT_KEY
    rest = tokens[n_context * page_tokens :]
    return keys + page_keys(rest, RecipeFingerprint(own.digest()), page_tokens, parent)


def private_recipe(recipe: RecipeFingerprint, row_id: str) -> RecipeFingerprint:
    """Recipe of pages made while decoding: they belong to their row alone (DESIGN 6.4)."""
    return RecipeFingerprint(hashlib.sha256(recipe + b"row:" + row_id.encode()).digest())
