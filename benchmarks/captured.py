"""Real queries, keys and values: what the embedded model computes while it reads a held-out text.

Attention is exact and dense, in float32, within the trained window, so that it is the truth which
selections are compared with. A capture takes a minute or two and is kept in the user's cache.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreach.core.config import Config
from longreach.core.stage import QUERY_BLOCK
from longreach.kernels.ops import PagedKV, Rope
from longreach.workers.dense_pieces import PIECE, dense_probabilities, weighted
from longreach.workers.embedded import cache_dir
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import model_dir
from longreach.workers.prompt import Prompt, PromptBuilder

from .facts import DOCUMENT_FACTS, Fact
from .texts import Count, build_text

ROOT = Path(__file__).resolve().parent.parent
SEED = 400
"""Of the first text; `texts.needles` and `texts.documents` use none this large."""
REVISION = 1
"""Of the files in the cache: raise it when what they hold changes."""
N_RECENT = 128
"""Last positions whose queries are all kept: two query blocks, and ages of a mask."""
N_SPREAD = 32
FACT_DEPTHS = (0.08, 0.24, 0.4, 0.56, 0.72)
PAGE_TOKENS = 64

Say = Callable[[str], None]


@dataclass(frozen=True)
class Capture:
    """One prompt. Nothing is rotated; L layers, T tokens, n kept queries."""

    name: str
    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [n], ascending: whose queries are kept."""
    q: Tensor
    """float32 [L, H, n, D]"""
    context: Tensor
    """float32 [L, 2 (K, V), Hkv, T0, D] of the first T0 tokens, which several captures may share."""
    tail: Tensor
    """float32 [L, 2, Hkv, T - T0, D] of the others."""
    hidden: Tensor
    """float32 [n, hidden]: the model's last hidden states."""
    inv_freq: Tensor
    scale: float
    next_token: int
    """What dense attention says next, greedily."""
    gold: int = -1
    """Token with which the answer of a hidden fact begins; -1 without a fact."""

    @functools.cached_property
    def rope(self) -> Rope:
        return Rope(self.inv_freq)

    @property
    def found(self) -> bool:
        """Whether dense attention begins the answer rightly."""
        return self.gold >= 0 and int(self.token_ids[self.gold]) == self.next_token

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """[Hkv, T, D] each."""
        k, v = torch.cat((self.context[layer], self.tail[layer]), dim=2)
        return k, v

    def queries(self, layer: int, start: int, n: int) -> Tensor:
        """[H, n, D] at positions start ...; all of them must have been kept."""
        first = int(torch.searchsorted(self.positions, start))
        if self.positions[first : first + n].tolist() != list(range(start, start + n)):
            raise ValueError(f"queries [{start}, {start + n}) of {self.name} were not kept")
        return self.q[layer, :, first : first + n]


