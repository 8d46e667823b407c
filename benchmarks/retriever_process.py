"""A retriever in a process of its own, with a delay if wanted; it can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreach.core.config import Config, config_dict
from longreach.kvstore.transport import Reply, serve
from longreach.workers.retriever_service import RetrieverService

ROOT = Path(__file__).resolve().parent.parent


class Delayed:
    """Its answers to queries leave so much later."""

    def __init__(self, service: RetrieverService, delay_s: float) -> None:
        self._service = service
        self._delay_s = delay_s

    def handle(self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        reply = self._service.handle(method, header, buffers)
        if method in ("select", "choose", "ask"):
            time.sleep(self._delay_s)
        return reply


class RetrieverProcess:
    """Started when made; `address` is where it answers."""

    def __init__(self, config: Config, delay_s: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.retriever_process", str(delay_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(config_dict(config)) + "\n")
        self._process.stdin.flush()
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"the retriever ended with {self._process.wait()}")

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> RetrieverProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()


def main(delay_s: float) -> None:
    config = Config.model_validate(json.loads(sys.stdin.readline()))
    service = RetrieverService(config, "retriever-0")
    print(serve(Delayed(service, delay_s)).address, flush=True)
    sys.stdin.read()  # ends with the parent


if __name__ == "__main__":
    main(float(sys.argv[1]))
