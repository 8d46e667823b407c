"""The gateway: binds the port, locks the journal, starts the parts, serves, drains, stops."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.clock import Clock, SystemClock
from ..core.config import Config
from ..core.errors import AlreadyServing, FailedPrecondition
from ..core.page_key import Recipe
from ..kvstore.page import PageGeometry
from .admin_service import AdminServicer
from .contexts import ContextStore
from .contexts_service import ContextsServicer
from .dispatcher import Dispatcher
from .inference_service import InferenceServicer
from .interactive import Interactive
from .jobs_service import JobsServicer
from .journal import Journal
from .kv_service import KvServicer
from .metrics import Metrics
from .plan import check_policies
from .preparer import Preparer, PromptBuilder
from .proto import (
    admin_pb2,
    admin_pb2_grpc,
    contexts_pb2,
    contexts_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    kv_pb2,
    kv_pb2_grpc,
)
from .row import max_context_bytes
from .runtime import Runtime
from .service import MAX_STREAMS, Service
from .snapshots import Snapshots
from .submission import Intake
from .tier_metrics import StoreCollector
from .worker_pool import WorkerPool

log = logging.getLogger("longreach.gateway")
SHORT_CALL_THREADS = 16
STOP_GRACE_S = 2.0
SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (inference_pb2, "Inference"),
        (jobs_pb2, "Jobs"),
        (contexts_pb2, "Contexts"),
        (admin_pb2, "Admin"),
        (kv_pb2, "Kv"),
    )
)


class Gateway:
    """One gateway over one runtime. start, then drain and stop, once each, from any thread."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        clock: Clock | None = None,
        *,
        prompts: PromptBuilder | None = None,
        geometry: PageGeometry | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """prompts, geometry and recipe: of the configured model, unless a test brings its own."""
        self._config = config
        self._runtime = runtime
        self._clock = clock or SystemClock()
        self._prompts = prompts
        self._geometry = geometry
        self._recipe = recipe
        self._metrics = Metrics()
        self._health = health.HealthServicer()
        self._server: Any = None
        self._journal: Journal | None = None
        self._pool: WorkerPool | None = None
        self._service: Service | None = None
        self._address_file: Path | None = None
        self._stop_lock = threading.Lock()
        self._started = False
        self.address = ""

    @property
    def epoch(self) -> int:
        return self._service.epoch if self._service else 0

    @property
    def metrics(self) -> Metrics:
        return self._metrics

    def start(self) -> str:
        """The address that answers now.

        Raises AlreadyServing (port or journal taken, before any part is started), what
        Runtime.start raises, UnsupportedModel.
        """
        if self._started:
            raise FailedPrecondition("this gateway was started before; make a new one")
        self._started = True
        gateway = self._config.gateway
        try:
            self._server = self._bind()
            self._journal = Journal(gateway.state_dir, self._clock)
            # the model is looked at before the parts start: a wrong name fails in a second
            prompts, geometry = self._model()
            self._service = self._assemble(self._journal, prompts, geometry)
            self._runtime.start(self._service.epoch)
            check_policies(self._config, stores_local=_stores_local(self._runtime))
            if gateway.metrics_port is not None:
                port = self._metrics.serve(gateway.host, gateway.metrics_port)
                log.info("metrics at http://%s:%d/metrics", gateway.host, port)
            self._service.dispatcher.start()
            self._register(self._service)
            self._server.start()
            self._set_health(health_pb2.HealthCheckResponse.SERVING)
            self._write_address(self._journal.state_dir)
        except BaseException:
            self.stop()
            raise
        log.info("gateway at %s, epoch %d", self.address, self._service.epoch)
        return self.address

    def drain(self, timeout_s: float | None = None) -> int:
        """Refuse new work, wait for running rows; how many still run when the time is over."""
        if self._service is None:
            return 0
        self._health.enter_graceful_shutdown()
        given_s = self._config.gateway.drain_timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + given_s
        service = self._service
        n_rows = service.dispatcher.drain(given_s)
        while service.interactive.n_running and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return n_rows + service.interactive.n_running

    def stop(self, *, keep_parts: bool = False) -> None:
        """End everything now; rows that run stay in the journal. A second call does nothing.

        keep_parts: leave detached parts running, for the next gateway to adopt.
        """
        with self._stop_lock:
            server, self._server = self._server, None
            service, self._service = self._service, None
            journal, self._journal = self._journal, None
            self._health.enter_graceful_shutdown()
            if self._address_file is not None:
                self._address_file.unlink(missing_ok=True)
                self._address_file = None
            if service is not None:
                service.dispatcher.stop()
            if server is not None:
                server.stop(STOP_GRACE_S).wait(STOP_GRACE_S + 5)
            if self._pool is not None:
                self._pool.close()
            if service is not None:
                self._runtime.stop(keep_parts=keep_parts)
            self._metrics.close()
            if journal is not None:
                journal.close()

    def _bind(self) -> Any:
        gateway = self._config.gateway
        limit = gateway.max_message_bytes
        server = grpc.server(
            ThreadPoolExecutor(MAX_STREAMS + SHORT_CALL_THREADS, thread_name_prefix="grpc"),
            options=[
                # two gateways on one port would each get half of the calls
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # long prefills send little: clients may ping often, also between calls
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                # on a busy machine pings arrive in bunches: a client must not be cut off for that
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        target = f"{gateway.host}:{gateway.port}"
        try:
            port = server.add_insecure_port(target)
        except RuntimeError as exc:
            raise AlreadyServing(
                f"cannot listen at {target}: it is in use (or not an address of this machine); "
                "stop the other process, or set another gateway.port",
                address=target,
            ) from exc
        self.address = f"{gateway.host}:{port}"
        return server

    def _model(self) -> tuple[PromptBuilder, PageGeometry]:
        prompts, geometry = self._prompts, self._geometry
        if prompts is None:
            from ..workers.prompt import PromptBuilder as ModelPrompts

            prompts = ModelPrompts.from_config(self._config)
        if geometry is None:
            from ..workers.model_source import model_geometry

            geometry = model_geometry(self._config)
        return prompts, geometry

    def _model_recipe(self) -> Recipe:
        if self._recipe is None:
            from ..workers.model_source import recipe_for

            self._recipe = recipe_for(self._config)
        return self._recipe

    def _assemble(
        self, journal: Journal, prompts: PromptBuilder, geometry: PageGeometry
    ) -> Service:
        config = self._config
        epoch = journal.take_epoch(self._clock.wall_s())
        contexts = ContextStore(journal, max_context_bytes(config), self._clock)
        preparer = Preparer(config, journal, contexts, prompts, geometry)
        pool = self._pool = WorkerPool(config, self._runtime, epoch)
        dispatcher = Dispatcher(
            config, journal, contexts, preparer, pool, self._metrics, self._clock
        )
        service = Service(
            config=config,
            clock=self._clock,
            runtime=self._runtime,
            journal=journal,
            contexts=contexts,
            preparer=preparer,
            intake=Intake(config, journal, contexts),
            dispatcher=dispatcher,
            interactive=Interactive(config, preparer, pool, self._metrics),
            metrics=self._metrics,
            snapshots=Snapshots(
                config, self._runtime, contexts, preparer, geometry, self._model_recipe
            ),
            page_bytes=geometry.page_nbytes,
            epoch=epoch,
            started_s=self._clock.monotonic_s(),
        )
        self._metrics.watch(
            queued=lambda: dispatcher.n_open_rows - dispatcher.n_running_rows,
            running=lambda: dispatcher.n_running_rows,
            workers=pool.n_live,
            streams=lambda: service.streams.n_open,
        )
        self._metrics.add(StoreCollector(self._runtime.stores, geometry.page_nbytes))
        return service

    def _register(self, service: Service) -> None:
        server = self._server
        # generated code carries no types
        adders: tuple[tuple[Any, Any], ...] = (
            (inference_pb2_grpc.add_InferenceServicer_to_server, InferenceServicer(service)),
            (jobs_pb2_grpc.add_JobsServicer_to_server, JobsServicer(service)),
            (contexts_pb2_grpc.add_ContextsServicer_to_server, ContextsServicer(service)),
            (admin_pb2_grpc.add_AdminServicer_to_server, AdminServicer(service, self.drain)),
            (kv_pb2_grpc.add_KvServicer_to_server, KvServicer(service)),
            (health_pb2_grpc.add_HealthServicer_to_server, self._health),
        )
        for add, servicer in adders:
            add(servicer, server)
        names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    def _set_health(self, status: int) -> None:
        for name in ("", *SERVICE_NAMES):
            self._health.set(name, status)

    def _write_address(self, state_dir: Path) -> None:
        """Tell others on this machine where to connect (a port of 0 was picked just now)."""
        path = state_dir / "gateway.json"
        part = path.with_suffix(".part")
        part.write_text(
            json.dumps({"address": self.address, "pid": os.getpid(), "epoch": self.epoch})
        )
        os.replace(part, path)
        self._address_file = path


def _stores_local(runtime: Runtime) -> bool:
    """False only if stores and workers tell their nodes and a worker has no store beside it."""
    nodes: dict[str, set[str]] = {"store": set(), "worker": set()}
    for values in runtime.stats().values():
        kind, node = values.get("kind"), values.get("node_id")
        if kind in nodes and isinstance(node, str):
            nodes[str(kind)].add(node)
    return not nodes["store"] or nodes["worker"] <= nodes["store"]
