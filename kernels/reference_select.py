"""Specification of selection on dense tensors: obvious, vectorised, slow. Every kernel is tested
against this file; it shares no arithmetic with them.

Source: InfiniteHiP section 4, Alg 1 to 3; `reference/infinitehip.md` sections 3 and 4.
H query heads, Hkv KV heads, G = H // Hkv; query head h uses KV head h // G. Keys and queries arrive
unrotated. Lists are per mask head: Hsel = 1 (head_reduce "all") or Hkv ("kv-group").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stage import LayerPolicy, Stage
from .rope import Rope


def candidate_chunks(q_start: int, policy: LayerPolicy) -> list[int]:
    """Chunk starts of the first stage (3.3): the grid begins after the sinks and ends one first
    chunk inside the window, so the overlap w' = window - chunk. Masking is left to attention."""
    overlap = max(0, policy.window - policy.stages[0].chunk)
    return list(range(policy.sink, max(policy.sink, q_start - overlap), policy.stages[0].chunk))


def chunk_tokens(starts: list[int], chunk: int, q_start: int, policy: LayerPolicy) -> Tensor:
    """int64 [C, chunk]: the tokens of each chunk, cut at the end of the candidates; -1 = none."""
    end = q_start - max(0, policy.window - policy.stages[0].chunk)
    tokens = torch.tensor(starts).view(-1, 1) + torch.arange(chunk)
    return torch.where(tokens < end, tokens, -1)


def positions(
    tokens: Tensor, q_start: int, n_queries: int, policy: LayerPolicy
) -> tuple[Tensor, Tensor]:
    """Substitute positions of a stage (4): query [Tq], key [C, chunk, 2 sides (left, right)].

    - chunk-indexed (paper Eq 4, code's count): key = index of its chunk in the stage's list, query
      = min(own, number of live chunks + w').
    - relative (Eq 5): key 0 in the left half and 1 in the right one, query w' + 1.
    - streaming: the stage's tokens renumbered consecutively, the last one directly before the end
      of the candidates; query its own.
    - clamped: true distances, at most select_span, of the middle of the chunk (of its aligned 64 tokens
      if it is smaller); counted from the clamp.
    - none: true positions.
    """
    n_chunks, chunk = tokens.shape
    overlap = max(0, policy.window - policy.stages[0].chunk)
    query = torch.arange(q_start, q_start + n_queries)
    if policy.select_rope == "chunk-indexed":
        key = torch.arange(n_chunks).view(-1, 1, 1).expand(-1, chunk, 2)
        return query.clamp(max=n_chunks + overlap), key
    if policy.select_rope == "relative":
        return torch.full_like(query, overlap + 1), torch.arange(2).expand(n_chunks, chunk, 2)
    if policy.select_rope == "clamped":
        clamp = max(0, q_start - policy.select_span)
        starts = tokens[:, 0]
        middle = starts // 64 * 64 + 32 if chunk < 64 else starts + chunk // 2
        middle = middle.clamp(max=max(clamp, q_start)).clamp(min=clamp)
        return query - clamp, (middle - clamp).view(-1, 1, 1).expand(-1, chunk, 2)
    if policy.select_rope == "streaming":
        rank = (tokens >= 0).flatten().cumsum(0).view_as(tokens) - 1
        n_live = int((tokens >= 0).sum())
        key = q_start - overlap - n_live + rank
    else:
        key = tokens
    return query, key[..., None].expand(-1, -1, 2)


def pooled_queries(q: Tensor, query: Tensor, stride: int, rope: Rope) -> Tensor:
    """Rotate, then average neighbours (3.4): q [G, Tq, D], query [Tq] -> [G, ceil(Tq / s), D]."""
    rotated = rope.rotate(q, query)
    groups = [rotated[:, i : i + stride].mean(dim=1) for i in range(0, q.shape[1], stride)]
    return torch.stack(groups, dim=1)


def search_scores(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    q_start: int,
    stage: Stage,
    policy: LayerPolicy,
    rope: Rope,
) -> Tensor:
    """Binary top-1 search (3.4, paper Alg 2 and 3), all query heads of one KV head.

    q: [G, Tq, D]; k: [T, D]; tokens: [C, chunk]. Returns [G, C]. All token scores of both sides are
    computed first; the descent then only looks them up.
    variant paper: probe the first token of each half; score of the final token, on the right.
    variant authors: probe the middle of each half; best of all probes met; ties go right.
    """
    query, key = positions(tokens, q_start, q.shape[1], policy)
    pooled = pooled_queries(q, query, stage.query_stride, rope)
    rotated = rope.rotate(k[tokens.clamp(min=0)][:, :, None].expand(-1, -1, 2, -1), key)
    table = torch.einsum("gtd,cnsd->gcnst", pooled, rotated).amax(dim=-1)  # [G, C, chunk, side]
    sizes = (tokens >= 0).sum(dim=1)
    scores = torch.empty(q.shape[0], tokens.shape[0])
    numbers, paper = table.tolist(), stage.variant == "paper"
    for g in range(q.shape[0]):
        found = [_descend(numbers[g][c], size, paper) for c, size in enumerate(sizes.tolist())]
        scores[g] = torch.tensor(found)
    return scores


def _descend(table: list[list[float]], size: int, paper: bool) -> float:
    left, right, best = 0, size, -torch.inf
    while right - left > 1:
        middle = (left + right) // 2
        left_probe, right_probe = (left + middle) // 2, (middle + right) // 2
        if paper:
            left_probe, right_probe = left, middle
        on_left, on_right = table[left_probe][0], table[right_probe][1]
        best = max(best, on_left, on_right)
        left, right = (left, middle) if on_left > on_right else (middle, right)
    return table[left][1] if paper or size == 1 else best


