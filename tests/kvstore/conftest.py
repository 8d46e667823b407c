"""Fixtures of the store tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .kv_helpers import Stores


@pytest.fixture(params=["mem", "tcp"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path, request.param)
    yield stores
    stores.close()
    assert os.listdir(tmp_path) == [], "an arena file was left behind"


@pytest.fixture
def pair(stores: Stores) -> Stores:
    stores.start("store-0")
    stores.start("store-1")
    return stores


@pytest.fixture(params=[False, True], ids=["mapped", "wire"])
def force_wire(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)
