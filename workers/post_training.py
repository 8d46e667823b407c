"""Post-training of a model over retrieved pages (RetroLM's stage 2): the causal loss of plain text, in which
each page reads only what its layers' bookmarks bring within a budget.

The bookmarks stay as they are, the choice of pages follows the model as it changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.errors import InvalidInput, NumericalError
from ..core.stage import LayerPolicy, Stage, resolve_policies
from .sparse_forward import SparseForward, groups_of
from .train_prompt import Stream
from .train_schedule import Schedule

REFRESH = 16
"""Tokens of an answer for which one choice of pages holds, in the configuration for serving."""


@dataclass(frozen=True, kw_only=True)
class PostPlan(Schedule):
    """What a run does, apart from its data; a checkpoint fits only the plan it was made with."""

    n_steps: int = 20
    learning_rate: float = 1e-3
    budget: int = 2048
    """Tokens that a layer reads at most: the first page, the window, the chosen pages."""
    window: int = 256
    """Latest tokens that are always read."""
    dense_layers: str = "0-1"
    """Layers that read every token, as a policy names them; empty for none."""
    rank: int | None = 16
    """Of LoRA; None trains every weight."""
    alpha: float = 32.0
    evaluate_every: int = 10


def policies_for(plan: PostPlan, page_tokens: int) -> tuple[LayerPolicy, ...]:
    """What a configuration says of the plan's layers, with `rest` among them.

    Raises InvalidInput for a budget that leaves no page to choose, and for a window below a page.
    """
    room = plan.budget - page_tokens - plan.window
    if room < page_tokens:
        raise InvalidInput(
            f"budget is {plan.budget}: the first page ({page_tokens}), the window ({plan.window}) and one "
            f"page to choose need {2 * page_tokens + plan.window}"
        )
    if plan.window < page_tokens:
        raise InvalidInput(f"window is {plan.window}, at least a page of {page_tokens} is needed")
    stage = Stage(
        scorer="bookmark",
        chunk=page_tokens,
        keep=room // page_tokens * page_tokens,
        refresh=REFRESH,
    )
    sparse = LayerPolicy(layers="rest", sink=page_tokens, window=plan.window, stages=(stage,))
    if not plan.dense_layers:
        return (sparse,)
    try:
        dense = LayerPolicy(layers=plan.dense_layers, attend_rope="none", sink=0, window=0)
    except ValueError as exc:
        raise InvalidInput(f"dense-layers is {plan.dense_layers!r}: give 0-1 or 0,1,31") from exc
    return (dense, sparse)


def by_layer(policies: Sequence[LayerPolicy], n_layers: int) -> tuple[LayerPolicy, ...]:
    """Raises InvalidInput where no layer is left to choose pages for."""
    found = resolve_policies(tuple(policies), n_layers)
    if all(policy.dense for policy in found):
        raise InvalidInput(f"dense-layers names all {n_layers} layers: nothing would be retrieved")
    return found


class PostTraining:
    """What learns, its optimizer and the step it has reached."""

    def __init__(
        self, forward: SparseForward, learned: Mapping[str, nn.Parameter], plan: PostPlan
    ) -> None:
        self.forward, self.learned, self.plan, self.step = forward, learned, plan, 0
        self.optimizer = torch.optim.AdamW(
            list(learned.values()), weight_decay=0.0, betas=(0.9, 0.98)
        )

    def train_step(self, streams: Sequence[Stream]) -> dict[str, float]:
        """One step on contexts drawn from these: the mean loss per token in nats, the gradients' norm.

        Raises NumericalError, before anything is changed, for a loss that is not finite.
        """
        chosen = self.plan.drawn(self.step, len(streams))
        total = 0.0
        self.optimizer.zero_grad()
        for i in chosen:
            loss = losses_of(self.forward, streams[i]).mean() / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(self.learned.values(), 1.0))
        if not math.isfinite(total + norm):
            raise NumericalError(
                f"step {self.step}: the loss is {total}, its gradient {norm}; lower --learning-rate and "
                "go on from the last checkpoint, or start again"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.optimizer.step()
        self.step += 1
        return {"loss": total, "norm": norm}


def losses_of(forward: SparseForward, stream: Stream) -> torch.Tensor:
    """Negative log-likelihood of every token but the first, in nats: [T - 1]. Answers read what the bookmark
    behind their question brings."""
    token_ids = torch.from_numpy(stream.token_ids)
    page_tokens = forward.bookmarks.shape.page_tokens
    cuts = [ask.position + 1 for ask in stream.asks]
    groups = groups_of(len(token_ids), page_tokens, cuts)
    return forward.losses(forward.hidden(token_ids, groups, {}), token_ids)


@torch.no_grad()
def perplexity(forward: SparseForward, streams: Sequence[Stream]) -> float:
    """Over all tokens of all streams but the first of each."""
    losses = torch.cat([losses_of(forward, stream) for stream in streams])
    return math.exp(float(losses.mean()))
