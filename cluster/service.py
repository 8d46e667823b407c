"""What the gRPC servicers share: the parts of one gateway, put together by gateway.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.clock import Clock
from ..core.config import Config
from .contexts import ContextStore
from .dispatcher import Dispatcher
from .interactive import Interactive
from .journal import Journal
from .metrics import Metrics
from .preparer import Preparer
from .rpc_status import StreamSlots
from .runtime import Runtime
from .snapshots import Snapshots
from .submission import Intake

MAX_STREAMS = 128
"""Streams open at once (Generate, Watch, Results, uploads)."""


@dataclass
class Service:
    """One gateway's parts. Frozen after start."""

    config: Config
    clock: Clock
    runtime: Runtime
    journal: Journal
    contexts: ContextStore
    preparer: Preparer
    intake: Intake
    dispatcher: Dispatcher
    interactive: Interactive
    metrics: Metrics
    snapshots: Snapshots
    page_bytes: int
    epoch: int
    started_s: float
    streams: StreamSlots = field(default_factory=lambda: StreamSlots(MAX_STREAMS))
