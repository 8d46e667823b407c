"""Rows of pages as float32 scratch, for the numba kernels: lookup, conversion and RoPE in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit

from .cpu_tiles import (
    load_bfloat16,
    load_float16,
    load_float32,
    rotate_bfloat16,
    rotate_float16,
    rotate_float32,
)
from .paged import PagedKV
from .rope import TABLE_LIMIT, Rope

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KEY, VALUE = 0, 1

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "boundscheck": False,
}


@dataclass(frozen=True)
class Pages:
    """A PagedKV as plain arrays. Holds the tensors, whose addresses it carries."""

    view: PagedKV
    bases: np.ndarray
    """int64 [n_memories]: addresses."""
    memory: np.ndarray
    row: np.ndarray
    layout: np.ndarray
    """int64: page_tokens, head_dim, bytes of an element, kind, n_tokens."""


def as_pages(view: PagedKV) -> Pages | None:
    """None if the fast path cannot read this view (odd head size, dtype or strides)."""
    kind = KINDS.get(view.kv_dtype)
    if kind is None or view.head_dim % 16 or not view.row.shape[1]:
        return None
    for leaves in view.memories:
        if leaves.dtype != view.kv_dtype or not leaves.is_contiguous() or leaves.is_cuda:
            return None
    size = view.memories[0].element_size()
    return Pages(
        view,
        np.array([leaves.data_ptr() for leaves in view.memories], dtype=np.int64),
        np.ascontiguousarray(view.memory.numpy()),
        np.ascontiguousarray(view.row.numpy()),
        np.array([view.page_tokens, view.head_dim, size, kind, view.n_tokens], dtype=np.int64),
    )


def angle_table(rope: Rope, n_positions: int) -> tuple[np.ndarray, np.ndarray] | None:
    """cos and sin of positions 0 .. n_positions - 1, or None beyond the table's limit."""
    if n_positions > TABLE_LIMIT:
        return None
    cos, sin = rope.table(max(1, n_positions))
    return cos.numpy(), sin.numpy()


@njit(inline="always")
def page_address(
    token: int, side: int, head: int, bases: Any, memory: Any, row: Any, layout: Any
) -> int:
    """Address of one stored row; 0 if its page is absent."""
    page_tokens = layout[0]
    page = token // page_tokens
    leaf = row[head, page]
    if leaf < 0:
        return 0
    slot = (leaf * 2 + side) * page_tokens + token - page * page_tokens
    return int(bases[memory[head, page]] + slot * layout[1] * layout[2])


@njit(inline="always")
def load_row(dst: int, src: int, layout: Any) -> None:
    if layout[3] == 0:
        load_float32(dst, src, layout[1])
    elif layout[3] == 1:
        load_float16(dst, src, layout[1])
    else:
        load_bfloat16(dst, src, layout[1])


@njit(inline="always")
def load_rotated(dst: int, src: int, layout: Any, cos: Any, sin: Any, position: int) -> None:
    half = layout[1] // 2
    cos_at = cos.ctypes.data + 4 * position * half
    sin_at = sin.ctypes.data + 4 * position * half
    if layout[3] == 0:
        rotate_float32(dst, src, half, cos_at, sin_at)
    elif layout[3] == 1:
        rotate_float16(dst, src, half, cos_at, sin_at)
    else:
        rotate_bfloat16(dst, src, half, cos_at, sin_at)


@njit(inline="always")
def zero_row(dst: Any, n: int) -> None:
    for d in range(n):
        dst[d] = 0.0
