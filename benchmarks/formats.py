"""What rounding keys and values to a format does to a model that otherwise attends exactly.

    python -m benchmarks.formats [--tokens 4096]

The embedded model reads a held-out text with dense float32 attention, keys and values rounded to each
format of `cache.kv_dtype` as they are stored. Compared with float32: the distribution of the next token at
positions over the last quarter of the text (KL divergence, nats; share of equal first choices; negative
log-likelihood of the token that follows).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, get_args

import torch
from rich.table import Table
from torch import Tensor

from longreach.core.config import KvDtype
from longreach.kernels.paged import pack, unpack
from longreach.workers.bank import TORCH_DTYPE
from longreach.workers.model import ModelAdapter

from .captured import DenseStep, held_out_text
from .harness import config_of, console, load_model, parser, record, result_path, write_result

TOKENS = 4096
QUICK_TOKENS = 512

Row = dict[str, Any]


class RoundedStep(DenseStep):
    """Exact attention over keys and values that are rounded once, as a page stores them."""

    dtype = torch.float32

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        stored = (unpack(pack(x, self.dtype)) for x in (k, v))
        return super().attend(layer, q, *stored, scale)


def log_probabilities(model: ModelAdapter, tokens: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Of the next token at the wanted positions: [n, vocab]."""
    size = (model.n_layers, 2, model.n_kv_heads, len(tokens), model.head_dim)
    queries = torch.zeros(model.n_layers, model.n_heads, len(wanted), model.head_dim)
    step = RoundedStep(model.rope, torch.zeros(size), queries, 0, wanted)
    step.dtype = TORCH_DTYPE[name]
    hidden = model.hidden(tokens, step, decode=False)
    return model.logits(hidden[wanted]).float().log_softmax(dim=-1)


def row_bytes(name: str, head_dim: int) -> int:
    stored = pack(torch.zeros(1, head_dim), TORCH_DTYPE[name])
    return stored.shape[1] * stored.element_size()


def compared(name: str, exact: Tensor, found: Tensor, following: Tensor, head_dim: int) -> Row:
    kl = (exact.exp() * (exact - found)).sum(dim=-1)
    likelihood = -found.gather(1, following[:, None]).mean()
    return {
        "format": name,
        "bytes_per_key": row_bytes(name, head_dim),
        "kl_mean": float(kl.mean()),
        "kl_worst": float(kl.max()),
        "same_choice": float((exact.argmax(-1) == found.argmax(-1)).float().mean()),
        "nll": float(likelihood),
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__).parse_args(argv)
    n_tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    config = config_of(arguments, small=arguments.quick)
    result = record("benchmarks.formats", config, sys.argv[1:] if argv is None else argv)
    model, prompts = load_model(config)
    text = held_out_text(prompts.count, n_tokens + 64)
    tokens = torch.tensor(prompts.tokenizer.encode(text))[: n_tokens + 1]
    wanted = torch.arange(len(tokens) * 3 // 4, len(tokens) - 1)
    following = tokens[wanted + 1]
    exact: Tensor | None = None
    rows: list[Row] = []
    for name in get_args(KvDtype):
        found = log_probabilities(model, tokens[:-1], wanted, name)
        exact = found if exact is None else exact
        rows.append(compared(name, exact, found, following, model.head_dim))
    out = console()
    columns = ("KV format", "bytes per key", "KL mean", "KL worst", "same choice", "NLL")
    table = Table(*columns, title=f"Rounded keys and values, {len(tokens) - 1} tokens, dense")
    for row in rows:
        table.add_row(
            row["format"],
            str(row["bytes_per_key"]),
            f"{row['kl_mean']:.2e}",
            f"{row['kl_worst']:.2e}",
            f"{row['same_choice']:.3f}",
            f"{row['nll']:.4f}",
        )
    out.print(table)
    path = result_path(arguments, "formats")
    write_result(path, result | {"tokens": len(tokens) - 1, "positions": len(wanted), "rows": rows})
    out.print(f"written to {path}")


if __name__ == "__main__":
    main()
