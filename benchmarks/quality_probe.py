"""Queries of one layer of a capture, what a policy selects for them, and how far that is from dense
attention: the measures of `benchmarks.quality`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longreach.core.stage import LayerPolicy
from longreach.kernels import ops
from longreach.kernels.ops import Selection, Summaries

from .captured import PAGE_TOKENS, Capture, dense_probabilities, paged, weighted
from .quality_settings import Setting

Row = dict[str, Any]


@dataclass
class Probe:
    """Queries of one layer that share a selection, and what dense attention makes of them."""

    q: Tensor
    """float32 [H, Tq, D], unrotated, at positions start ..."""
    start: int
    weights: Tensor
    """float32 [H, Tq, start + Tq]: the dense softmax."""
    out: Tensor
    """float32 [H, Tq, D]: dense attention's output."""
    _parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def parts(self, policy: LayerPolicy) -> tuple[Tensor, Tensor]:
        """Mass of sinks and window [H, Tq]; weights of what may be selected, others 0."""
        at = (policy.sink, policy.window)
        if at not in self._parts:
            key = torch.arange(self.weights.shape[2])
            query = torch.arange(self.start, self.weights.shape[2])[:, None]
            middle = (key >= policy.sink) & (key <= query - policy.window)
            free = self.weights.masked_fill(middle, 0.0).sum(dim=-1)
            self._parts[at] = (free, self.weights * middle)
        return self._parts[at]


class Layer:
    """One layer of a capture: its pages, and probes of its queries."""

    def __init__(self, capture: Capture, layer: int) -> None:
        self.capture, self.layer = capture, layer
        k, self.v = capture.keys_values(layer)
        self.rope = capture.rope
        self.view = paged(k, self.v)
        self._summaries: dict[Any, Summaries] = {}
        self._keys = self.rope.rotate(k, torch.arange(k.shape[1]))

    def probe(self, start: int, n_queries: int = 1) -> Probe:
        q = self.capture.queries(self.layer, start, n_queries).contiguous()
        rotated = self.rope.rotate(q, torch.arange(start, start + n_queries))
        weights = dense_probabilities(rotated, start, self._keys, self.capture.scale)
        return Probe(q, start, weights, weighted(weights, self.v))

    def summaries(self, policy: LayerPolicy) -> dict[str, Any]:
        """Ready summaries as keyword, where a policy reads any and its chunks lie in pages' slots."""
        names = ops.tables_of(policy)
        if not names or ops.check_tables(names, PAGE_TOKENS, policy.sink) is not None:
            return {}
        if names not in self._summaries:
            self._summaries[names] = ops.summarise_pages(self.view, policy)
        return {"summaries": self._summaries[names]}

    def select(
        self, probe: Probe, policy: LayerPolicy, setting: Setting, age: int, ready: dict[str, Any]
    ) -> Selection:
        """A selection for the probe, or the best one there is, or one of so many steps ago whose
        stages from `setting.level` on are recomputed."""
        if setting.oracle:
            return self.best(probe, policy)
        now = (probe.q, probe.start, self.view, policy, self.rope)
        if not age:
            return ops.select_blocks(*now, **ready)
        then = probe.start - age
        q = self.capture.queries(self.layer, then, probe.q.shape[1]).contiguous()
        old = ops.select_blocks(q, then, self.view, policy, self.rope, **ready)
        if setting.level is None:
            return old
        return ops.select_blocks(*now, old, setting.level, **ready)

    def best(self, probe: Probe, policy: LayerPolicy) -> Selection:
        """The runs of the last stage's length with the most mass, summed over what shares a mask."""
        n_masks = 1 if policy.head_reduce == "all" else self.view.n_kv_heads
        chunk = policy.block_tokens
        middle = (
            probe.parts(policy)[1].unflatten(0, (n_masks, -1)).sum(dim=(1, 2))[:, policy.sink :]
        )
        runs = torch.nn.functional.pad(middle, (0, -middle.shape[1] % chunk)).unflatten(
            1, (-1, chunk)
        )
        n_keep = min(policy.stages[-1].keep // chunk, runs.shape[1])
        best = runs.sum(dim=-1).topk(n_keep).indices.sort(dim=-1).values
        blocks = policy.sink + chunk * best
        return Selection((None,), blocks, torch.full((n_masks,), n_keep))

    def attend(
        self, probe: Probe, policy: LayerPolicy, selection: Selection, ready: dict[str, Any]
    ) -> Tensor:
        """The output [H, Tq, D] as a worker computes it."""
        at = (probe.q, probe.start, self.view)
        scale = self.capture.scale
        return ops.attend_block(*at, selection, policy, self.rope, scale, **ready)[0]


def selected(selection: Selection, policy: LayerPolicy, n_tokens: int) -> Tensor:
    """float32 [Hsel, n_tokens]: 1 where a token is in a selected block."""
    blocks, chunk = selection.blocks, policy.block_tokens
    tokens = (blocks[..., None] + torch.arange(chunk)).masked_fill(blocks[..., None] < 0, n_tokens)
    flags = torch.zeros(len(blocks), n_tokens + chunk)
    return flags.scatter_(1, tokens.flatten(1), 1.0)[:, :n_tokens]


def n_attended(probe: Probe, selection: Selection, policy: LayerPolicy) -> float:
    """Selected tokens that the last query attends to, a mean over the masks: what lies in the window
    does not count."""
    n_tokens = probe.weights.shape[2]
    flags = selected(selection, policy, n_tokens)[:, policy.sink : n_tokens - policy.window]
    return float(flags.sum(dim=-1).mean())


def attended_mass(probe: Probe, selection: Selection, policy: LayerPolicy) -> Tensor:
    """[H, Tq]: share of the dense softmax on attended keys, sinks and window counted."""
    free, middle = probe.parts(policy)
    flags = selected(selection, policy, middle.shape[2])
    grouped = middle.unflatten(0, (len(flags), -1))
    return free + torch.einsum("jgqt,jt->jgq", grouped, flags).flatten(0, 1)


def output_error(probe: Probe, out: Tensor) -> Tensor:
    """[H, Tq]: distance to dense attention's output over its length."""
    return (out - probe.out).norm(dim=-1) / probe.out.norm(dim=-1)


@dataclass
class Tally:
    """What one setting at one budget did, layer by layer."""

    tokens: list[float] = field(default_factory=list)
    values: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)

    def add(self, name: str, layer: int, values: Tensor) -> None:
        self.values.setdefault(name, {}).setdefault(layer, []).append(values.flatten())

    def summary(self, name: str) -> Row:
        """Mean, the tenth that is worst, and the worst layer's mean; small masses and large errors
        are bad."""
        layers = {layer: torch.cat(parts) for layer, parts in self.values[name].items()}
        means = {layer: float(values.mean()) for layer, values in layers.items()}
        every = torch.cat(list(layers.values()))
        share, worst = (0.1, min) if name == "mass" else (0.9, max)
        layer = worst(means, key=means.__getitem__)
        return {
            "mean": round(float(every.mean()), 5),
            f"p{share * 100:.0f}": round(float(every.quantile(share)), 5),
            "worst": round(means[layer], 5),
            "worst_layer": layer,
        }
