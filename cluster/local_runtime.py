"""The in-process wiring: the same parts over mem:// in this process, without importing ray."""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Any

from ..core.config import Config
from ..core.errors import FailedPrecondition
from ..kvstore.serving import builder
from ..kvstore.transport import Server, Service, serve
from .parts import Parts
from .runtime import Located, PartKind, part_ids
from .supervised import Supervised
from .supervisor import Supervisor

log = logging.getLogger(__name__)

NODE_ID = "local"
_DRAIN_S = 2.0
_serial = itertools.count()


class LocalRuntime(Supervised):
    """Stores, retrievers and workers as objects of this process, behind the real transport."""

    def __init__(self, config: Config, parts: Parts | None = None) -> None:
        self._config = config
        self._parts = parts or Parts()
        # several runtimes may live in one process (tests), so names carry a number
        self._prefix = f"mem://runtime-{next(_serial)}"
        self._services: dict[str, Service] = {}
        self._servers: dict[str, Server] = {}
        self._kinds: dict[str, PartKind] = {}
        self._lock = threading.RLock()
        self._supervisor = Supervisor(self, config.gateway.heartbeat_timeout_s, config.store)
        self._started = False
        self._geometry: dict[str, Any] = {}

    def start(self, epoch: int) -> None:
        if self._started:
            raise FailedPrecondition("this runtime has been started before; build a new one")
        self._started = True
        try:
            self._geometry = builder(self._parts.geometry)(self._config)
            for kind, ids in part_ids(self._config).items():
                for part_id in ids:
                    self._kinds[part_id] = kind
                    self._build(part_id)
                    self._supervisor.adopt(part_id, kind, self.locate(part_id, 0.0))
            self._supervisor.watch(epoch)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, keep_parts: bool = False) -> None:
        """Ends every part; nothing can be kept, since they live in this process."""
        self._supervisor.stop()
        with self._lock:
            for part_id in reversed(list(self._servers)):
                self._end(part_id)

    def service(self, part_id: str) -> Service:
        """The part's service object itself, for tests and notebooks."""
        return self._services[part_id]

    def locate(self, part_id: str, timeout_s: float) -> Located:
        """Part of PartHost: where the part answers, rebuilt if it was ended."""
        with self._lock:
            if part_id not in self._servers:
                self._build(part_id)
            return Located(self._servers[part_id].address, node_id=NODE_ID)

    def restart(self, part_id: str) -> None:
        """Part of PartHost: end the part; `locate` builds it anew."""
        with self._lock:
            self._end(part_id)

    def _build(self, part_id: str) -> None:
        kind = self._kinds[part_id]
        build = builder(getattr(self._parts, kind))
        with self._lock:
            args: tuple[Any, ...] = (self._config, part_id, NODE_ID)
            if kind == "store":
                args += (self._geometry,)
            if kind == "worker":
                args += (self._addresses("store"), self._addresses("retriever"))
                args += (lambda exc: self._on_fatal(part_id, exc),)
            service = build(*args)
            self._services[part_id] = service
            name = f"{self._prefix}/{part_id}-{next(_serial)}"
            self._servers[part_id] = serve(service, name)

    def _on_fatal(self, part_id: str, exc: BaseException) -> None:
        log.error("part failed part=%s: %s", part_id, exc)

        def renew() -> None:
            # not in the caller's thread: it belongs to the part that is to be ended
            self.restart(part_id)
            self._supervisor.fail(part_id)

        threading.Thread(target=renew, name=f"renew {part_id}", daemon=True).start()

    def _addresses(self, kind: PartKind) -> dict[str, str]:
        return {i: s.address for i, s in self._servers.items() if self._kinds[i] == kind}

    def _end(self, part_id: str) -> None:
        server = self._servers.pop(part_id, None)
        service: Any = self._services.pop(part_id, None)
        try:
            if server is not None:
                server.stop(_DRAIN_S)
            if hasattr(service, "close"):
                service.close()
        except Exception:  # the other parts still have to be ended
            log.exception("part did not end cleanly part=%s", part_id)
