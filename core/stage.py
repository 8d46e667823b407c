"""Selection as data (DESIGN 1.3): stages, coarse to fine, and which layers follow which policy.

Source: InfiniteHiP (arXiv 2502.08910), section 4 and Appendix F for the numbers.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scorer = Literal["search", "bounds", "mean", "bookmark"]
Variant = Literal["paper", "authors"]
SelectRope = Literal["chunk-indexed", "relative", "streaming", "none", "clamped"]
AttendRope = Literal["streaming", "none"]
HeadReduce = Literal["all", "kv-group"]
ScoreReduce = Literal["max", "softmax"]

_LAYERS = re.compile(r"all|rest|\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*", re.ASCII)

QUERY_BLOCK = 64
"""Queries that share one selection; blocks are aligned to absolute positions (DESIGN 6.3)."""

KV_BLOCK = QUERY_BLOCK
"""Tokens whose keys `int4c` rounds together, when the last of them is there. Queries among them see all of
them as appended, later ones as rounded: so no block of queries may straddle two of these."""

QUESTION_TOKENS = 256
"""Most tokens at a prompt's end that count as its question."""


def question_start(n_prompt: int, n_context: int) -> int:
    """First token of the question, at the edge of a query block: what follows the context, at most
    QUESTION_TOKENS. A prompt that is all context has none: n_prompt."""
    if n_context >= n_prompt:
        return n_prompt
    return max(n_context, n_prompt - QUESTION_TOKENS) // QUERY_BLOCK * QUERY_BLOCK


class Stage(BaseModel):
    """One pruning step: splits the surviving tokens into chunks and keeps the best chunks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scorer: Scorer = "search"
    """How a chunk is scored: `search` (InfiniteHiP), `bounds` (min/max of keys), `mean` key, or `bookmark`
    (RetroLM): the trained key at a page's end. That is a policy's first stage, and its chunk is a page."""
    chunk: int = Field(gt=0)
    """Tokens per chunk."""
    keep: int = Field(gt=0)
    """Tokens that leave this stage (a multiple of chunk)."""
    refresh: int = Field(default=1, gt=0)
    """Decode steps between recomputations of this stage."""
    query_stride: int = Field(default=1, gt=0)
    """Neighbouring queries of a block of 64 averaged into one before scoring; a finer block of the question
    averages as many fewer, so that it is scored by as many averages. A bookmark's query is one."""
    variant: Variant = "authors"
    """`paper`: first-token probes, the last one scores; `authors`: centre probes, the best does."""
    spread: float = Field(default=1.0, gt=0.0, le=1.0)
    """`bounds`: how far the summary reaches from the mean towards minimum and maximum. 1 is a true bound;
    less ranks a block by what it is likely to hold, not by what it could hold at most."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Adaptive budget: the fewest best chunks whose estimated share of the softmax over all that enter
    reaches this, at most `keep` tokens. None always keeps `keep`."""

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if self.keep % self.chunk:
            raise ValueError(f"keep ({self.keep}) must be a multiple of chunk ({self.chunk})")
        if QUERY_BLOCK % self.query_stride:
            raise ValueError(f"query_stride ({self.query_stride}) must divide {QUERY_BLOCK}")
        return self

    @property
    def reads_summaries(self) -> bool:
        """Whether it scores what is made of a chunk's keys alone."""
        return self.scorer in ("bounds", "mean")

    def for_block(self, query_block: int) -> Stage:
        """This stage for blocks of fewer queries than QUERY_BLOCK."""
        stride = max(1, self.query_stride * query_block // QUERY_BLOCK)
        return (
            self
            if stride == self.query_stride
            else self.model_copy(update={"query_stride": stride})
        )


class LayerPolicy(BaseModel):
    """How a set of layers selects and attends. No stages means dense: every key is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: str = "all"
    """Layers this policy holds for: `all`, `rest`, `0-2`, `0,1,31` (counted from 0)."""
    stages: tuple[Stage, ...] = ()
    """Pruning stages, coarse to fine."""
    prefill_stages: tuple[Stage, ...] | None = None
    """Stages of prefill where they are others than decode's; an empty list keeps every key (dense)."""
    sink: int = Field(default=256, ge=0)
    """First tokens that are always attended."""
    window: int = Field(default=1024, ge=0)
    """Latest tokens that are always attended."""
    select_rope: SelectRope = "relative"
    """Positions given to keys and queries while selecting."""
    attend_rope: AttendRope = "streaming"
    """Positions given to keys while attending: renumbered (`streaming`) or true (`none`)."""
    head_reduce: HeadReduce = "all"
    """One mask for all heads of the layer, or one per KV head."""
    reduce: ScoreReduce = "max"
    """How the scores of heads and queries become one: the largest raw score (paper), or the largest
    after a softmax over the chunks for each, so that a head of large norms drowns no other."""
    select_span: int = Field(default=4096, gt=0)
    """Largest distance from the query that `select_rope: clamped` gives to a key."""
    tail: int = Field(default=0, ge=0)
    """Tokens per mean of the estimate of what entered the last stage and was not kept; 0: none."""
    delta: bool = False
    """Prefill: each query block is corrected by what its first query misses (Delta Attention)."""

    @model_validator(mode="after")
    def _check(self) -> LayerPolicy:
        if not _LAYERS.fullmatch(self.layers):
            raise ValueError(f"layers ({self.layers!r}) must be all, rest, or like 0-2 or 0,1,31")
        parse_layers(self.layers, n_layers=0, taken=set())
        self._check_stages("stages", self.stages)
        if self.prefill_stages is not None:
            self._check_stages("prefill_stages", self.prefill_stages)
        if self.tail and not (self.stages or self.prefill_stages):
            raise ValueError(f"tail ({self.tail}) needs stages: a dense policy leaves nothing out")
        return self

    def _check_stages(self, name: str, stages: tuple[Stage, ...]) -> None:
        previous: Stage | None = None
        for i, stage in enumerate(stages):
            if previous is not None:
                if stage.scorer == "bookmark":
                    raise ValueError(
                        f"{name}.{i}.scorer: bookmark can only be the first stage, because it ranks "
                        "whole pages"
                    )
                if previous.chunk % stage.chunk or stage.chunk > previous.chunk:
                    raise ValueError(
                        f"{name}.{i}.chunk ({stage.chunk}) must divide the previous chunk "
                        f"({previous.chunk})"
                    )
                if stage.keep > previous.keep:
                    raise ValueError(
                        f"{name}.{i}.keep ({stage.keep}) exceeds what enters it ({previous.keep})"
                    )
                if previous.refresh % stage.refresh:
                    raise ValueError(
                        f"{name}.{i}.refresh ({stage.refresh}) must divide the previous stage's "
                        f"({previous.refresh}): a stage is recomputed whenever its input is"
                    )
            previous = stage
        if stages and self.tail:
            self._check_tail(stages)
        if stages and self.window < stages[0].chunk:
            raise ValueError(
                f"window ({self.window}) must be at least the first chunk ({stages[0].chunk})"
            )

    def _check_tail(self, stages: tuple[Stage, ...]) -> None:
        last = stages[-1].chunk
        before = stages[-2].chunk if len(stages) > 1 else self.tail
        if self.tail % last or before % self.tail or self.sink % self.tail:
            raise ValueError(
                f"tail ({self.tail}) must be a multiple of the last chunk ({last}) and divide the "
                f"chunk before it ({before}) and sink ({self.sink})"
            )

    @property
    def dense(self) -> bool:
        return not self.stages

    @property
    def selects_sealed(self) -> bool:
        """Whether no query selects among keys of its own KV_BLOCK: they are inside its window."""
        return self.dense or self.window - self.stages[0].chunk >= KV_BLOCK

    @functools.cached_property
    def refreshes(self) -> tuple[int, ...]:
        """Refresh interval of every stage."""
        return tuple(stage.refresh for stage in self.stages)

    @property
    def in_prefill(self) -> LayerPolicy:
        """The policy that prefill follows; itself where that is decode's."""
        if self.prefill_stages is None:
            return self
        if not self.prefill_stages:
            return DENSE
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return LayerPolicy(**values | {"stages": self.prefill_stages, "prefill_stages": None})

    @property
    def by_bookmark(self) -> bool:
        """Whether bookmarks choose the pages that later stages and attention see."""
        return bool(self.stages) and self.stages[0].scorer == "bookmark"

    @property
    def block_tokens(self) -> int:
        """Tokens of the unit that attention selects; raises on a dense policy."""
        return self.stages[-1].chunk


def parse_layers(spec: str, n_layers: int, taken: set[int]) -> list[int]:
    """Layer numbers named by a policy's `layers`. Raises ValueError on a malformed spec."""
    if spec == "all":
        return list(range(n_layers))
    if spec == "rest":
        return [layer for layer in range(n_layers) if layer not in taken]
    found: list[int] = []
    for part in spec.split(","):
        first, _, last = part.strip().partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"layers {spec!r}: the range {part.strip()} ends before it starts")
        found += range(int(first), int(last or first) + 1)
    # a preset written for a deeper model may name layers this one lacks
    return [layer for layer in found if layer < n_layers]


