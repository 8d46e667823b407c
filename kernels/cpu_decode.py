"""Attention of one query per row over segments, in numba: K and V are read where they lie, once for
all heads of a KV group. Same results as `attend.attend_torch`.

Positions. Where only distances matter (`streaming`), up to SPAN keys share one rotation of the
queries, and the keys turn by their place among them: 16 rows of angles instead of one row per key,
which would be read from memory as the keys are. With true positions (`none`) every key has the
model's own angle, so that dense attention keeps the model's bits as nearly as float32 can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..core.errors import InternalError
from ..core.stage import LayerPolicy
from .cpu_attend_query import worker
from .cpu_one_query import TOGETHER
from .cpu_pages import Pages, angle_table, as_pages, set_n_tokens
from .cpu_pool import POOL
from .cpu_query_book import (
    BASE,
    BOOK_NUMBERS,
    COARSE_COS,
    COARSE_SIN,
    COS,
    COUNTER_NUMBERS,
    COUNTERS,
    EXACT,
    FOLD,
    HEAD_DIM,
    KEY_STARTS,
    MOST,
    N_BASES,
    N_COUNTERS,
    N_HEADS,
    N_KV_HEADS,
    N_RUNS_ALL,
    N_SEGMENTS,
    N_WEIGHTS,
    PAGES,
    Q_START,
    QUERY,
    RULES,
    RUNS,
    SIN,
    TABLE,
    WEIGHTS,
    WRONG,
)
from .cpu_stored import RUN_WORDS
from .paged import MOST_OF, PagedKV, absent_page
from .rope import Rope
from .segments import KINDS as SEGMENT_KINDS
from .segments import N_RUNS, RUN_TOKENS, Segments

_FAR = 1 << 60


def visibility(policy: LayerPolicy) -> np.ndarray:
    """By kind of segment, int64 [kind, 4]: least token, window (keys p - window < t), gap (keys
    t <= p - gap), one past the greatest token."""
    window = _FAR if policy.dense else policy.window
    rules = {
        "sink": (0, _FAR, policy.window, policy.sink),
        "selected": (policy.sink, _FAR, policy.window, _FAR),
        "window": (0, window, 0, _FAR),
        "tail": (0, _FAR, -_FAR, _FAR),
    }
    return np.array([rules[kind] for kind in SEGMENT_KINDS], dtype=np.int64)


def log_weights(segments: Segments) -> np.ndarray:
    """Base-2 logarithms of the weights of a tail's runs, float32 [R]; empty if there are none."""
    if segments.run_weights is None:
        return np.zeros(0, dtype=np.float32)
    weights: np.ndarray = np.log2(segments.run_weights)
    return weights


