"""What training reads of the frozen model: keys and values of a context, and where its attention goes.

One dense forward per context, in float32, kept in a file: the epochs of training run bookmarks only.
Attention mass is kept by cells of CELL queries and CELL keys, so that pages may begin anywhere at a
multiple of CELL and a query may stand anywhere at one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..core.errors import ContextTooLong
from ..kernels.ops import Rope
from .dense_pieces import PIECE, dense_probabilities, weighted
from .model import ModelAdapter
from .tensor_file import save_tensors
from .train_prompt import Ask, Stream

CELL = 16
"""Tokens per side of a cell of attention mass."""
REVISION = 2
"""Of the files: raise it when what they hold changes."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Capture:
    """One context of T tokens, a multiple of CELL; L layers. Read from a file when it is asked for."""

    path: Path

    @functools.cached_property
    def asks(self) -> tuple[Ask, ...]:
        rows = json.loads(self._about["asks"])
        return tuple(Ask(p, tuple((a, b) for a, b in gold)) for p, gold in rows)

    @property
    def name(self) -> str:
        return str(self._about["name"])

    @functools.cached_property
    def token_ids(self) -> Tensor:
        """int64 [T]"""
        return self._read("token_ids")

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def rotated_keys_values(self) -> Tensor:
        """float16 [L, 2 (K, V), Hkv, T, D], keys rotated to their positions"""
        return self._read("kv")

    def mass(self) -> Tensor:
        """Probability summed over a cell and over heads: float32 [L, T / CELL queries, T / CELL keys]"""
        return self._read("mass").float()

    def head_mass(self) -> Tensor:
        """As `mass` of each head: float16 [L, H, T / CELL, T / CELL]; full captures only."""
        return self._read("head_mass")

    def queries(self) -> Tensor:
        """Unrotated, float16 [L, H, T, D]; full captures only."""
        return self._read("queries")

    def keys(self) -> Tensor:
        """Unrotated, float16 [L, Hkv, T, D]; full captures only."""
        return self._read("keys")

    @functools.cached_property
    def _about(self) -> dict[str, str]:
        with safe_open(self.path, framework="pt") as file:
            return dict(file.metadata())

    def _read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


class MassStep:
    """Exact causal attention over one prompt, which keeps rotated K, V and the mass of every cell."""

    def __init__(
        self, rope: Rope, shape: tuple[int, int, int, int], n_tokens: int, *, full: bool
    ) -> None:
        """shape: (n_layers, n_heads, n_kv_heads, head_dim)"""
        n_layers, n_heads, n_kv_heads, head_dim = shape
        n = n_tokens // CELL
        self._rope = rope
        self.kv = torch.empty(n_layers, 2, n_kv_heads, n_tokens, head_dim, dtype=torch.float16)
        self.mass = torch.zeros(n_layers, n_heads, n, n, dtype=torch.float16)
        n_kept = n_tokens if full else 0
        self.queries = torch.empty(n_layers, n_heads, n_kept, head_dim, dtype=torch.float16)
        self.keys = torch.empty(n_layers, n_kv_heads, n_kept, head_dim, dtype=torch.float16)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        n_heads, n_tokens, dim = q.shape
        n_kept = self.queries.shape[2]
        self.queries[layer], self.keys[layer] = q[:, :n_kept], k[:, :n_kept]
        where = torch.arange(n_tokens)
        keys, queries = self._rope.rotate(k, where), self._rope.rotate(q, where)
        self.kv[layer] = torch.stack((keys, v))
        out = torch.empty(n_tokens, n_heads, dim)
        for at in range(0, n_tokens, PIECE):
            shares = dense_probabilities(queries[:, at : at + PIECE], at, keys, scale)
            end = shares.shape[2]
            out[at:end] = weighted(shares, v).transpose(0, 1)
            cells = shares.unflatten(1, (-1, CELL)).sum(dim=2).unflatten(-1, (-1, CELL)).sum(dim=-1)
            self.mass[layer, :, at // CELL : end // CELL, : end // CELL] = cells
        return out


def capture(model: ModelAdapter, stream: Stream, path: Path, *, full: bool = False) -> Capture:
    """Run the model over a stream, cut to a multiple of CELL, and keep what it computed in `path`.

    full: keep every query and the mass of each head too. Raises ContextTooLong beyond the model's window.
    """
    window = int(model.config.max_position_embeddings)
    n_tokens = stream.n_tokens // CELL * CELL
    if n_tokens > window:
        raise ContextTooLong(
            f"{stream.name} has {n_tokens} tokens, more than the model's window of {window}: its "
            "attention would teach nothing; lower --context-tokens"
        )
    shape = (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim)
    step = MassStep(model.rope, shape, n_tokens, full=full)
    token_ids = torch.from_numpy(stream.token_ids[:n_tokens])
    model.hidden(token_ids, step, decode=False)
    kept = {"token_ids": token_ids, "kv": step.kv, "mass": step.mass.float().sum(dim=1).half()}
    if full:
        kept |= {"head_mass": step.mass, "queries": step.queries, "keys": step.keys}
    asks = [(ask.position, ask.gold) for ask in stream.asks if ask.position < n_tokens]
    save_tensors(path, kept, {"name": stream.name, "asks": json.dumps(asks)})
    return Capture(path)


class CaptureFolder:
    """Captures of one model in a folder; each is made once."""

    def __init__(self, folder: Path, fingerprint: str, load: Callable[[], ModelAdapter]) -> None:
        """fingerprint: of the model; load: gives it, called when something is missing."""
        self._folder, self._fingerprint = folder, fingerprint
        self._load = functools.cache(load)

    def get(self, stream: Stream, say: Say, *, full: bool = False) -> Capture:
        path = self._folder / f"{self._digest(stream, full)}.safetensors"
        if not path.is_file():
            say(f"dense attention over {stream.name}, {stream.n_tokens:,} tokens")
            return capture(self._load(), stream, path, full=full)
        return Capture(path)

    def _digest(self, stream: Stream, full: bool) -> str:
        about = json.dumps([REVISION, self._fingerprint, CELL, full, stream.name])
        digest = hashlib.sha256(about.encode())
        digest.update(np.ascontiguousarray(stream.token_ids).tobytes())
        digest.update(repr(stream.asks).encode())
        return digest.hexdigest()[:24]