DENSE = LayerPolicy(attend_rope="none", sink=0, window=0)
"""Every key, at its true position."""


def resolve_policies(policies: tuple[LayerPolicy, ...], n_layers: int) -> tuple[LayerPolicy, ...]:
    """One policy per layer. Raises ValueError if a layer has none or two."""
    by_layer: dict[int, LayerPolicy] = {}
    if sum(policy.layers == "rest" for policy in policies) > 1:
        raise ValueError("two policies have layers: rest; only one can take the remaining layers")
    for policy in sorted(policies, key=lambda p: p.layers == "rest"):
        for layer in parse_layers(policy.layers, n_layers, set(by_layer)):
            if layer in by_layer:
                raise ValueError(f"layer {layer} has two policies; name it once, or use 'rest'")
            by_layer[layer] = policy
    missing = [layer for layer in range(n_layers) if layer not in by_layer]
    if missing:
        raise ValueError(f"layers {missing} have no policy; add one with layers: rest")
    return tuple(by_layer[layer] for layer in range(n_layers))


def policies_fingerprint(policies: tuple[LayerPolicy, ...]) -> str:
    """Fingerprint of what shapes prefilled KV: decode's own stages and refresh are left out, because prefill
    never caches masks."""
    excluded: dict[str, Any] = {"stages": {"__all__": {"refresh"}}}
    excluded |= {"layers": True, "prefill_stages": True}
    dump = [policy.in_prefill.model_dump_json(exclude=excluded) for policy in policies]
    return hashlib.sha256("\n".join(dump).encode()).hexdigest()
