"""What every training run shares: the learning rate of a step, and the contexts that it is made on.

Both are functions of the plan and the step's number, so that a run that is taken up again goes on alike.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """AdamW's rate over a run of n_steps, each on n_contexts contexts."""

    n_steps: int
    learning_rate: float
    n_contexts: int = 1
    """Per step."""
    warm_up_share: float = 0.05
    last_rate_share: float = 0.05
    """Of the learning rate, where the cosine ends."""
    seed: int = 0
    evaluate_every: int
    """Steps between measurements on held-out contexts."""

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine."""
        warm_up = max(1, round(self.n_steps * self.warm_up_share))
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.n_steps - warm_up)
        share = self.last_rate_share
        return self.learning_rate * (share + (1 - share) * (1 + math.cos(math.pi * done)) / 2)

    def drawn(self, step: int, n: int) -> list[int]:
        """Which of n contexts a step is made on: each once in every round, in an order of its own."""
        first, found = step * self.n_contexts, []
        for at in range(first, first + self.n_contexts):
            order = random.Random(f"{self.seed} round {at // n}").sample(range(n), n)
            found.append(order[at % n])
        return found
