"""Admin: statistics and drain."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..core.errors import InvalidInput
from .proto import admin_pb2 as pb
from .proto import admin_pb2_grpc
from .results import numeric_stats
from .rpc_status import long_call, unary
from .service import Service

MAX_DRAIN_S = 24 * 3600.0


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Thread-safe."""

    def __init__(self, service: Service, drain: Callable[[float], int]) -> None:
        self.service = service
        self._drain = drain

    @unary
    def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        service = self.service
        response = pb.StatsResponse(
            version=_version(),
            epoch=service.epoch,
            uptime_s=service.clock.monotonic_s() - service.started_s,
            draining=service.dispatcher.draining,
            model=service.config.model.name,
            gateway=service.metrics.numbers(),
        )
        for part, values in sorted(service.runtime.stats().items()):
            labels = {k: v for k, v in values.items() if isinstance(v, str)}
            response.parts.add(part=part, numbers=numeric_stats(values), labels=labels)
        return response

    @long_call
    def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        timeout_s = request.timeout_s or self.service.config.gateway.drain_timeout_s
        if not (math.isfinite(timeout_s) and 0 < timeout_s <= MAX_DRAIN_S):
            raise InvalidInput(
                f"timeout_s: {timeout_s} is not within 0 and {MAX_DRAIN_S}", field="timeout_s"
            )
        return pb.DrainResponse(running_rows=self._drain(timeout_s))


def _version() -> str:
    try:
        return version("longreach")
    except PackageNotFoundError:  # a bare clone
        return "0"
