"""What plain Hugging Face dense attention answers to the same prompts: the yardstick of demo and bench."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..core.config import Config, ModelConfig
from .model_source import model_dir
from .prompt import Prompt, PromptBuilder
from .threads import use_threads


@dataclass(frozen=True)
class DenseAnswer:
    """token_ids of the answer; prefill_s counts only tokens this prompt did not share."""

    token_ids: list[int]
    n_prefilled: int
    prefill_s: float
    decode_s: float


class DenseModel:
    """The unchanged transformers model, float32, greedy. Reads a shared context once."""

    def __init__(self, model: ModelConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = model_dir(model)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        eos = self._model.generation_config.eos_token_id
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Prompt], max_tokens: Sequence[int], *, ignore_eos: bool = False
    ) -> list[DenseAnswer]:
        """Greedy answers; prompts with equal context tokens share one prefill of them.

        ignore_eos: decode max_tokens whatever the model says (to time decoding).
        """
        ends = set() if ignore_eos else self._eos
        answers: list[DenseAnswer | None] = [None] * len(prompts)
        groups: dict[bytes, list[int]] = {}
        for i, prompt in enumerate(prompts):
            head = np.ascontiguousarray(prompt.token_ids[: prompt.n_context_tokens])
            groups.setdefault(head.tobytes(), []).append(i)
        for members in groups.values():
            first = prompts[members[0]]
            started = time.monotonic()
            context = self._forward(first.token_ids[: first.n_context_tokens], None)[1]
            context_s = time.monotonic() - started
            n_prefilled = first.n_context_tokens
            for i in members:
                cache = copy.deepcopy(context) if i != members[-1] else context
                answers[i] = self._tail(
                    prompts[i], cache, max_tokens[i], ends, context_s, n_prefilled
                )
                context_s, n_prefilled = 0.0, 0
        return [a for a in answers if a is not None]

    def _forward(self, token_ids: np.ndarray, cache):  # type: ignore[no-untyped-def]
        ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64))[None]
        out = self._model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return self._model.lm_head(out.last_hidden_state[0, -1:])[0], out.past_key_values

    def _tail(  # type: ignore[no-untyped-def]
        self,
        prompt: Prompt,
        cache,
        max_tokens: int,
        ends: set[int],
        context_s: float,
        n_prefilled: int,
    ) -> DenseAnswer:
        started = time.monotonic()
        logits, cache = self._forward(prompt.token_ids[prompt.n_context_tokens :], cache)
        prefill_s = time.monotonic() - started + context_s
        n_prefilled += prompt.n_tokens - prompt.n_context_tokens
        started = time.monotonic()
        tokens: list[int] = []
        while True:
            tokens.append(int(logits.argmax()))
            if tokens[-1] in ends or len(tokens) >= max_tokens:
                break
            logits, cache = self._forward(np.array(tokens[-1:]), cache)
        return DenseAnswer(tokens, n_prefilled, prefill_s, time.monotonic() - started)

    def text(self, answer: DenseAnswer) -> str:
        return str(self.tokenizer.decode(answer.token_ids, skip_special_tokens=True))


def answer_batch(batch: Path, config: Config | None = None) -> dict[str, str]:
    """Dense greedy answers by custom_id to a batch in our row shape (context or context_uri a local
    path). Contexts are read once however many rows ask about them."""
    config = config or Config()
    use_threads(config.model.n_threads)
    builder = PromptBuilder.from_config(config)
    rows = [json.loads(line) for line in batch.read_text(encoding="utf-8").splitlines() if line]
    texts: dict[str, str] = {}
    prompts = []
    for row in rows:
        uri = row.get("context_uri")
        if uri is not None and uri not in texts:
            texts[uri] = Path(uri).read_text(encoding="utf-8")
        context = row["context"] if uri is None else texts[uri]
        prompts.append(builder.build(context, row["question"], row.get("answer_prefix", "")))
    model = DenseModel(config.model)
    answers = model.answer(prompts, [int(row.get("max_tokens", 64)) for row in rows])
    return {
        str(row["custom_id"]): model.text(answer) for row, answer in zip(rows, answers, strict=True)
    }