def summary_scores(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    q_start: int,
    stage: Stage,
    policy: LayerPolicy,
    rope: Rope,
) -> Tensor:
    """Scores by summaries of UNROTATED keys (DESIGN 1.2), one position per chunk: its middle token
    (or the right side's, or the chunk's index). q [G, Tq, D], k [T, D] -> [G * Tp, C].

    mean: q . mean key. bounds: sum over dims of max(q * min key, q * max key), an upper bound of
    every dot product in the chunk unless `spread` draws both towards the mean; the query is turned
    back by the key's position.
    """
    query, key = positions(tokens, q_start, q.shape[1], policy)
    pooled = pooled_queries(q, query, stage.query_stride, rope)
    scores = torch.empty(pooled.shape[0] * pooled.shape[1], tokens.shape[0])
    for c, row in enumerate(tokens):
        live = k[row[row >= 0]]
        turned = rope.rotate(pooled, -key[c, len(live) // 2, 1])  # [G, Tp, D]
        if stage.scorer == "mean":
            scores[:, c] = (turned @ live.mean(dim=0)).flatten()
        else:
            mean = live.mean(dim=0)
            low, high = (
                mean + stage.spread * (x - mean) for x in (live.amin(dim=0), live.amax(dim=0))
            )
            low, high = turned * low, turned * high
            scores[:, c] = torch.maximum(low, high).sum(dim=-1).flatten()
    return scores


def stage_scores(
    q: Tensor,
    q_start: int,
    k: Tensor,
    starts: list[list[int]],
    stage: Stage,
    policy: LayerPolicy,
    rope: Rope,
    scale: float,
) -> list[Tensor]:
    """Head reduction (3.2, 3.4): per mask head, the maximum over its query heads, [C] each.

    reduce softmax: of each row's softmax over the chunks (rows are heads for the search, whose descent is
    shared by the queries, and single queries of heads for summaries).
    q: [H, Tq, D]; k: [Hkv, T, D]; starts: per mask head, the chunk starts entering the stage.
    """
    n_kv_heads = k.shape[0]
    grouped = q.unflatten(0, (n_kv_heads, -1))
    score = search_scores if stage.scorer == "search" else summary_scores
    per_kv_head = []
    for j in range(n_kv_heads):
        mine = starts[0 if len(starts) == 1 else j]
        tokens = chunk_tokens(mine, stage.chunk, q_start, policy)
        scores = score(grouped[j], k[j], tokens, q_start, stage, policy, rope)
        if policy.reduce == "softmax":
            scores = (scores * scale).softmax(dim=-1)
        per_kv_head.append(scores.amax(dim=0))
    return [torch.stack(per_kv_head).amax(dim=0)] if len(starts) == 1 else per_kv_head


def best_chunks(
    starts: list[int], scores: Tensor, stage: Stage, policy: LayerPolicy, scale: float
) -> list[int]:
    """The chunks of largest score, ascending; equal scores go to the lower index (6.2).

    As many as the stage keeps, or with top_p the fewest whose estimated shares reach it.
    """
    n_keep = stage.keep // stage.chunk
    ranked = sorted(range(len(starts)), key=lambda c: (-float(scores[c]), c))[:n_keep]
    if stage.top_p is not None:
        shares = scores / scores.sum()
        if policy.reduce == "max":
            shares = (scores * scale).softmax(dim=0)
        before = [float(shares[ranked[:i]].double().sum()) for i in range(len(ranked))]
        ranked = [c for c, sum_ in zip(ranked, before, strict=True) if sum_ < stage.top_p]
    return sorted(starts[c] for c in ranked)


def select(
    q: Tensor,
    q_start: int,
    k: Tensor,
    policy: LayerPolicy,
    rope: Rope,
    inputs: list[list[list[int]]] | None = None,
    level: int = 0,
    scale: float | None = None,
    query_block: int = 64,
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The chain of stages (3.5) of one query block, recomputed from stage `level` on (3.8).

    q: [H, Tq, D] unrotated at positions q_start ...; k: [Hkv, T, D]; inputs: lists entering each
    stage, from an earlier call. Returns (lists entering each stage, final block starts), each a
    list per mask head.
    """
    n_sel = 1 if policy.head_reduce == "all" else k.shape[0]
    end = q_start - max(0, policy.window - policy.stages[0].chunk)
    lists = [candidate_chunks(q_start, policy) for _ in range(n_sel)]
    kept_inputs = list(inputs[:level]) if inputs is not None else []
    if level and inputs is not None:
        lists = inputs[level]
    for i in range(level, len(policy.stages)):
        stage = policy.stages[i].for_block(query_block)
        kept_inputs.append(lists)
        n_keep = stage.keep // stage.chunk
        longest = max(len(starts) for starts in lists)
        if longest > n_keep or (stage.top_p is not None and longest):
            scale = q.shape[2] ** -0.5 if scale is None else scale
            scores = stage_scores(q, q_start, k, lists, stage, policy, rope, scale)
            lists = [
                best_chunks(a, s, stage, policy, scale) for a, s in zip(lists, scores, strict=True)
            ]
        if i + 1 < len(policy.stages):
            child = policy.stages[i + 1].chunk
            lists = [
                [
                    a + step
                    for a in starts
                    for step in range(0, stage.chunk, child)
                    if a + step < end
                ]
                for starts in lists
            ]
    return kept_inputs, lists
