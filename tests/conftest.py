"""Fixtures and habits of the whole suite: seeds, one thread, the marker rules, a bare clone."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# read by OpenMP when torch is imported: spinning threads starve the tests' other processes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# read by Triton when a kernel's file is imported: no test needs a GPU, and those that can use one say how
if os.environ.get("LONGREACH_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# a shell's background jobs ignore Ctrl-C, and so would every process that the tests start and send it to
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tests have a time limit of their own; that of a single example fails on machines with other work
settings.register_profile("longreach", deadline=None)
settings.load_profile("longreach")

ROOT = Path(__file__).resolve().parent.parent
SERVICES = "services"
SERVING = ("cluster", "e2e")
"""Folders whose tests start services."""
GRID_CASES = 2
"""Of a test marked grid, in the short version."""


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


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter prepares `triton.language` again for every call of one compiled function by
    another, which takes most of a test's time; once a launch is enough."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    ready: set[str] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        ready.clear()
        launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the launch itself prepared what our own modules see
        if self.fn.__module__.startswith("triton.") and self.fn.__module__ not in ready:
            ready.add(self.fn.__module__)
            prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", action="store_true", help="all cases of tests marked grid")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--grid"):
        _thin_out(config, items)
    _skip_gpu(items)
    # what starts services begins first: it takes longest, and waits most
    items.sort(key=lambda item: _unit(item.nodeid) != SERVICES)


def _unit(nodeid: str) -> str:
    """The unit of work of a test: with `pytest -n 2` each goes to one process as a whole. Tests that start
    services, wait and measure time are one, so that they share the fixtures of a session and never disturb
    each other; of the others, each file is one."""
    path = nodeid.partition("::")[0]
    folder = path.removeprefix("tests/").partition("/")[0]
    return SERVICES if folder in SERVING or folder.endswith(".py") else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Instead of groups by mark: xdist 3.8 writes them into names that pytest 9.2 makes anew."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    return Units(config, log)


def _thin_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked grid, a few of the cases that show a parameter's value for the first time: interpreted
    kernels take seconds each. `make test-kernels` runs all of them."""
    seen: set[tuple[str, str, str]] = set()
    new: dict[str, list[pytest.Item]] = {}
    grid: list[pytest.Item] = []
    for item in items:
        case = getattr(item, "callspec", None)
        if case is None or item.get_closest_marker("grid") is None:
            continue
        grid.append(item)
        test = f"{item.path}::{getattr(item, 'originalname', item.name)}"
        values = {(test, name, repr(value)) for name, value in case.params.items()}
        if not values <= seen:
            new.setdefault(test, []).append(item)
        seen |= values
    kept = {id(item) for cases in new.values() for item in _spread(cases)}
    left = [item for item in grid if id(item) not in kept]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = {id(item) for item in left}
        items[:] = [item for item in items if id(item) not in gone]


def _spread(cases: list[pytest.Item]) -> list[pytest.Item]:
    """At most GRID_CASES of them, the first and the last among them."""
    if len(cases) <= GRID_CASES:
        return cases
    step = (len(cases) - 1) / (GRID_CASES - 1)
    return [cases[round(i * step)] for i in range(GRID_CASES)]


def _skip_gpu(items: list[pytest.Item]) -> None:
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