class Call:
    """One query's attention with everything prepared that does not change from token to token."""

    def __init__(
        self,
        view: PagedKV,
        segments: Segments,
        policy: LayerPolicy,
        rope: Rope,
        scale: float,
        n_heads: int,
        pages: Pages,
    ) -> None:
        self._view = view
        self._rope = rope
        self._fold = scale / math.log(2.0)
        self._group = n_heads // view.n_kv_heads
        most_runs = int(segments.table[:, N_RUNS].max(initial=1))
        most_runs *= 2 + int(segments.table[:, RUN_TOKENS].max(initial=1)) // view.page_tokens
        self.sizes = (segments.most_keys, most_runs)
        self.n_partials = len(segments)
        self.n_tasks = -(-len(segments) // TOGETHER) * view.n_kv_heads
        self._reach = segments.reach
        self._pages = pages
        self._n_positions = 0
        self._base = np.array(segments.base, dtype=np.int64)
        self.counters = np.zeros(N_COUNTERS * COUNTER_NUMBERS, dtype=np.int64)
        parts = {
            TABLE: segments.table,
            RUNS: segments.runs,
            KEY_STARTS: segments.key_starts,
            BASE: self._base,
            RULES: visibility(policy),
            WEIGHTS: log_weights(segments),
            PAGES: pages.book,
            COUNTERS: self.counters,
        }
        # whoever has the addresses keeps the arrays
        self._holds = {at: np.ascontiguousarray(part) for at, part in parts.items()}
        self.book = np.zeros(BOOK_NUMBERS, dtype=np.int64)
        for at, part in self._holds.items():
            self.book[at] = part.ctypes.data
        numbers = {
            N_HEADS: n_heads,
            N_KV_HEADS: view.n_kv_heads,
            HEAD_DIM: view.head_dim,
            N_SEGMENTS: len(segments),
            N_RUNS_ALL: len(segments.runs),
            N_BASES: len(self._base),
            N_WEIGHTS: len(self._holds[WEIGHTS]),
            EXACT: policy.attend_rope == "none",
            MOST: bits_of(np.float32(MOST_OF[view.kv_dtype])),
        }
        self.book[list(numbers)] = list(numbers.values())
        self.address = self.book.ctypes.data

    def of_token(self, q_start: int, base: tuple[int, ...], n_tokens: int) -> None:
        """The query's position, the base of positions now, and the tokens that keys are there of."""
        if q_start >= self._n_positions:
            self._use_tables(q_start)
        self.book[Q_START] = q_start
        self._base[:] = base
        set_n_tokens(self._pages, n_tokens)
        self.counters[:] = 0

    def to(
        self,
        query: int,
        partials: tuple[int, int, int],
        result: tuple[int, int] = (0, 0),
        new: tuple[int, int] = (0, 0),
    ) -> None:
        """Addresses: the query [H, D]; partials [n, H, D] and log-sum-exps [n, H], with n before them;
        the merged result [H, D] and [H], if wanted; the token's key and value [Hkv, D], if they are to be
        stored first."""
        self.book[QUERY : WRONG + 1] = (query, *partials, *result, *new, 0)

    def run(self) -> None:
        """In one launch; raises InternalError if a page is absent."""
        with POOL.lock:
            if POOL.run(worker, (self.book,), self.n_tasks, scratch([self])):
                raise self.absent()

    def absent(self) -> InternalError:
        return absent_page(self._view)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.book[N_HEADS]), self._group

    def _use_tables(self, q_start: int) -> None:
        """Angles of every distance or position that may come up."""
        reach = max(self._reach, q_start + 1) + 1024
        tables = [t.numpy() for t in self._rope.distance_tables(reach)]
        exact = angle_table(self._rope, reach) if self.book[EXACT] else None
        # beyond the table of single positions distances have to do
        self.book[EXACT] = exact is not None
        if exact is not None:
            tables[:2] = exact
        fold = self._fold * (1.0 if exact is not None else self._rope.attention_scaling**2)
        self.book[FOLD] = bits_of(fold)
        for at, table in zip((COS, SIN, COARSE_COS, COARSE_SIN), tables, strict=True):
            self._holds[at] = table
            self.book[at] = table.ctypes.data
        self._n_positions = reach


def bits_of(number: float | np.float32) -> int:
    """For `float_of_bits` in compiled code."""
    return int(np.float64(number).view(np.int64))


def scratch(calls: Sequence[Call]) -> tuple[np.ndarray, ...]:
    """What every worker needs of its own for these calls. Under the pool's lock."""
    most_keys = max(call.sizes[0] for call in calls)
    most_runs = max(call.sizes[1] for call in calls)
    n_heads, group = calls[0].shape
    head_dim = int(calls[0].book[HEAD_DIM])
    return (
        POOL.scratch("decode", ((3 * group + 2 + n_heads) * head_dim + 32,)),
        POOL.scratch("decode-s", ((most_keys + 8) * 4 * (-(-group // 4)),)),
        POOL.scratch("decode-v", (TOGETHER * most_runs, RUN_WORDS), np.int64),
        POOL.scratch("decode-e", (TOGETHER,), np.int64),
    )


def attend(
    q: Tensor,
    q_start: int,
    view: PagedKV,
    segments: Segments,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
    o: Tensor,
    lse: Tensor,
) -> bool:
    """Fill o [S, H, 1, D] and lse [S, H, 1]; False where this path does not apply."""
    pages = as_pages(view)
    if pages is None or rope.head_dim != view.head_dim:
        return False
    n_heads, _, head_dim = q.shape
    call = Call(view, segments, policy, rope, scale, n_heads, pages)
    plain = np.ascontiguousarray(q.detach().numpy().reshape(n_heads, head_dim), dtype=np.float32)
    call.of_token(q_start, segments.base, view.n_tokens)
    call.to(plain.ctypes.data, (len(segments), o.data_ptr(), lse.data_ptr()))
    call.run()
    return True
