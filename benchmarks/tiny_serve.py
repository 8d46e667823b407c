"""A tiny random model behind `longreach serve`, for benchmarks of the service and not of the model."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import yaml

from longreach.workers.embedded import ensure_embedded_model
from tests.e2e.serving import Serve, longreach_command
from tests.workers.tiny import make_tiny

N_STORES, N_WORKERS = 3, 2
PAGE_TOKENS = 64
START_S = 300.0
"""Longest wait for the parts; on a busy machine a Ray takes minutes."""

# the 3K preset scaled down, as the end-to-end tests have it
_STAGES = [
    {"chunk": 64, "keep": 512, "refresh": 8, "query_stride": 4},
    {"chunk": 16, "keep": 256, "refresh": 4, "query_stride": 4},
    {"chunk": 8, "keep": 128, "refresh": 2},
]
_POLICY = {"sink": 64, "window": 128, "select_rope": "relative", "stages": _STAGES}


def write_config(directory: Path, arenas: Path) -> Path:
    """A configuration of the tiny model in `directory`; the model is made there too."""
    model = make_tiny("llama", directory / "model", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ensure_embedded_model() / name, model / name)
    tree = {
        "model": {"name": str(model), "n_threads": 1, "max_context_tokens": 8192},
        "attention": {"policies": [{"layers": "rest", **_POLICY}]},
        "cache": {"device_pages": 96},
        "worker": {"count": N_WORKERS},
        # room for most of the contexts, not for all
        "store": {
            "count": N_STORES,
            "replicas": 2,
            "capacity_bytes": 24 << 20,
            "arena_dir": str(arenas),
            "timeout_s": 5,
            "lease_s": 120,
            "repair_delay_s": 3,
        },
        "gateway": {"drain_timeout_s": 30, "heartbeat_timeout_s": 15},
        "cluster": {"start_timeout_s": START_S},
    }
    path = directory / "chaos.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def new_serve(config: Path, wiring: str, directory: Path, mark: str = "") -> Serve:
    command = [*longreach_command(), "serve", "--config", str(config), "--wiring", wiring]
    return Serve([*command, "--port", "0"], directory / wiring, mark or uuid.uuid4().hex)


@contextlib.contextmanager
def serving(serve: Serve, *more: str) -> Iterator[Serve]:
    try:
        yield serve.start(*more, timeout_s=START_S)
    finally:
        if serve.process is not None:
            serve.stop(120.0)
