"""Rows of pages as float32 scratch, for the numba kernels: lookup, conversion and RoPE in one pass."""

# compiled functions take their types from what they are called with
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .by_channel import BLOCK_TOKENS
from .by_channel import DTYPE as BY_CHANNEL
from .cpu_compile import compiled
from .cpu_formats import KINDS as _KINDS
from .cpu_memory import (
    join_angles,
    load_bfloat16,
    load_float8,
    load_float16,
    load_float32,
    load_int4,
    load_int8,
    load_key,
    load_value,
    peek,
    prefetch,
    rotate_bfloat16,
    rotate_float8,
    rotate_float16,
    rotate_float32,
    rotate_int4,
    rotate_int8,
    zero_float32,
)
from .paged import TORCH_DTYPE, PagedKV, block_start
from .rope import FINE, TABLE_LIMIT, Rope

KINDS = {TORCH_DTYPE[kind]: i for i, kind in enumerate(_KINDS)}
INT8, FLOAT8, INT4, INT4C = (KINDS[TORCH_DTYPE[kind]] for kind in _KINDS[3:])
KEY, VALUE = 0, 1


# columns of Pages.book
_BASES, _MEMORY, _ROW, _N_PAGES, _PAGE_TOKENS, _HEAD_DIM, _ROW_BYTES, _KIND, _N_TOKENS = range(9)
_KEY_BYTES, _EVEN_TOKENS, _OPEN, _OPEN_FIRST, _OPEN_SIDE = range(9, 14)
_NEVER = 1 << 60


@dataclass(frozen=True)
class Pages:
    """A PagedKV for compiled code. Holds the arrays, whose addresses it carries."""

    book: np.ndarray
    """int64: addresses of memory bases, of `memory` and `row` [Hkv, n_pages], then n_pages,
    page_tokens, head_dim, bytes of a row, kind, n_tokens; bytes from a key to the next, tokens for which
    that holds (from a multiple of them on); of an open block the address, the first token (or one that
    never comes) and the bytes from a key to its value. Compiled code gets the address of this book: array
    arguments of inner functions cost atomic reference counts."""
    holds: tuple[object, ...]


def as_pages(view: PagedKV) -> Pages | None:
    """None if the fast path cannot read this view (odd head size, dtype or strides)."""
    kind = KINDS.get(view.kv_dtype)
    if kind is None or view.head_dim % 16 or not view.row.shape[1]:
        return None
    for leaves in view.memories:
        if leaves.dtype != view.kv_dtype or not leaves.is_contiguous() or leaves.is_cuda:
            return None
    bases = np.array([leaves.data_ptr() for leaves in view.memories], dtype=np.int64)
    memory = np.ascontiguousarray(view.memory.numpy())
    row = np.ascontiguousarray(view.row.numpy())
    by_channel, block = view.kv_dtype == BY_CHANNEL, view.open
    book = np.array(
        [
            bases.ctypes.data,
            memory.ctypes.data,
            row.ctypes.data,
            row.shape[1],
            view.page_tokens,
            view.head_dim,
            view.row_bytes,
            kind,
            view.n_tokens,
            view.head_dim // 2 if by_channel else view.row_bytes,
            BLOCK_TOKENS if by_channel else view.page_tokens,
            0 if block is None else block.kv.data_ptr(),
            _NEVER if block is None else block.first,
            0 if block is None else 4 * block.kv.stride(0),
        ],
        dtype=np.int64,
    )
    return Pages(book, (view, bases, memory, row))


def set_n_tokens(pages: Pages, n_tokens: int) -> None:
    """More tokens were appended since the book was made."""
    pages.book[_N_TOKENS] = n_tokens
    if pages.book[_OPEN]:
        pages.book[_OPEN_FIRST] = block_start(n_tokens - 1)


def angle_table(rope: Rope, n_positions: int) -> tuple[np.ndarray, np.ndarray] | None:
    """cos and sin of positions 0 .. n_positions - 1, or None beyond the table's limit."""
    if n_positions > TABLE_LIMIT:
        return None
    cos, sin = rope.table(max(1, n_positions))
    return cos.numpy(), sin.numpy()


@compiled
def address(array):
    """Where an array begins. Signed: numba makes a float of an unsigned plus a signed integer."""
    return np.int64(array.ctypes.data)


@compiled
def row_address(page, offset, side, kv_head, book):
    """Address of stored row number `offset` of a page; 0 if the page is absent. book: address of
    Pages.book."""
    page_tokens = peek(book, _PAGE_TOKENS)
    place = page * page_tokens + offset - peek(book, _OPEN_FIRST)
    if place >= 0:
        block_bytes = 4 * BLOCK_TOKENS * peek(book, _HEAD_DIM)
        row = 4 * place * peek(book, _HEAD_DIM)
        return peek(book, _OPEN) + side * peek(book, _OPEN_SIDE) + kv_head * block_bytes + row
    entry = kv_head * peek(book, _N_PAGES) + page
    leaf = peek(peek(book, _ROW), entry)
    if leaf < 0:
        return 0
    slot = (leaf * 2 + side) * page_tokens + offset
    base = peek(peek(book, _BASES), peek(peek(book, _MEMORY), entry))
    return base + slot * peek(book, _ROW_BYTES) - (VALUE - side) * _ahead(offset, book)


