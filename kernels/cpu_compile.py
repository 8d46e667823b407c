"""The decorator of our compiled functions: no interpreter lock, cached on disk by content.

numba's cache watches only the file of the function itself. Our kernels inline code from several
files, so a change in one would leave stale machine code in the others: the cache folder is therefore
named by the content of all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_config: Any = numba.config


def _cache_folder() -> str:
    """In NUMBA_CACHE_DIR, else beside the sources; "" (numba's own choice, the user's cache) where
    that is read-only."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted(here.glob("cpu_*.py")):
        digest.update(source.read_bytes())
    root = Path(_config.CACHE_DIR) if _config.CACHE_DIR else here / "__pycache__"
    folder = root / f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


_FOLDER = _cache_folder()


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit` with our options. Division by zero is not checked: sizes are positive."""
    before = _config.CACHE_DIR
    _config.CACHE_DIR = _FOLDER or before
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        _config.CACHE_DIR = before
