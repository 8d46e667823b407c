"""The decorator of our compiled functions: no interpreter lock, cached on disk by content.

numba's cache watches only the file of the function itself. Our kernels inline code from several
files, so a change in one would leave stale machine code in the others: the cache folder of a file is
therefore named by its content and by that of every kernel file it imports.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_config: Any = numba.config
_IMPORTS = re.compile(r"^from \.(cpu_\w+) import", re.MULTILINE)


@functools.cache
def _sources(path: Path) -> frozenset[Path]:
    """A kernel file and all kernel files that it imports, directly or not."""
    found, open_ = set(), [path]
    while open_:
        source = open_.pop()
        if source in found or not source.is_file():
            continue
        found.add(source)
        open_ += [source.with_name(f"{name}.py") for name in _IMPORTS.findall(source.read_text())]
    return frozenset(found)


@functools.cache
def _cache_folder(path: Path) -> str:
    """In NUMBA_CACHE_DIR, else beside the sources; "" (numba's own choice, the user's cache) where
    that is read-only."""
    digest = hashlib.sha256()
    for source in sorted(_sources(path)):
        digest.update(source.read_bytes())
    root = Path(_config.CACHE_DIR) if _config.CACHE_DIR else path.parent / "__pycache__"
    folder = root / f"{path.stem}-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit` with our options. Division by zero is not checked: sizes are positive."""
    before = _config.CACHE_DIR
    folder = _cache_folder(Path(function.__code__.co_filename))
    _config.CACHE_DIR = folder or before
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        _config.CACHE_DIR = before


def is_fresh() -> bool:
    """Whether nothing is compiled yet on this machine: the first use then takes a minute."""
    folders = {_cache_folder(path) for path in Path(__file__).parent.glob("cpu_*.py")}
    return not any(folder and any(Path(folder).rglob("*.nbi")) for folder in folders)