@compiled
def _ahead(token, book):
    """Bytes by which a key lies nearer to the beginning of its block than its value does."""
    return token % BLOCK_TOKENS * (peek(book, _ROW_BYTES) - peek(book, _KEY_BYTES))


@compiled
def page_address(token, side, kv_head, book):
    """`row_address` of a token."""
    page_tokens = peek(book, _PAGE_TOKENS)
    page = token // page_tokens
    return row_address(page, token - page * page_tokens, side, kv_head, book)


@compiled
def bytes_of_row(book):
    return peek(book, _ROW_BYTES)


@compiled
def value_offset(token, book):
    """Bytes from a token's stored key to its value."""
    if token >= peek(book, _OPEN_FIRST):
        return peek(book, _OPEN_SIDE)
    return peek(book, _PAGE_TOKENS) * bytes_of_row(book) + _ahead(token, book)


@compiled
def step_of(kind, side, book):
    """Bytes from a key (or value) of a kind to the next; for keys see `even_tokens`."""
    if kind == 0:
        return 4 * peek(book, _HEAD_DIM)
    return peek(book, _KEY_BYTES) if side == KEY else peek(book, _ROW_BYTES)


@compiled
def even_tokens(book):
    """From a multiple of so many tokens on, so many keys lie one after the other, as their values do."""
    return peek(book, _EVEN_TOKENS)


@compiled
def page_tokens_of(book):
    return peek(book, _PAGE_TOKENS)


@compiled
def kind_of(token, book):
    """The number of a token's format in KINDS."""
    return 0 if token >= peek(book, _OPEN_FIRST) else peek(book, _KIND)


@compiled
def channels_of(key, token, book):
    """Where the scales of a key's channels are, of a format that has them."""
    return key + (BLOCK_TOKENS - token % BLOCK_TOKENS) * peek(book, _KEY_BYTES)


@compiled
def n_tokens_of(book):
    return peek(book, _N_TOKENS)


@compiled
def prefetch_bytes(at, n_bytes):
    """Ask for memory that is read soon."""
    for line in range(0, n_bytes, 64):
        prefetch(at + line)


@compiled
def load_row(dst, src, token, side, book):
    """A token's stored key or value at src as float32."""
    kind = kind_of(token, book)
    if kind == INT4C and side == KEY:
        load_key(dst, src, peek(book, _HEAD_DIM) // 2, channels_of(src, token, book))
    else:
        load_kind(dst, src, peek(book, _HEAD_DIM), kind)


@compiled
def load_kind(dst, src, n, kind):
    """n stored elements of a kind (number in KINDS) as float32; of int4c a value's."""
    if kind == 0:
        load_float32(dst, src, n)
    elif kind == 1:
        load_float16(dst, src, n)
    elif kind == 2:
        load_bfloat16(dst, src, n)
    elif kind == INT8:
        load_int8(dst, src, n)
    elif kind == FLOAT8:
        load_float8(dst, src, n)
    elif kind == INT4:
        load_int4(dst, src, n)
    else:
        load_value(dst, src, n)


@compiled
def load_rotated(dst, src, token, book, cos, sin, position):
    """A token's stored key at src. cos, sin: addresses of the angle table, whose rows are D / 2 floats."""
    kind, half = kind_of(token, book), peek(book, _HEAD_DIM) // 2
    offset = 4 * position * half
    if kind == 0:
        rotate_float32(dst, src, half, cos + offset, sin + offset)
    elif kind == 1:
        rotate_float16(dst, src, half, cos + offset, sin + offset)
    elif kind == 2:
        rotate_bfloat16(dst, src, half, cos + offset, sin + offset)
    elif kind == INT8:
        rotate_int8(dst, src, half, cos + offset, sin + offset)
    elif kind == FLOAT8:
        rotate_float8(dst, src, half, cos + offset, sin + offset)
    elif kind == INT4:
        rotate_int4(dst, src, half, cos + offset, sin + offset)
    else:
        load_key(dst, src, half, channels_of(src, token, book))
        rotate_float32(dst, dst, half, cos + offset, sin + offset)


@compiled
def distance_angles(distance, half, cos, sin, coarse_cos, coarse_sin, scratch):
    """Addresses of cos and sin of a distance, from the tables of `Rope.distance_tables`; scratch: for one
    row of each."""
    place, far = 4 * (distance % FINE) * half, 4 * (distance // FINE) * half
    if far == 0:
        return cos + place, sin + place
    # one rotation by the sum of the angles: (c + is)(c' + is'), of pairs (cos, sin)
    join_angles(scratch, half, cos + place, sin + place, coarse_cos + far, coarse_sin + far)
    return scratch, scratch + 4 * half


@compiled
def zero_row(dst, book):
    zero_float32(dst, peek(book, _HEAD_DIM))