def paged(k: Tensor, v: Tensor) -> PagedKV:
    """Pages of one layer, as a device bank holds them. k, v: [Hkv, T, D]."""
    n_kv_heads, n_tokens, _ = k.shape
    n_pages = -(-n_tokens // PAGE_TOKENS)
    padded = torch.zeros(2, n_kv_heads, n_pages * PAGE_TOKENS, k.shape[2])
    padded[:, :, :n_tokens] = torch.stack((k, v))
    leaves = padded.unflatten(2, (n_pages, PAGE_TOKENS)).permute(1, 2, 0, 3, 4).flatten(0, 1)
    row = torch.arange(n_kv_heads * n_pages).view(n_kv_heads, n_pages)
    return PagedKV((leaves.contiguous(),), torch.zeros_like(row), row, PAGE_TOKENS, n_tokens)


# --- dense attention that remembers ---------------------------------------------------------------


class DenseStep:
    """Exact attention over all earlier tokens; K and V go to `kv`, wanted queries to `q`."""

    def __init__(self, rope: Rope, kv: Tensor, q: Tensor, first: int, wanted: Tensor) -> None:
        """kv: [L, 2, Hkv, T, D], filled before `first`; q: [L, H, len(wanted), D]; wanted: positions
        at or after `first`."""
        self.scale = 0.0
        self._rope, self._kv, self._q = rope, kv, q
        self._first, self._wanted = first, wanted - first

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        first, n_queries = self._first, q.shape[1]
        last, self.scale = first + n_queries, scale
        kv = self._kv[layer, :, :, :last]
        kv[0, :, first:], kv[1, :, first:] = k, v
        self._q[layer] = q[:, self._wanted]
        keys = self._rope.rotate(kv[0], torch.arange(last))
        rotated = self._rope.rotate(q, torch.arange(first, last))
        out = torch.empty(n_queries, q.shape[0], q.shape[2])
        for at in range(0, n_queries, PIECE):
            piece = rotated[:, at : at + PIECE]
            weights = dense_probabilities(piece, first + at, keys, scale)
            out[at : at + PIECE] = weighted(weights, kv[1]).transpose(0, 1)
        return out


def read(model: ModelAdapter, asked: Sequence[tuple[str, Prompt]]) -> list[Capture]:
    """Dense captures of prompts that share their context, which is read once, up to the edge of a
    query block.

    Kept are all queries after that, or, of a prompt that is all context, the last N_RECENT and
    N_SPREAD others over the last quarter.
    """
    ids = [torch.from_numpy(prompt.token_ids.astype("int64")) for _, prompt in asked]
    shared = min(asked[0][1].n_context_tokens // QUERY_BLOCK * QUERY_BLOCK, len(ids[0]))
    kv_shape = (model.n_kv_heads, max(map(len, ids)), model.head_dim)
    kv = torch.zeros(model.n_layers, 2, *kv_shape)

    def forward(tokens: Tensor, first: int, wanted: Tensor) -> dict[str, Any]:
        q = torch.zeros(model.n_layers, model.n_heads, len(wanted), model.head_dim)
        step = DenseStep(model.rope, kv, q, first, wanted)
        hidden = model.hidden(tokens, step, decode=False)
        said = int(model.logits(hidden[-1:]).argmax())
        kept = {"positions": wanted, "q": q, "hidden": hidden[wanted - first]}
        return {**kept, "scale": step.scale, "next_token": said}

    made = forward(ids[0][:shared], 0, _spread(shared))
    captures = []
    for (name, _), tokens in zip(asked, ids, strict=True):
        if len(tokens) > shared:
            made = forward(tokens[shared:], shared, torch.arange(shared, len(tokens)))
        tail = kv[:, :, :, shared : len(tokens)].clone()
        own = {"context": kv[:, :, :, :shared], "tail": tail, "inv_freq": model.rope.inv_freq}
        captures.append(Capture(name, tokens, **own, **made))
    return captures


def _spread(n_tokens: int) -> Tensor:
    recent = max(0, n_tokens - N_RECENT)
    spread = torch.linspace(n_tokens * 3 // 4, recent - 1, N_SPREAD).long()
    return torch.cat((spread, torch.arange(recent, n_tokens))).unique()


# --- what is read ---------------------------------------------------------------------------------


def held_out_text(count: Count, n_tokens: int) -> str:
    """Paragraphs of four invented worlds and of this repository's own prose, in turn."""
    paths = [ROOT / "LICENSE", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    prose = "\n\n".join(path.read_text(encoding="utf-8").strip() for path in paths)
    paragraphs = prose.split("\n\n")
    each = n_tokens // 8 + 64  # a text may be short of its length by a paragraph
    parts, at = [], 0
    for i in range(4):
        parts.append(build_text(count, SEED + i, each).strip())
        filled = 0
        while filled < each:
            filled += count(paragraphs[at % len(paragraphs)])
            parts.append(paragraphs[at % len(paragraphs)])
            at += 1
    return "\n\n".join(parts)


class Captures:
    """Captures of one configuration, from the cache or by running the model, which is loaded only then."""

    def __init__(self, config: Config, say: Say, directory: Path | None = None) -> None:
        self._config, self._say = config, say
        self._directory = directory or cache_dir().parent / "captures"
        self.prompts = PromptBuilder.from_config(config)

    @functools.cached_property
    def model(self) -> ModelAdapter:
        return ModelAdapter(model_dir(self._config.model))

    def text(self, n_tokens: int) -> Capture:
        """The held-out text, cut to n_tokens."""
        built = self.prompts.build(held_out_text(self.prompts.count, n_tokens), "")
        prompt = Prompt(built.token_ids[:n_tokens], n_tokens)
        return self._cached(f"text-{n_tokens}", [("text", prompt)])[0]

    def facts(self, n_tokens: int, n_documents: int) -> list[Capture]:
        """Each document's five prompts, which end with the words before a hidden fact's answer."""
        found: list[Capture] = []
        for i, facts in enumerate(DOCUMENT_FACTS[:n_documents]):
            placed = [(d, f.sentence) for d, f in zip(FACT_DEPTHS, facts, strict=True)]
            text = build_text(self.prompts.count, SEED + 10 + i, n_tokens, placed)
            asked = [(f.answer, self.prompts.build(text, f.question, f.prefix)) for f in facts]
            captures = self._cached(f"document-{n_tokens}-{i}", asked)
            found += [self._with_gold(c, f) for c, f in zip(captures, facts, strict=True)]
        return found

    def _with_gold(self, capture: Capture, fact: Fact) -> Capture:
        ids, sentence = capture.token_ids.tolist(), self.prompts.encode_plain(f" {fact.sentence}")
        at = next(i for i in range(len(ids)) if ids[i : i + len(sentence)] == sentence)
        gold = at + len(self.prompts.encode_plain(f" {fact.prefix}"))
        return dataclasses.replace(capture, gold=gold)

    def _cached(self, name: str, asked: list[tuple[str, Prompt]]) -> list[Capture]:
        digest = hashlib.sha256(f"{REVISION} {model_dir(self._config.model).name}".encode())
        for _, prompt in asked:
            digest.update(prompt.token_ids.tobytes() + b"|")
        path = self._directory / f"{name}-{digest.hexdigest()[:16]}.pt"
        if not path.is_file():
            self._say(f"{name}: dense attention over {asked[0][1].n_context_tokens:,} tokens")
            self._directory.mkdir(parents=True, exist_ok=True)
            made: list[Any] = [vars(capture) for capture in read(self.model, asked)]
            for old in self._directory.glob(f"{name}-*.pt"):
                old.unlink()
            part = path.with_suffix(".part")
            torch.save(made, part)
            part.replace(path)
        return [Capture(**fields) for fields in torch.load(path, mmap=True, weights_only=True)]
