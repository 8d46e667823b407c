"""Kills and pauses parts of a running gateway by a fault plan's schedule.

By process where there is one (SIGKILL, SIGSTOP and later SIGCONT), in the in-process wiring through
the runtime. The gateway itself is never touched.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.fault_config import FaultsConfig
from ..kvstore.fault_plan import Strike, schedule
from ..kvstore.faults import FaultyService
from .processes import process_alive, send_signal
from .runtime import Runtime

log = logging.getLogger(__name__)

HORIZON_S = 3600.0
"""The schedule is made for so long at a time."""
LATE_S = 5.0
"""A strike that is overdue by more is left out."""
RECORD_NAME = "chaos.jsonl"
"""File in the state directory: a line per strike."""


class Chaos:
    """A thread that strikes. `counts`: kills, pauses and skips (gone already, or overdue)."""

    def __init__(
        self, config: FaultsConfig, runtime: Runtime, part_ids: Sequence[str], record: Path
    ) -> None:
        self.counts: Counter[str] = Counter(kill=0, pause=0, skip=0)
        self._config = config
        self._runtime = runtime
        self._part_ids = part_ids
        self._record = record
        self._paused: dict[int, float] = {}  # pid -> when it goes on
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def start(self) -> None:
        log.error("CHAOS: parts are killed and paused by a fault plan: %s", self._config)
        self._thread.start()

    def stop(self) -> None:
        """No more strikes; what is paused goes on."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)
        self._wake(float("inf"))

    def _run(self) -> None:
        started_s, from_s = time.monotonic(), 0.0
        while not self._stopping.is_set():
            until_s = from_s + HORIZON_S
            for strike in schedule(self._config, self._part_ids, until_s, from_s):
                if not self._wait(started_s + strike.at_s):
                    return
                at_s = time.monotonic() - started_s
                if at_s - strike.at_s > LATE_S:  # the machine stood still: no volley afterwards
                    self.counts["skip"] += 1
                else:
                    self._strike(strike, at_s)
            from_s = until_s
            if not self._wait(started_s + until_s):
                return

    def _wait(self, until_s: float) -> bool:
        """False if stopped; wakes paused processes whose time has come."""
        while not self._stopping.is_set():
            now_s = time.monotonic()
            self._wake(now_s)
            if now_s >= until_s:
                return True
            self._stopping.wait(min([until_s, *self._paused.values()]) - now_s)
        return False

    def _strike(self, strike: Strike, at_s: float) -> None:
        pid = None
        try:
            pid = self._runtime.pid(strike.part)
            done = self._kill(strike, pid) if strike.kind == "kill" else self._pause(strike, pid)
        except Exception:  # a wiring in trouble: that is what is being tested
            log.exception("strike failed part=%s", strike.part)
            done = False
        self.counts[strike.kind if done else "skip"] += 1
        log.warning(
            "chaos %s part=%s pid=%s at=%.1f s%s",
            strike.kind,
            strike.part,
            pid,
            at_s,
            "" if done else " skipped: it is not there",
        )
        self._note(strike, pid, at_s, done)

    def _kill(self, strike: Strike, pid: int | None) -> bool:
        if pid is not None:
            return self._signal(pid, signal.SIGKILL)
        self._runtime.restart(strike.part)
        self._runtime.worker_failed(strike.part)
        return True

    def _pause(self, strike: Strike, pid: int | None) -> bool:
        if pid is not None:
            if not self._signal(pid, signal.SIGSTOP):
                return False
            self._paused[pid] = time.monotonic() + strike.for_s
            return True
        # in this process: the shell that `with_faults` has put around the part holds its answers back
        find: Any = getattr(self._runtime, "service", None)
        service = find(strike.part) if find is not None else None
        if not isinstance(service, FaultyService):
            return False
        service.pause(strike.for_s)
        return True

    def _signal(self, pid: int, signum: int) -> bool:
        if pid == os.getpid() or not process_alive(pid):
            return False
        send_signal(pid, signum)
        return True

    def _wake(self, now_s: float) -> None:
        for pid in [pid for pid, until_s in self._paused.items() if until_s <= now_s]:
            del self._paused[pid]
            send_signal(pid, signal.SIGCONT)

    def _note(self, strike: Strike, pid: int | None, at_s: float, done: bool) -> None:
        line = {
            "time_s": time.time(),
            "at_s": round(at_s, 3),
            "kind": strike.kind,
            "part": strike.part,
            "for_s": strike.for_s,
            "pid": pid,
            "done": done,
        }
        with self._record.open("a") as file:
            file.write(json.dumps(line) + "\n")
