"""Processes of this machine, read from /proc: who lives, who belongs to a session."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def process_alive(pid: int) -> bool:
    """True if the process exists on this machine and is not a zombie."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def session_members(session: int) -> list[int]:
    """Live processes whose session is this one; zombies are left out."""
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = []
    for pid in numbers:
        fields = _stat(pid)
        if fields and int(fields[3]) == session and fields[0] not in "ZX":
            found.append(pid)
    return sorted(found)


def command_of(pid: int) -> list[str]:
    """The process's arguments; empty if it is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def environment_of(pid: int) -> list[str]:
    """The environment the process was started with, as NAME=value; empty if it is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
    except OSError:
        return []


def send_signal(pid: int, signum: int) -> None:
    """Signal a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def accepts_connections(address: str, timeout_s: float = 2.0) -> bool:
    """True if something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError):
        return False
    return True


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if the process is gone."""
    try:
        # the name before it is in parentheses and may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
