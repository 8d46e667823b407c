"""The Ray wiring: parts are detached named actors, created or adopted; work never crosses a call.

Ray places, supervises and restarts. Actor methods are address, health and drain; everything else
goes over the transport at the addresses the actors publish (DESIGN 1.4).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._raylet import Config as RaySettings  # type: ignore[attr-defined]
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ..core.config import Config, config_dict
from ..core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    LongreachError,
    Unavailable,
)
from ..kvstore.arena import sweep
from ..kvstore.serving import builder
from ..kvstore.store_actor import StoreActor
from ..workers.decode_actor import DecodeActor
from ..workers.retriever_actor import RetrieverActor
from .parts import Parts, fingerprint
from .processes import process_alive, send_signal
from .ray_head import RayHead, auth_environment
from .runtime import Located, PartKind, part_ids
from .supervised import Supervised
from .supervisor import Supervisor

log = logging.getLogger(__name__)
T = TypeVar("T")

_ACTORS: dict[PartKind, type] = {
    "store": StoreActor,
    "retriever": RetrieverActor,
    "worker": DecodeActor,
}
_CPUS: dict[PartKind, float] = {"store": 0.1, "retriever": 0.1, "worker": 1.0}
"""Logical CPUs: they place decode workers, threads are bounded by model.n_threads."""
_ZONE_LABELS = ("topology.kubernetes.io/zone", "ray.io/availability-zone")
_HEALTH_TIMEOUT_S = 10.0
_DRAIN_S = 2.0
_STOP_TIMEOUT_S = 20.0


class RayRuntime(Supervised):
    """Parts as actors on a Ray of this state directory's own, or on `cluster.ray_address`."""

    def __init__(self, config: Config, state_dir: str | Path, parts: Parts | None = None) -> None:
        self._config = config
        self._parts = parts or Parts()
        self._fingerprint = fingerprint(config, self._parts)
        self._kinds: dict[str, PartKind] = {
            part_id: kind for kind, ids in part_ids(config).items() for part_id in ids
        }
        needed = math.ceil(sum(_CPUS[kind] for kind in self._kinds.values()))
        self._head = RayHead(config.cluster, Path(state_dir), max(config.cluster.num_cpus, needed))
        self._own_head = config.cluster.ray_address is None
        self._supervisor = Supervisor(self, config.gateway.heartbeat_timeout_s, config.store)
        self._create_lock = threading.Lock()
        self._geometry: dict[str, Any] = {}
        self._zones: dict[str, str] = {}  # by node id
        self._connected = False
        self._stopped = False

    def start(self, epoch: int) -> None:
        if self._connected or self._stopped:
            raise FailedPrecondition("this runtime has been started before; build a new one")
        deadline = time.monotonic() + self._config.cluster.start_timeout_s
        self._head.lock()
        try:
            with ThreadPoolExecutor(1) as beside:
                # both take seconds: reading the model's shape, starting Ray
                geometry = beside.submit(builder(self._parts.geometry), self._config)
                address = self._config.cluster.ray_address
                if address is None:
                    address = self._head.start_or_adopt(_left(deadline, "start Ray"))
                self._geometry = geometry.result(_left(deadline, "read the model's shape"))
            self._connect(address)
            self._drop_surplus()
            # workers are told where the others are when they are built
            for last in (False, True):
                ids = [i for i, k in self._kinds.items() if (k == "worker") == last]
                self._bring_up(ids, deadline)
            self._supervisor.watch(epoch)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, keep_parts: bool = False) -> None:
        """End supervision; unless `keep_parts`, end the parts, this Ray and what both left."""
        if self._stopped:
            return
        self._stopped = True
        self._supervisor.stop()
        pids = [p.located.pid for p in self._supervisor.parts() if p.located and p.located.pid]
        if self._connected:
            # the Ray API has no deadlines of its own and may hang where GCS is gone
            _bounded(lambda: self._disconnect(keep_parts), _STOP_TIMEOUT_S)
        if not keep_parts:
            self._end_processes(pids)
            if self._own_head:
                self._head.stop()
            sweep(self._config.store.arena_dir)  # of stores that were killed
        self._head.unlock()

    def locate(self, part_id: str, timeout_s: float) -> Located:
        """Part of PartHost: asks the actor where it is; an actor that is dead is created anew."""
        try:
            actor = ray.get_actor(part_id, namespace=self._head.namespace)
        except ValueError:
            actor = self._create(part_id)
        try:
            address = _ask(actor.address, timeout_s)
            health = _ask(actor.health, timeout_s)
        except RayTaskError as exc:
            # it could not be built; with other addresses or later it may
            ray.kill(actor, no_restart=True)
            raise _own_error(exc) from exc
        if health["fingerprint"] != self._fingerprint:
            ray.kill(actor, no_restart=True)
            raise Unavailable(f"{part_id} ran with another configuration and is replaced")
        pid = int(health["pid"]) if self._own_head else None
        node_id = str(health["node_id"])
        return Located(str(address), pid, node_id, self._zone_of(node_id))

    def _zone_of(self, node_id: str) -> str:
        """The zone that a node is labelled with, or none. Asked once a node: labels do not change."""
        if node_id not in self._zones:
            nodes = {str(node["NodeID"]): node.get("Labels") or {} for node in ray.nodes()}
            labels = nodes.get(node_id, {})
            found = [str(labels[label]) for label in _ZONE_LABELS if labels.get(label)]
            self._zones[node_id] = found[0] if found else ""
        return self._zones[node_id]

    def restart(self, part_id: str) -> None:
        """Part of PartHost: kill the process; Ray starts the actor again."""
        for part in self._supervisor.parts():
            if part.part_id == part_id and part.located and part.located.pid:
                # a process that hangs does not hear Ray's request to exit
                send_signal(part.located.pid, signal.SIGKILL)
                return
        try:
            ray.kill(ray.get_actor(part_id, namespace=self._head.namespace), no_restart=False)
        except (ValueError, RayError) as exc:
            log.warning("part could not be restarted part=%s: %s", part_id, exc)

    def _connect(self, address: str) -> None:
        if self._own_head:
            os.environ.update(auth_environment())
            # Ray took its settings from the environment when it was imported
            RaySettings.initialize("")
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=address,
                namespace=self._head.namespace,
                log_to_driver=False,
                configure_logging=False,
            )
        except ConnectionError as exc:
            raise Unavailable(f"Ray at {address} cannot be reached: {exc}") from exc
        self._connected = True
        if in_main:
            signal.signal(signal.SIGTERM, handler)  # ray.init takes it; draining is ours

    def _bring_up(self, ids: list[str], deadline: float) -> None:
        """Create or adopt these parts side by side, then wait until each answers."""
        for part_id in ids:
            try:
                ray.get_actor(part_id, namespace=self._head.namespace)
            except ValueError:
                self._create(part_id)
        for part_id in ids:
            located = self._wait_located(part_id, deadline)
            self._supervisor.adopt(part_id, self._kinds[part_id], located)
        self._head.note_parts(
            {p.part_id: p.located.pid for p in self._supervisor.parts() if p.located is not None}
        )

    def _wait_located(self, part_id: str, deadline: float) -> Located:
        while True:
            left = _left(deadline, f"bring up {part_id} (logs: {self._head.logs_dir()})")
            try:
                return self.locate(part_id, left)
            except (Unavailable, DeadlineExceeded) as exc:
                log.info("waiting for part=%s: %s", part_id, exc.message)
                time.sleep(min(0.2, left))

    def _create(self, part_id: str) -> Any:
        kind = self._kinds[part_id]
        args: list[Any] = [
            config_dict(self._config),
            part_id,
            # the transport has no authentication: a single-node one stays on the loopback
            "127.0.0.1" if self._own_head else None,
            getattr(self._parts, kind),
            self._fingerprint,
        ]
        if kind == "store":
            args.append(self._geometry)
        if kind == "worker":
            args += [self._supervisor.addresses("store"), self._supervisor.addresses("retriever")]
        options = {
            "name": part_id,
            "namespace": self._head.namespace,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 4,
            "num_cpus": _CPUS[kind],
            "get_if_exists": True,
            # replicas are worth more on different nodes
            "scheduling_strategy": "SPREAD" if kind == "store" else "DEFAULT",
        }
        with self._create_lock:
            try:
                return ray.remote(_ACTORS[kind]).options(**options).remote(*args)
            except (RayError, ValueError) as exc:
                raise Unavailable(f"{part_id} cannot be created yet: {exc}") from exc

    def _drop_surplus(self) -> None:
        """End actors of an earlier start that this configuration does not ask for."""
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self._head.namespace and entry["name"] not in self._kinds:
                ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))

    def _disconnect(self, keep_parts: bool) -> None:
        if not keep_parts:
            actors: list[Any] = []
            for part_id in self._kinds:
                with contextlib.suppress(ValueError):
                    actors.append(ray.get_actor(part_id, namespace=self._head.namespace))
            drains: list[Any] = [actor.drain.remote(_DRAIN_S) for actor in actors]
            if drains:
                # stores may write pages to disk at the end
                timeout_s = 2 * _DRAIN_S + self._config.store.flush_s
                ray.wait(drains, num_returns=len(drains), timeout=timeout_s)
            for actor in actors:
                ray.kill(actor, no_restart=True)
        ray.shutdown()

    def _end_processes(self, pids: list[int], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while any(process_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in pids:
            if process_alive(pid):
                send_signal(pid, signal.SIGKILL)


def _ask(method: Any, timeout_s: float) -> Any:
    """Result of an actor method. Raises Unavailable, DeadlineExceeded; RayTaskError is passed."""
    try:
        return ray.get(method.remote(), timeout=max(timeout_s, 0.1))
    except RayTaskError:
        raise
    except GetTimeoutError as exc:
        raise DeadlineExceeded(f"actor did not answer within {timeout_s:.1f} s") from exc
    except RayError as exc:
        if getattr(exc, "actor_init_failed", False):
            raise InternalError(f"actor cannot be constructed: {exc}") from exc
        raise Unavailable(f"actor is not up: {type(exc).__name__}") from exc


def _own_error(exc: RayTaskError) -> LongreachError:
    cause = getattr(exc, "cause", None)
    if isinstance(cause, LongreachError):
        return cause
    return InternalError(f"part failed: {cause or exc}")


def _left(deadline: float, what: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(f"cluster.start_timeout_s is over; could not {what}")
    return left


def _bounded(action: Callable[[], None], timeout_s: float) -> None:
    """Run in a thread that is left behind if it takes longer."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        log.error("Ray did not answer within %.0f s and is ended without it", timeout_s)
