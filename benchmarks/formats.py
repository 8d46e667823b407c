"""What rounding keys and values to a format does, and what it saves.

    python -m benchmarks.formats [--tokens 4096] [--facts-tokens 8192] [--skip-facts]

Three measures, each against float32. The next token's distribution when the embedded model reads a held-out
text with dense attention over rounded keys and values (KL divergence, nats; share of equal first choices).
Selection and sparse attention of the configured preset at 512 tokens over rounded keys and values, on real
queries: the share of the exact softmax on what is attended, and the error of the output. Facts found by the
engine with pages in that format. Layouts that no kernel reads yet have no facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from longreach.core.config import Config
from longreach.core.stage import LayerPolicy
from longreach.workers.model import ModelAdapter
from longreach.workers.model_source import policies_of
from longreach.workers.prompt import PromptBuilder

from .captured import Capture, Captures, DenseStep, held_out_text, paged
from .harness import Say, config_of, console, load_model, parser, record, result_path, write_result
from .kv_formats import Format, Rounding, formats
from .quality_probe import Layer, attended_mass, output_error
from .quality_settings import Setting
from .styles import document, measured

TOKENS, QUICK_TOKENS = 4096, 512
FACTS_TOKENS = 8192
CAPTURE_TOKENS, QUICK_CAPTURE_TOKENS = 8192, 1024
LAYERS, QUICK_LAYERS = (2, 8, 14, 20, 26), (14,)
N_QUERIES = 32
KEPT_TOKENS = 512

Row = dict[str, Any]


class RoundedStep(DenseStep):
    """Exact attention over keys and values that are rounded once, as a page stores them."""

    keys: Rounding
    values: Rounding

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return super().attend(layer, q, self.keys(k), self.values(v), scale)


class RoundedLayer(Layer):
    """A layer whose pages hold rounded keys and values; what is exact stays what they are compared with."""

    def __init__(self, capture: Capture, layer: int, form: Format) -> None:
        super().__init__(capture, layer)
        k, v = capture.keys_values(layer)
        self.view = paged(form.keys(k), form.values(v))


def log_probabilities(model: ModelAdapter, tokens: Tensor, wanted: Tensor, form: Format) -> Tensor:
    """Of the next token at the wanted positions: [n, vocab]."""
    size = (model.n_layers, 2, model.n_kv_heads, len(tokens), model.head_dim)
    queries = torch.zeros(model.n_layers, model.n_heads, len(wanted), model.head_dim)
    step = RoundedStep(model.rope, torch.zeros(size), queries, 0, wanted)
    step.keys, step.values = form.keys, form.values
    hidden = model.hidden(tokens, step, decode=False)
    return model.logits(hidden[wanted]).float().log_softmax(dim=-1)


def predictions(model: ModelAdapter, prompts: PromptBuilder, n_tokens: int) -> dict[str, Row]:
    """By format, over the last quarter of the text."""
    text = held_out_text(prompts.count, n_tokens + 64)
    tokens = torch.tensor(prompts.tokenizer.encode(text))[: n_tokens + 1]
    wanted = torch.arange(len(tokens) * 3 // 4, len(tokens) - 1)
    exact: Tensor | None = None
    rows: dict[str, Row] = {}
    for form in formats(model.head_dim):
        found = log_probabilities(model, tokens[:-1], wanted, form)
        exact = found if exact is None else exact
        kl = (exact.exp() * (exact - found)).sum(dim=-1)
        likelihood = -found.gather(1, tokens[wanted + 1][:, None]).mean()
        rows[form.name] = {
            "kl_mean": float(kl.mean()),
            "kl_worst": float(kl.max()),
            "same_choice": float((exact.argmax(-1) == found.argmax(-1)).float().mean()),
            "nll": float(likelihood),
        }
    return rows


def narrowed(policy: LayerPolicy) -> LayerPolicy:
    """The preset at KEPT_TOKENS, with true positions: what rounding does is not hidden by how much is kept,
    nor by positions given anew."""
    last = policy.stages[-1].model_copy(update={"keep": KEPT_TOKENS})
    return policy.model_copy(update={"stages": (*policy.stages[:-1], last), "attend_rope": "none"})


def attention(
    capture: Capture, policies: Sequence[LayerPolicy], layers: Sequence[int], say: Say
) -> dict[str, Row]:
    """By format: mass kept and error of the output, single queries over the last quarter."""
    head_dim = capture.q.shape[-1]
    sums: dict[str, list[tuple[float, float]]] = {}
    for at in layers:
        policy = narrowed(policies[at])
        plain = Setting("as configured", lambda budget, layer: policies[layer])
        starts = capture.positions[capture.positions >= len(capture.token_ids) * 3 // 4]
        starts = starts[:: max(1, len(starts) // N_QUERIES)].tolist()
        exact = Layer(capture, at)
        probes = [exact.probe(start) for start in starts]
        for form in formats(head_dim):
            layer = RoundedLayer(capture, at, form)
            ready = layer.summaries(policy)
            for probe in probes:
                selection = layer.select(probe, policy, plain, 0, ready)
                mass = attended_mass(probe, selection, policy)
                error = output_error(probe, layer.attend(probe, policy, selection, ready))
                sums.setdefault(form.name, []).append((float(mass.mean()), float(error.mean())))
        say(f"layer {at}")
    return {
        name: {
            "mass": sum(mass for mass, _ in pairs) / len(pairs),
            "output_error": sum(error for _, error in pairs) / len(pairs),
        }
        for name, pairs in sums.items()
    }


def facts(
    arguments: argparse.Namespace,
    config: Config,
    model: ModelAdapter,
    prompts: PromptBuilder,
    say: Say,
) -> dict[str, Row]:
    """By format that is built: facts of one document that the engine finds."""
    text = document(prompts.count, arguments.facts_tokens)
    rows: dict[str, Row] = {}
    for form in formats(model.head_dim):
        if not form.built:
            continue
        cache = config.cache.model_copy(update={"kv_dtype": form.name})
        own = config.model_copy(update={"cache": cache})
        row = measured(own, model, prompts, text, lambda s: None)
        say(f"{form.name}: {row['hits']} of {row['of']} facts in {row['seconds']:.0f} s")
        rows[form.name] = {"facts_found": row["hits"], "facts_asked": row["of"]}
    return rows


def table(rows: Sequence[Row], n_tokens: int) -> Table:
    names = ("KV format", "bytes a key and value", "KL mean", "worst", "same choice")
    made = Table(
        title=f"Rounded keys and values: {n_tokens} tokens read, then the preset's attention"
    )
    for name in (*names, "mass kept", "output error", "facts"):
        made.add_column(name, justify="left" if name == names[0] else "right")
    for row in rows:
        asked = row.get("facts_asked")
        made.add_row(
            row["format"] + ("" if row["built"] else ", not built"),
            f"{row['bytes_per_token']:g}",
            f"{row['kl_mean']:.2e}",
            f"{row['kl_worst']:.2e}",
            f"{row['same_choice']:.3f}",
            f"{row['mass']:.4f}",
            f"{row['output_error']:.4f}",
            f"{row['facts_found']} of {asked}" if asked else "",
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--facts-tokens", type=int, default=FACTS_TOKENS)
    made.add_argument("--skip-facts", action="store_true")
    arguments = made.parse_args(argv)
    quick, out = arguments.quick, console()
    n_tokens = arguments.tokens or (QUICK_TOKENS if quick else TOKENS)
    config = config_of(arguments, small=quick)
    result = record("benchmarks.formats", config, sys.argv[1:] if argv is None else argv)
    model, prompts = load_model(config)
    predicted = predictions(model, prompts, n_tokens)
    n_captured = min(n_tokens * 2, QUICK_CAPTURE_TOKENS if quick else CAPTURE_TOKENS)
    capture = Captures(config, out.print).text(n_captured)
    layers = QUICK_LAYERS if quick else LAYERS
    attended = attention(capture, policies_of(config, model.n_layers), layers, out.print)
    found = {} if arguments.skip_facts else facts(arguments, config, model, prompts, out.print)
    rows = [
        {
            "format": form.name,
            "built": form.built,
            "bytes_per_token": form.bytes_per_token,
            **predicted[form.name],
            **attended[form.name],
            **found.get(form.name, {}),
        }
        for form in formats(model.head_dim)
    ]
    out.print(table(rows, n_tokens))
    path = result_path(arguments, "formats")
    measured_on = {"tokens": n_tokens, "captured_tokens": n_captured, "layers": list(layers)}
    write_result(path, result | measured_on | {"rows": rows})
    out.print(f"written to {path}")


if __name__ == "__main__":
    main()
