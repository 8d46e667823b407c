"""The weights of a block step as numbers for compiled code: addresses, sizes, output rows of a task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .block_weights import AfterAttention, BeforeAttention, Norm, Product
from .cpu_ir import LANES

TASK_BYTES = 1 << 17
"""Weights of a task: a new one costs what a stream from memory takes to start, but workers wait for
each other up to one task at the end of each phase."""
ADD_ROWS = 8
"""Tasks of a product that is added are multiples of this."""

# a product in a book (a weight of 0: absent)
WEIGHT, BIAS, N_OUT, N_IN, PER_TASK, PRODUCT_NUMBERS = range(6)
# a norm; eps as the bits of a float64
NORM_WEIGHT, NORM_EPS, NORM_NUMBERS = range(3)
# where they stand
PRODUCTS = OUT, GATE, UP, DOWN, QKV = tuple(range(0, 5 * PRODUCT_NUMBERS, PRODUCT_NUMBERS))
_NORMS = QKV + PRODUCT_NUMBERS
MLP_NORM, NEXT_NORM, Q_NORM, K_NORM = range(_NORMS, _NORMS + 4 * NORM_NUMBERS, NORM_NUMBERS)
_SIZES = K_NORM + NORM_NUMBERS
HIDDEN, N_HEADS, N_KV_HEADS, HEAD_DIM, BOOK_NUMBERS = range(_SIZES, _SIZES + 5)


def write_book(after: AfterAttention | None, before: BeforeAttention | Norm) -> np.ndarray:
    """int64 [BOOK_NUMBERS]. Whoever keeps it keeps the weights. Raises ValueError for weights that
    compiled code cannot read."""
    book = np.zeros(BOOK_NUMBERS, dtype=np.int64)
    norm = before if isinstance(before, Norm) else before.norm
    book[HIDDEN] = hidden = norm.weight.numel()
    _write_norm(book, NEXT_NORM, norm, hidden)
    if after is not None:
        n_gated, n_attended = after.down.weight.shape[1], after.out.weight.shape[1]
        _write_norm(book, MLP_NORM, after.norm, hidden)
        _write_product(book, OUT, after.out, (hidden, n_attended), ADD_ROWS)
        _address_of(after.gate_up.weight, (2 * n_gated, hidden))
        for at, side in ((GATE, slice(n_gated)), (UP, slice(n_gated, None))):
            bias = after.gate_up.bias
            half = Product(after.gate_up.weight[side], None if bias is None else bias[side])
            # a task reads as many rows of each, and gates them by whole vectors
            _write_product(book, at, half, (n_gated, hidden), LANES, share=2)
        _write_product(book, DOWN, after.down, (hidden, n_gated), ADD_ROWS)
    if isinstance(before, BeforeAttention):
        heads = (before.n_heads, before.n_kv_heads, before.head_dim)
        book[N_HEADS], book[N_KV_HEADS], book[HEAD_DIM] = heads
        n_out = (before.n_heads + 2 * before.n_kv_heads) * before.head_dim
        # whole heads, because they may have norms
        _write_product(book, QKV, before.qkv, (n_out, hidden), before.head_dim)
        for at, head_norm in ((Q_NORM, before.q_norm), (K_NORM, before.k_norm)):
            if head_norm is not None:
                _write_norm(book, at, head_norm, before.head_dim)
    return book


def n_weight_bytes(book: np.ndarray) -> int:
    return sum(4 * int(book[p + N_OUT] * book[p + N_IN]) for p in PRODUCTS)


def most_tasks(book: np.ndarray) -> int:
    """Of any phase."""
    present = [p for p in PRODUCTS if book[p]]
    return max([int(-(-book[p + N_OUT] // book[p + PER_TASK])) for p in present], default=1)


def most_rows_of_a_task(book: np.ndarray) -> int:
    return max(int(book[p + PER_TASK]) for p in PRODUCTS)


def _address_of(tensor: Tensor, shape: tuple[int, ...]) -> int:
    plain = tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.is_cpu
    if not plain or tensor.shape != shape:
        raise ValueError(
            f"a block wants contiguous float32 {shape} on the CPU, not {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()


def _write_norm(book: np.ndarray, at: int, norm: Norm, n: int) -> None:
    book[at + NORM_WEIGHT] = _address_of(norm.weight, (n,))
    book[at + NORM_EPS] = np.float64(norm.eps).view(np.int64)


def _write_product(
    book: np.ndarray,
    at: int,
    product: Product,
    shape: tuple[int, int],
    multiple: int,
    share: int = 1,
) -> None:
    """multiple: a task is a multiple of so many output rows; share: of so many such products."""
    n_out, n_in = shape
    book[at + WEIGHT] = _address_of(product.weight, shape)
    book[at + BIAS] = 0 if product.bias is None else _address_of(product.bias, (n_out,))
    book[at + N_OUT], book[at + N_IN] = shape
    per_task = TASK_BYTES / (4 * n_in * share)
    book[at + PER_TASK] = max(1, round(per_task / multiple)) * multiple
