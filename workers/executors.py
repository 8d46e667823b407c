"""Which executor and which weights a configuration asks for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..core.config import Config, ModelConfig
from ..core.errors import ConfigError
from ..core.page_key import RecipeFingerprint
from ..core.stage import LayerPolicy
from ..kvstore.page import Bytes, PageGeometry
from ..kvstore.page_client import PageClient
from .bookmark_source import bookmarks_of
from .cpu_executor import CpuExecutor
from .executor import Executor
from .gpu_budget import plan_gpu
from .gpu_estimate import GpuModel
from .gpu_machine import machine_of
from .gpu_needs import GpuLoad
from .model import ModelAdapter
from .pinned import PinnedArena, cuda_registrar

PIECE_BYTES = 1 << 30
"""Host memory registered at once: long enough to be worth a call, short enough to wait for."""


def load_model(config: ModelConfig, directory: Path) -> ModelAdapter:
    """The model on the configured device. Raises ConfigError if there is no such device."""
    if config.device == "cpu":
        return ModelAdapter(directory)
    device = cuda_device()
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return ModelAdapter(directory, device, dtype, own_kernels=False)


def make_executor(
    config: Config,
    model: ModelAdapter,
    geometry: PageGeometry,
    policies: tuple[LayerPolicy, ...],
    recipe: RecipeFingerprint,
    client: PageClient | None,
    retrievers: dict[str, str],
) -> Executor:
    """Raises ConfigError if the device is missing, or cannot do or hold what is asked."""
    if config.model.device == "cpu":
        bookmarks = bookmarks_of(config)
        return CpuExecutor(config, model, geometry, policies, recipe, client, retrievers, bookmarks)
    device = cuda_device()
    # said before anything is allocated, with what to change
    plan_gpu(GpuLoad.of(config, GpuModel.of(model.config)), machine_of()).check()
    # only here: Triton is no dependency of a worker without a GPU
    from .gpu_executor import GpuExecutor

    reachable = Reached(config.store.timeout_s)
    return GpuExecutor(config, model, geometry, policies, recipe, client, device, reachable)


class Reached:
    """A `Reachable`: memories are registered with CUDA whole, piece by piece in the background, from the
    first time that a page in them is wanted."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._arenas: dict[int, PinnedArena] = {}

    def __call__(self, memory: Bytes, first: int, n_bytes: int) -> None:
        arena = self._arenas.get(memory.ctypes.data)
        if arena is None:
            registrar = cuda_registrar(
                torch.cuda.current_device(), read_only=not memory.flags.writeable
            )
            arena = PinnedArena(memory, PIECE_BYTES, registrar)
            self._arenas[memory.ctypes.data] = arena
        arena.wait_ready(first, n_bytes, self._timeout_s)


def cuda_device() -> torch.device:
    """Raises ConfigError where torch finds no CUDA device, or Triton is missing."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"model.device is cuda, but torch {torch.__version__} finds no CUDA device here; use "
            "model.device: cpu, or install a CUDA build of torch on a machine with an NVIDIA GPU"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "model.device is cuda, but triton is not installed: pip install 'longreach[gpu]'"
        )
    return torch.device("cuda", torch.cuda.current_device())
