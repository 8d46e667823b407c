"""A single-node Ray as processes of its own: started in a new session, adopted again, ended alone.

The gateway is never Ray's parent: a driver that starts Ray itself takes raylet, GCS and the detached
actors with it when it is killed. Several of these may live on one machine; each has its own temp
dir and ports, and is ended through the processes of its own session, never through `ray stop`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from ..core.config import ClusterConfig
from ..core.errors import AlreadyServing, DeadlineExceeded, FailedPrecondition, Unavailable
from ..workers.embedded import cache_dir
from .processes import (
    accepts_connections,
    command_of,
    environment_of,
    free_port,
    process_alive,
    send_signal,
    session_members,
)

MAX_TEMP_DIR_CHARS = 40
"""Ray adds 66 characters for its sockets; a unix socket path ends at 107."""
LOOPBACK = "127.0.0.2"
_POLL_S = 0.05


class RayHead:
    """The Ray head that belongs to one state directory."""

    def __init__(self, config: ClusterConfig, state_dir: Path, n_cpus: int) -> None:
        self._config = config
        self._state_dir = state_dir
        self._n_cpus = n_cpus
        self._record_path = state_dir / "cluster.json"
        self._lock: IO[str] | None = None
        self.temp_dir = _temp_dir(state_dir)
        self.namespace = "longreach-" + _digest(state_dir)
        self._mark = f"LONGREACH_CLUSTER={self.namespace}"
        self.record: dict[str, Any] = {}

    def lock(self) -> None:
        """Hold the state directory for this process. Raises AlreadyServing if another does."""
        self._state_dir.mkdir(parents=True, exist_ok=True)
        handle = (self._state_dir / "cluster.lock").open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            handle.close()
            raise AlreadyServing(
                f"another serve process holds {self._state_dir}; stop it, or choose another "
                "gateway.state_dir"
            ) from exc
        self._lock = handle

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def start_or_adopt(self, timeout_s: float) -> str:
        """Address (host:port) of the running head; starts one if there is none that answers."""
        self.record = self._read_record()
        if self.alive():
            return str(self.record["ray_address"])
        self.end_processes()  # remains of a head that is half dead
        return self._start(timeout_s)

    def alive(self) -> bool:
        """True if GCS accepts connections and the raylet's process exists."""
        address = str(self.record.get("ray_address", ""))
        programs = {Path((command_of(pid) or [""])[0]).name for pid in self.pids()}
        return bool(address) and "raylet" in programs and accepts_connections(address)

    def pids(self) -> list[int]:
        """Processes of this head's session, actors included."""
        session = int(self.record.get("session_pid", 0))
        return [pid for pid in session_members(session) if self._is_ours(pid)] if session else []

    def note_parts(self, pids: dict[str, int | None]) -> None:
        """Record the parts' processes beside the head's, for operators and for the next start."""
        self.record["parts"] = pids
        self._write_record()

    def end_processes(self, timeout_s: float = 10.0) -> None:
        """End this session's processes, politely and then not; others on the machine stay."""
        deadline = time.monotonic() + timeout_s
        signalled: set[int] = set()
        for signum, share in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 1.0)):
            until = deadline - timeout_s * (1.0 - share)
            while (pids := self.pids()) and time.monotonic() < until:
                for pid in pids:
                    if signum == signal.SIGKILL or pid not in signalled:
                        send_signal(pid, signum)
                signalled.update(pids)
                time.sleep(_POLL_S)
        # one that is ending has no command line any more, but still holds its files and locks
        while left := [pid for pid in signalled if process_alive(pid)]:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"Ray processes {left} did not end within {timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the processes and remove what they left: temp dir, record."""
        self.end_processes()
        self._keep_logs()
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        self._record_path.unlink(missing_ok=True)
        self.record = {}

    def logs_dir(self) -> Path:
        return self.temp_dir / "session_latest" / "logs"

    def _start(self, timeout_s: float) -> str:
        self.temp_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.temp_dir.stat().st_uid != os.getuid() or not stat.S_ISDIR(
            self.temp_dir.lstat().st_mode
        ):
            raise FailedPrecondition(f"{self.temp_dir} belongs to another user; remove it")
        (self.temp_dir / "ray_current_cluster").unlink(missing_ok=True)
        # the mark is inherited by all of Ray's processes and tells them from strangers later
        # spinning OpenMP threads starve the others of a busy machine (measured: 10 times slower)
        command = [
            "env",
            self._mark,
            "OMP_WAIT_POLICY=passive",
            "RAY_worker_niceness=0",  # Ray's 15 would put the decode worker behind everything else
            *(f"{k}={v}" for k, v in auth_environment().items()),
        ]
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0"]
        command += [
            f"--temp-dir={self.temp_dir}",
            f"--num-cpus={self._n_cpus}",
            f"--object-store-memory={self._config.object_store_bytes}",
            "--include-dashboard=false",
            "--dashboard-agent-listen-port=0",
            # Ray replaces 127.0.0.1 by an outer address, which a laptop loses with its network
            f"--node-ip-address={LOOPBACK}",
            f"--ray-client-server-port={free_port(LOOPBACK)}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
        ]
        # to a file, not a pipe: the daemons inherit it and would keep a pipe open for ever
        with tempfile.TemporaryFile("w+", dir=self._state_dir) as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            # written before it is up, so that a start cut short can still be cleaned up
            self.record = {"session_pid": process.pid, "temp_dir": str(self.temp_dir)}
            self._write_record()
            try:
                code = process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired as exc:
                process.kill()
                process.wait(timeout=5.0)
                self.end_processes()
                raise DeadlineExceeded(f"`ray start` took more than {timeout_s:.0f} s") from exc
            if code:
                output.seek(0)
                tail = " | ".join(output.read().strip().splitlines()[-3:])
                self.end_processes()
                raise Unavailable(f"`ray start` ended with code {code}: {tail}")
        address = (self.temp_dir / "ray_current_cluster").read_text().strip()
        self.record |= {
            "ray_address": address,
            "namespace": self.namespace,
            "pids": self.pids(),
            "started_s": time.time(),
        }
        self._write_record()
        return address

    def _keep_logs(self) -> None:
        """The parts' own output, kept in the state directory after the temp dir is gone."""
        kept = self._state_dir / "logs"
        files = [*self.logs_dir().glob("worker-*.err"), *self.logs_dir().glob("raylet.err")]
        files = [file for file in files if file.stat().st_size]
        if files:
            kept.mkdir(exist_ok=True)
        for file in files:
            shutil.copy(file, kept / file.name)

    def _is_ours(self, pid: int) -> bool:
        # a session number may have been given to someone else since the record was written
        command = " ".join(command_of(pid))
        if str(self.temp_dir) in command or command.startswith("ray::"):
            return True
        return self._mark in environment_of(pid)

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record_path.read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write_record(self) -> None:
        temporary = self._record_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=2))
        temporary.replace(self._record_path)


def auth_environment() -> dict[str, str]:
    """What makes Ray refuse whoever does not have this user's token; makes the token.

    Anyone who reaches a Ray can run code in it, and some of its ports are open to the network. One
    token serves all clusters of a user: Ray reads it once in the life of a process.
    """
    path = cache_dir().parent / "ray-token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # complete under another name first: two starts at once must not read half a token
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as fresh:
            fresh.write(secrets.token_hex(32))
            fresh.flush()
            with contextlib.suppress(FileExistsError):
                os.link(fresh.name, path)
    except OSError as exc:
        raise FailedPrecondition(f"{path}: cannot be written: {exc.strerror}") from exc
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _digest(state_dir: Path) -> str:
    return hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]


def _temp_dir(state_dir: Path) -> Path:
    inside = state_dir.resolve() / "ray"
    if len(str(inside)) <= MAX_TEMP_DIR_CHARS:
        return inside
    return Path("/tmp") / f"longreach-{_digest(state_dir)}"
