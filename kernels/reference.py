"""Specification of attention on dense tensors, and the one place that names all reference
operations (selection is in `reference_select.py`).

Source: InfiniteHiP section 4 and Alg 4, `reference/infinitehip.md` sections 3.6 and 4.
H query heads, Hkv KV heads, G = H // Hkv; query head h uses KV head h // G. k, v: [Hkv, T, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stage import LayerPolicy
from .reference_select import select
from .rope import Rope

__all__ = [
    "attended_keys",
    "dense_attention",
    "linear",
    "mass_kept",
    "merge",
    "select",
    "sparse_attention",
    "tail_attention",
]


def attended_keys(
    q_start: int, n_queries: int, blocks: list[int], policy: LayerPolicy
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Keys of one query block, of one mask head (3.6): sinks, selected, window.

    Returns tokens int64 [n], visible bool [Tq, n], positions int64 [n], base. A token may stand in
    two parts; the masks are exact, so every query sees it at most once:
    sink t < sink and t <= p - window; selected sink <= t <= p - window; window p - window < t <= p.
    Streaming (4): base = max(0, p_min - window - sink - n_selected + 1), sinks stand at base + t,
    the j-th selected token at base + sink + j, queries and window keys at their own positions.
    """
    query = torch.arange(q_start, q_start + n_queries)
    end = q_start + n_queries
    sink = torch.arange(min(policy.sink, end))
    selected = torch.tensor(
        [t for start in blocks for t in range(start, start + policy.block_tokens)],
        dtype=torch.int64,
    )
    window = torch.arange(max(0, q_start - policy.window + 1), end)
    old = query[:, None] - policy.window
    seen = torch.cat(
        (
            sink <= old,
            (selected >= policy.sink) & (selected <= old),
            (window > old) & (window <= query[:, None]),
        ),
        dim=1,
    )
    tokens = torch.cat((sink, selected, window))
    if policy.attend_rope == "none":
        return tokens, seen, tokens, 0
    base = max(0, q_start - policy.window - policy.sink - len(selected) + 1)
    renumbered = base + policy.sink + torch.arange(len(selected))
    return tokens, seen, torch.cat((base + sink, renumbered, window)), base


def sparse_attention(
    q: Tensor,
    q_start: int,
    k: Tensor,
    v: Tensor,
    blocks: list[list[int]],
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Block sparse attention (3.6) of one query block: q [H, Tq, D] -> out [H, Tq, D], lse [H, Tq].

    blocks: block starts per mask head (1 or Hkv lists). lse is base e; rows that see nothing give
    out 0 and lse -inf.
    """
    n_queries, n_kv_heads = q.shape[1], k.shape[0]
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    for head in range(q.shape[0]):
        kv_head = head // (q.shape[0] // n_kv_heads)
        mine = blocks[0 if len(blocks) == 1 else kv_head]
        tokens, seen, key, base = attended_keys(q_start, n_queries, mine, policy)
        query = torch.arange(q_start, q_start + n_queries) - base
        safe = tokens.clamp(max=k.shape[1] - 1)
        logits = rope.rotate(q[head], query) @ rope.rotate(k[kv_head, safe], key - base).T * scale
        logits = logits.masked_fill(~seen, -torch.inf)
        lse[head] = logits.logsumexp(dim=-1)
        weights = (logits - lse[head, :, None]).exp().nan_to_num(0.0)
        out[head] = weights @ v[kv_head, safe]
    return out, lse


def tail_attention(
    q: Tensor,
    q_start: int,
    k: Tensor,
    v: Tensor,
    entered: list[list[int]],
    blocks: list[list[int]],
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The estimate of what entered the last stage and was not kept: out [H, Tq, D], lse [H, Tq].

    Each cell of `policy.tail` tokens outside the window of the first query is one key and value, their
    means, with weight = tokens of its chunks that entered and were not kept. Streaming: all stand
    where the selected tokens begin; else a cell stands at its middle.
    """
    n_queries, n_kv_heads = q.shape[1], k.shape[0]
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    for head in range(q.shape[0]):
        kv_head = head // (q.shape[0] // n_kv_heads)
        mine = 0 if len(blocks) == 1 else kv_head
        left = [c for c in entered[mine] if c not in set(blocks[mine])]
        cells = sorted({c // policy.tail for c in left})
        cells = [c for c in cells if (c + 1) * policy.tail <= q_start - policy.window + 1]
        if not cells:
            continue
        weight = [
            policy.block_tokens * sum(c // policy.tail == cell for c in left) for cell in cells
        ]
        spans = [slice(cell * policy.tail, (cell + 1) * policy.tail) for cell in cells]
        means = torch.stack([k[kv_head, span].mean(dim=0) for span in spans])
        values = torch.stack([v[kv_head, span].mean(dim=0) for span in spans])
        n_selected = len(blocks[mine]) * policy.block_tokens
        base = max(0, q_start - policy.window - policy.sink - n_selected + 1)
        position = torch.full((len(cells),), base + policy.sink)
        if policy.attend_rope == "none":
            base, position = 0, torch.tensor(cells) * policy.tail + policy.tail // 2
        query = torch.arange(q_start, q_start + n_queries) - base
        keys = rope.rotate(means, position - base)
        logits = rope.rotate(q[head], query) @ keys.T * scale + torch.tensor(weight).log()
        lse[head] = logits.logsumexp(dim=-1)
        out[head] = logits.softmax(dim=-1) @ values
    return out, lse


def dense_attention(
    q: Tensor, q_start: int, k: Tensor, v: Tensor, rope: Rope, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention with true positions: q [H, Tq, D] -> out [H, Tq, D], lse [H, Tq]."""
    query = torch.arange(q_start, q_start + q.shape[1])
    ids = torch.arange(q_start + q.shape[1])
    group = q.shape[0] // k.shape[0]
    keys = rope.rotate(k[:, ids], ids).repeat_interleave(group, dim=0)
    logits = rope.rotate(q, query) @ keys.mT * scale
    logits = logits.masked_fill(ids > query[:, None], -torch.inf)
    out = logits.softmax(dim=-1) @ v[:, ids].repeat_interleave(group, dim=0)
    return out, logits.logsumexp(dim=-1)


def mass_kept(
    q: Tensor, q_pos: int, k: Tensor, seen: Tensor, rope: Rope, scale: float, head: int
) -> float:
    """Share of one head's dense softmax mass on the keys of `seen` (bool [q_pos + 1])."""
    kv_head = head // (q.shape[0] // k.shape[0])
    ids = torch.arange(q_pos + 1)
    logits = rope.rotate(k[kv_head, ids], ids) @ rope.rotate(q[head, 0], q_pos) * scale
    return float(logits.softmax(dim=0)[seen].sum())


def merge(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge of partials by log-sum-exp: o [S, H, Tq, D], lse [S, H, Tq] -> [H, Tq, D], [H, Tq]."""
    total = lse.logsumexp(dim=0)
    weights = (lse - total).exp().nan_to_num(0.0)
    return (weights[..., None] * o).sum(dim=0), total


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, K] W^T [K, N] + b [N]."""
    out = x @ w.T
    return out if bias is None else out + bias
