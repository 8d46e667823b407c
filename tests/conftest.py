"""Fixtures and habits of the whole suite: seeds, one thread, the marker rules, a bare clone."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

# read by OpenMP when torch is imported: spinning threads starve the tests' other processes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# read by Triton when a kernel's file is imported: no test needs a GPU, and those that can use one say how
if os.environ.get("LONGREACH_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


def _register_bare_clone() -> None:
    """Make `longreach` importable where nothing is installed.

    Serves everything except tests that start Ray actors: their processes need an installation.
    """
    if importlib.util.find_spec("longreach") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "longreach", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["longreach"] = module
    spec.loader.exec_module(module)


_register_bare_clone()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # tests of core and kvstore never pay for importing it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is none, unless one was promised: silence is no success."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("LONGREACH_EXPECT_GPU"):
        raise pytest.UsageError("LONGREACH_EXPECT_GPU is set, but torch finds no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
