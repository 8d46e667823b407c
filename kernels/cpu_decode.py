"""Attention of one query per row over segments, in numba: K and V are read where they lie, once for
all heads of a KV group. Same results as `attend.attend_torch`.

Positions. Where only distances matter (`streaming`), up to SPAN keys share one rotation of the
queries, and the keys turn by their place among them: 16 rows of angles instead of one row per key,
which would be read from memory as the keys are. With true positions (`none`) every key has the
model's own angle, so that dense attention keeps the model's bits as nearly as float32 can.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..core.stage import LayerPolicy
from .cpu_one_query import TOGETHER, rotate_heads, worker
from .cpu_pages import Pages, angle_table, as_pages, set_n_tokens
from .cpu_pool import POOL
from .cpu_stored import RUN_WORDS
from .paged import PagedKV, absent_page
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
        head_dim, n_kv_heads = view.head_dim, view.n_kv_heads
        self._view = view
        self._exact = policy.attend_rope == "none"
        self._rope = rope
        self._fold = np.float32(scale / math.log(2.0))
        self._shape = (n_heads, head_dim)
        self._queries = np.empty(self._shape, dtype=np.float32)
        self._counters = np.zeros(4, dtype=np.int64)
        self._group = n_heads // n_kv_heads
        self._most_keys = segments.most_keys
        most_runs = int(segments.table[:, N_RUNS].max(initial=1))
        most_runs *= 2 + int(segments.table[:, RUN_TOKENS].max(initial=1)) // view.page_tokens
        self._most_runs = most_runs
        self._n_tasks = -(-len(segments) // TOGETHER) * n_kv_heads
        self._segments = segments
        self._fixed = (segments.table, segments.runs, segments.key_starts)
        self._rules = (visibility(policy), log_weights(segments))
        self._pages = pages
        self._n_positions = 0

    def __call__(
        self,
        q: np.ndarray,
        q_start: int,
        base: np.ndarray,
        n_tokens: int,
        o: np.ndarray,
        lse: np.ndarray,
        out: np.ndarray,
        out_lse: np.ndarray,
    ) -> None:
        """q [H, D] at q_start; n_tokens: tokens appended so far. Fills o [S or more, H, D] and
        lse [S or more, H], and merges all of them into out [H, D], out_lse [H] unless these are empty."""
        self._use_tables(q_start)
        if self._exact:
            rotate_heads(self._queries, q, base, q_start, self._cos, self._sin, self._fold)
        else:
            np.multiply(
                q, self._fold * np.float32(self._rope.attention_scaling**2), out=self._queries
            )
        counters = self._counters
        counters[:] = q_start, self._exact, 0, 0
        set_n_tokens(self._pages, n_tokens)
        arguments = (
            o, lse, out, out_lse, counters, *self._fixed, base, *self._rules, self._queries, self._cos,
            self._sin, self._coarse_cos, self._coarse_sin, self._pages.book,
        )  # fmt: skip
        group, head_dim = self._group, self._shape[1]
        with POOL.lock:
            floats = POOL.scratch("decode", (3 * group * head_dim + 2 * head_dim + 32,))
            logits = POOL.scratch("decode-s", ((self._most_keys + 8) * 4 * (-(-group // 4)),))
            found = POOL.scratch("decode-v", (TOGETHER * self._most_runs, RUN_WORDS), np.int64)
            ends = POOL.scratch("decode-e", (TOGETHER,), np.int64)
            if POOL.run(worker, arguments, self._n_tasks, (floats, logits, found, ends)):
                raise absent_page(self._view)

    def _use_tables(self, q_start: int) -> None:
        """Angles of every distance or position that may come up."""
        if q_start < self._n_positions:
            return
        reach = max(self._segments.reach, q_start + 1) + 1024
        tables = self._rope.distance_tables(reach)
        self._cos, self._sin, self._coarse_cos, self._coarse_sin = (t.numpy() for t in tables)
        exact = angle_table(self._rope, reach) if self._exact else None
        # beyond the table of single positions distances have to do
        self._exact = exact is not None
        if exact is not None:
            self._cos, self._sin = exact
        self._n_positions = reach


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
    nothing = np.empty((0, head_dim), dtype=np.float32), np.empty(0, dtype=np.float32)
    n_segments = len(segments)
    call(
        plain, q_start, np.array(segments.base), view.n_tokens,
        o.numpy().reshape(n_segments, n_heads, head_dim), lse.numpy().reshape(n_segments, n_heads),
        *nothing,
    )  # fmt: skip
    return True
