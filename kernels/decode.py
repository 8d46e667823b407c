"""Attention of one query over a fixed selection, prepared once and called for every token: most tokens
attend to what the token before attended to, and one more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .attend import attend_segments, merge_partials
from .paged import PagedKV
from .rope import Rope
from .segments import Segments

try:
    from . import cpu_decode
    from .cpu_pages import as_pages
except ModuleNotFoundError as exc:  # without numba the torch path below does the same
    if exc.name not in ("numba", "llvmlite"):
        raise
    cpu_decode = None  # type: ignore[assignment]


class PreparedDecode:
    """Segments of one query block, and of the tail's means if there are any, over pages that stay
    where they are. The result has the bits of `attend_segments` and `merge_partials`."""

    def __init__(
        self,
        view: PagedKV,
        segments: Segments,
        policy: LayerPolicy,
        rope: Rope,
        scale: float,
        n_heads: int,
        tail: tuple[PagedKV, Segments] | None = None,
    ) -> None:
        self._parts = [(view, segments)] + ([tail] if tail is not None else [])
        self._policy, self._rope, self._scale = policy, rope, scale
        self._calls: list[cpu_decode.Call] = []
        self._shape = (n_heads, view.head_dim)
        if cpu_decode is not None and rope.head_dim == view.head_dim and len(segments):
            books = [as_pages(part) for part, _ in self._parts]
            for (part, mine), pages in zip(self._parts, books, strict=True):
                if pages is None:
                    self._calls = []
                    break
                self._calls.append(cpu_decode.Call(part, mine, policy, rope, scale, n_heads, pages))

    @property
    def call(self) -> cpu_decode.Call | None:
        """For `layers.LayerRun`, if this is all that the attention takes."""
        return self._calls[0] if len(self._calls) == 1 else None

    def attend(self, q: Tensor, position: int, base: tuple[int, ...]) -> Tensor:
        """q [H, 1, D] unrotated at `position`, whose key is appended; base: of the segments now.
        Returns [H, 1, D]. Raises InternalError if a page is absent."""
        if not self._calls:
            return self._in_torch(q, position, base)
        plain = np.ascontiguousarray(q.detach().numpy().reshape(self._shape), dtype=np.float32)
        n_partials = sum(call.n_partials for call in self._calls)
        o = np.empty((n_partials, *self._shape), dtype=np.float32)
        lse = np.empty((n_partials, self._shape[0]), dtype=np.float32)
        n_main = self._calls[0].n_partials
        for call in self._calls[1:]:
            call.of_token(position, base, self._parts[1][0].n_tokens)
            part = (call.n_partials, o[n_main:].ctypes.data, lse[n_main:].ctypes.data)
            call.to(plain.ctypes.data, part)
            call.run()
        out = torch.empty(self._shape[0], 1, self._shape[1])
        total = torch.empty(self._shape[0])
        call = self._calls[0]
        call.of_token(position, base, position + 1)
        every = (n_partials, o.ctypes.data, lse.ctypes.data)
        call.to(plain.ctypes.data, every, (out.data_ptr(), total.data_ptr()))
        call.run()
        return out

    def _in_torch(self, q: Tensor, position: int, base: tuple[int, ...]) -> Tensor:
        outs, lses = [], []
        for i, (view, segments) in enumerate(self._parts):
            here = view if i else view.until(position)
            mine = replace(segments, base=base)
            o, lse = attend_segments(q, position, here, mine, self._policy, self._rope, self._scale)
            outs.append(o)
            lses.append(lse)
        return merge_partials(torch.cat(outs), torch.cat(lses))[0]
