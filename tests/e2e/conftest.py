"""A tiny random llama behind real serve processes, in both wirings, and a watch on what they leave."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.cluster.processes import command_of, environment_of
from longreach.core.config import Config, load_config

from .serving import MARK, Serve, longreach_command

# the 3K preset scaled down: chunks 64/16/8, keep 512/384/256 and 512/256/128, sink 64, window 128
CONFIG = """
model: {{name: {model}, n_threads: 1, max_context_tokens: 8192, served_names: [tiny]}}
attention:
  policies:
    - layers: "0"
      sink: 64
      window: 128
      select_rope: chunk-indexed
      stages:
        - {{chunk: 64, keep: 512, refresh: 8, query_stride: 4}}
        - {{chunk: 16, keep: 384, refresh: 4, query_stride: 4}}
        - {{chunk: 8, keep: 256, refresh: 2}}
    - layers: rest
      sink: 64
      window: 128
      select_rope: relative
      stages:
        - {{chunk: 64, keep: 512, refresh: 8, query_stride: 4}}
        - {{chunk: 16, keep: 256, refresh: 4, query_stride: 4}}
        - {{chunk: 8, keep: 128, refresh: 2}}
# a third of what the contexts of one batch need
cache: {{device_pages: 48}}
store:
  {{count: 2, replicas: 2, capacity_bytes: 67108864, arena_dir: {arenas}, faults: true, timeout_s: 5}}
gateway: {{max_line_bytes: 100000, drain_timeout_s: 30, heartbeat_timeout_s: 5}}
"""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random weights with the embedded model's tokenizer and vocabulary."""
    from longreach.workers.embedded import ensure_embedded_model

    from ..workers.tiny import make_tiny

    directory = make_tiny("llama", tmp_path_factory.mktemp("tiny-llama"), vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ensure_embedded_model() / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def mark() -> Iterator[str]:
    """Every process started here carries it; when all tests have run, none may be left."""
    made = uuid.uuid4().hex
    yield made
    deadline = time.monotonic() + 10
    while left := _marked(f"{MARK}={made}"):
        assert time.monotonic() < deadline, f"processes left behind: {left}"
        time.sleep(0.1)


def _marked(mark: str) -> list[str]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = [pid for pid in pids if mark in environment_of(pid)]
    return [f"{pid} {' '.join(command_of(pid))[:120]}" for pid in found]


@pytest.fixture(scope="session")
def arenas() -> Iterator[Path]:
    """Where the stores keep their pages; nothing may be left in it."""
    directory = Path(tempfile.mkdtemp(prefix="longreach-e2e-", dir="/dev/shm"))
    yield directory
    left = list(directory.iterdir())
    shutil.rmtree(directory)
    assert not left, "arenas left behind"


@pytest.fixture(scope="session")
def config_file(model_dir: Path, arenas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("e2e-config") / "tiny.yaml"
    path.write_text(CONFIG.format(model=model_dir, arenas=arenas))
    return path


@pytest.fixture(scope="session")
def config(config_file: Path) -> Config:
    return load_config([config_file])


@pytest.fixture(scope="session")
def new_serve(
    config_file: Path, mark: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Serve]]:
    """Start serve on a state directory of its own; `sets` are further --set options."""
    made: list[Serve] = []

    def start(wiring: str, *sets: str) -> Serve:
        command = [*longreach_command(), "serve", "--config", str(config_file)]
        command += ["--wiring", wiring, "--port", "0"]
        for assignment in sets:
            command += ["--set", assignment]
        made.append(Serve(command, tmp_path_factory.mktemp("e2e") / "state", mark))
        return made[-1].start()

    yield start
    for serve in made:
        if serve.process is not None:
            serve.stop()


@pytest.fixture(scope="session")
def inprocess(new_serve: Callable[..., Serve]) -> Serve:
    """The in-process wiring: also what undisturbed runs are taken from."""
    return new_serve("inprocess")


@pytest.fixture(
    scope="session",
    params=["inprocess", pytest.param("ray", marks=pytest.mark.ray)],
)
def serve(request: pytest.FixtureRequest, new_serve: Callable[..., Serve]) -> Serve:
    """The same path in each wiring."""
    if request.param == "inprocess":
        found: Serve = request.getfixturevalue("inprocess")
        return found
    return new_serve("ray")
